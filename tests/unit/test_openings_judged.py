"""Verdicts by opened triggers: exact whoever chose them, or stated to be a blind choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from keys import one_line
from opened import OPENED, changed, key, xor

from countermark.errors import ConfigError, CountermarkError, SuspectError
from countermark.keys.key import KeyMaterial
from countermark.predictors.base import Images, Labels
from countermark.results import statistics
from countermark.results.verdict import VerificationOptions
from countermark.verification.disclosure import TriggerDisclosure, disclose_triggers
from countermark.verification.verify import examine, verify

DATED = VerificationOptions(assume_dated=True)
BLIND = replace(DATED, blind_choice=True)


class Answers:
    """A suspect that gives the triggers of the key these answers, and knows no other images."""

    def __init__(self, answers: Any) -> None:
        self.answers, self.asked = np.asarray(answers, dtype=np.int64), 0

    def __call__(self, images: Images) -> Labels:
        known = {each.tobytes(): n for n, each in enumerate(key().frozen["triggers"])}
        self.asked += len(images)
        return self.answers[[known[each.tobytes()] for each in images]]


MARKED = key().draw_labels(40, 10)


def test_a_marked_suspect_is_asked_about_opened_triggers_alone() -> None:
    suspect = Answers(MARKED)
    verdict = verify(suspect, disclose_triggers(key(), range(20)), assume_dated=True)
    assert (verdict.outcome, suspect.asked) == ("owned", 20)
    assert (verdict.bits, verdict.matched, verdict.answer_count) == (40, 20, 20)
    assert verdict.log10_p == pytest.approx(statistics.compute_log10_binomial_tail(20, 40, 0.1))
    assert verdict.commitment == key().commitment
    assert "opened        20 of the key's 40 triggers" in verdict.explain()
    assert any("the others count as misses" in limit for limit in verdict.limits)
    assert any("can be trained on them" in limit for limit in verdict.limits)
    expected = {"opened": 20, "committed": 40, "blind_choice": False}
    assert verdict.to_json()["disclosure"] == expected


def test_a_blind_choice_is_about_the_opened_triggers_alone_and_says_so() -> None:
    verdict = examine(Answers(MARKED), disclose_triggers(key(), range(20)), BLIND)
    assert (verdict.outcome, verdict.bits, verdict.matched) == ("owned", 20, 20)
    assert verdict.log10_p == pytest.approx(-20)
    (limit,) = (each for each in verdict.limits if "opened;" in each)
    assert "20 of the key's 40 triggers were opened" in limit
    assert "holds only if whoever chose them did not know their labels" in limit


@pytest.mark.parametrize("terms", [DATED, BLIND])
def test_all_triggers_opened_are_as_good_as_the_key(terms: VerificationOptions) -> None:
    for suspect in (Answers(MARKED), Answers(np.arange(40) % 10)):
        whole = examine(suspect, key(), DATED)
        verdict = examine(suspect, disclose_triggers(key(), None), terms)
        assert (verdict.outcome, verdict.matched) == (whole.outcome, whole.matched)
        assert (verdict.log10_p, verdict.floor) == (whole.log10_p, whole.floor)
        assert any("all 40 of the key's triggers were opened" in each for each in verdict.limits)


def lucky(answers: Labels) -> list[int]:
    """The triggers that a suspect happens to answer with their labels."""
    return np.flatnonzero(answers == MARKED).tolist()


def test_an_owner_gains_nothing_by_choosing_what_to_open() -> None:
    innocent = np.random.default_rng(5).integers(0, 10, 40)
    chosen = disclose_triggers(key(), lucky(innocent))
    verdict = examine(Answers(innocent), chosen, DATED)
    whole = examine(Answers(innocent), key(), DATED)
    assert not verdict.owned
    assert (verdict.matched, verdict.log10_p) == (whole.matched, whole.log10_p)
    against_him = examine(
        Answers(innocent), chosen, BLIND
    )  # why a statement is needed, and recorded
    assert against_him.log10_p == pytest.approx(-len(lucky(innocent)))


def test_no_suspect_is_accused_more_often_than_alpha_allows_whoever_chooses() -> None:
    """600 keys: a blind choice of ten, and the owner's best choice of any number."""
    random = np.random.default_rng(1)
    answers = np.minimum(random.geometric(0.4, 40) - 1, 3)  # of four classes, one far ahead
    claims = {"blind": 0, "owner's": 0}
    for seed in range(600):
        made = key(seed, 4)
        expected = made.draw_labels(40, 4)
        blind = int((answers == expected)[random.permutation(40)[:10]].sum())
        claims["blind"] += statistics.compute_log10_binomial_tail(blind, 10, 0.25) <= -2
        own = int((answers == expected).sum())
        claims["owner's"] += statistics.compute_log10_binomial_tail(own, 40, 0.25) <= -2
    for count in claims.values():
        assert count <= scipy.stats.binom(600, 1e-2).ppf(0.99)


def test_too_few_opened_triggers_are_no_verdict() -> None:
    for terms, floor in ((DATED, statistics.compute_log10_binomial_tail(5, 40, 0.1)), (BLIND, -5)):
        verdict = examine(Answers(MARKED), disclose_triggers(key(), range(5)), terms)
        assert (verdict.outcome, verdict.floor) == ("no_verdict", pytest.approx(floor))
        assert "a perfect reading of its 5 opened triggers" in verdict.reason


def test_undated_openings_need_forgery_bits() -> None:
    verdict = examine(
        Answers(MARKED), disclose_triggers(key(), range(20)), VerificationOptions(blind_choice=True)
    )
    assert verdict.outcome == "no_verdict"
    assert "2^66" in verdict.reason
    assert examine(Answers(MARKED), disclose_triggers(key(), range(25)), BLIND).forgery_bits > 80


def test_no_answer_is_no_verdict() -> None:
    verdict = examine(Answers(np.full(40, -1)), disclose_triggers(key(), [1, 2]), DATED)
    assert (verdict.outcome, verdict.unit) == ("no_verdict", "triggers")
    assert "any of 2 triggers" in verdict.reason


def test_a_test_key_proves_nothing_opened_either() -> None:
    made = replace(key(), material=KeyMaterial.from_test_seed(1))
    verdict = verify(Answers(MARKED), disclose_triggers(made, None))
    assert verdict.outcome == "no_verdict"
    assert "this is a test key" in verdict.reason


def forgeries() -> Iterator[TriggerDisclosure]:
    yield changed(OPENED, "opened", 0, "salt", to=xor(0))
    yield changed(OPENED, "opened", 0, "image", to="AAAA")
    yield changed(OPENED, "context", "scheme", to="uchida")


def test_nothing_is_judged_before_it_is_checked() -> None:
    for forged in forgeries():
        suspect = Answers(MARKED)
        with pytest.raises(CountermarkError) as caught:
            verify(suspect, forged)
        one_line(caught.value)
        assert suspect.asked == 0


def test_what_cannot_be_asked_is_one_line() -> None:
    with pytest.raises(SuspectError, match="build the model of a file first"):
        verify("model.safetensors", OPENED)
    with pytest.raises(ConfigError, match="has no null 'fair_coin'"):
        verify(Answers(MARKED), OPENED, null="fair_coin")
