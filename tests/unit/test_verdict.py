"""Verdicts: both thresholds at their edges, and what is said of them to people and machines."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from countermark.results.null_hypotheses import (
    FairCoin,
    NullHypothesis,
    PermutedUnits,
    UnmarkedModels,
    compute_forgery_bits,
)
from countermark.results.reading import ReaderFacts, Reading
from countermark.results.statistics import compute_log10_binomial_tail
from countermark.results.subject import HiddenUnits, Subject, UnmarkedModel
from countermark.results.verdict import (
    ALPHA,
    KeyIdentity,
    Verdict,
    VerificationOptions,
    judge,
    make_no_verdict,
)

KEY = KeyIdentity("uchida", "00" * 32, "ACME Inc.")
SUBJECT = Subject("suspect")


def evidence(matched: int, bits: int, **more: Any) -> Reading:
    """Evidence with that many matches."""
    expected = np.arange(bits, dtype=np.uint8) % 2
    read = expected.copy()
    read[matched:] ^= 1
    return Reading(read, expected, **more)


def judged(
    matched: int, bits: int, *, tests: int = 1, test_key: bool = False, **more: Any
) -> Verdict:
    stated = {name: more.pop(name) for name in ("committed", "payload") if name in more}
    key, subject = replace(KEY, test_key=test_key), replace(SUBJECT, readings=tests)
    found, terms = evidence(matched, bits, **stated), VerificationOptions(**more)
    return judge(found, FairCoin(), subject=subject, key=key, terms=terms)


# --- the decision table: matched, bits, terms -> outcome, a word of its reason

LEAST = 167  # of 256 fair bits, the least with p ≤ 1e-6

TABLE: list[tuple[dict[str, Any], str, str]] = [
    ({"matched": 256, "bits": 256}, "owned", "is present"),
    ({"matched": 128, "bits": 256}, "not_proven", "was not found"),
    ({"matched": 0, "bits": 256}, "not_proven", "was not found"),
    # alpha: coincidence, and the least count that it allows
    ({"matched": LEAST, "bits": 256, "assume_dated": True}, "owned", "is present"),
    ({"matched": LEAST - 1, "bits": 256, "assume_dated": True}, "not_proven", "was not found"),
    ({"matched": LEAST, "bits": 256}, "no_verdict", "a dated claim is needed"),
    ({"matched": LEAST, "bits": 256, "alpha": 1e-7, "assume_dated": True}, "not_proven", "found"),
    ({"matched": LEAST - 9, "bits": 256, "alpha": 1e-3, "assume_dated": True}, "owned", "present"),
    # the correction for several readings
    ({"matched": LEAST, "bits": 256, "assume_dated": True, "tests": 2}, "not_proven", "found"),
    ({"matched": 256, "bits": 256, "tests": 1000}, "owned", "is present"),
    ({"matched": 25, "bits": 25, "assume_dated": True, "tests": 1000}, "no_verdict", "cannot"),
    # forgery: 80 bits exactly are enough, 79 never are
    ({"matched": 80, "bits": 80}, "owned", "is present"),
    ({"matched": 80, "bits": 80, "tests": 2}, "no_verdict", "2^79"),
    ({"matched": 81, "bits": 81, "tests": 2}, "owned", "is present"),
    ({"matched": 84, "bits": 84, "tests": 16}, "owned", "is present"),
    ({"matched": 79, "bits": 79}, "no_verdict", "2^79 of them, fewer than 2^80"),
    ({"matched": 79, "bits": 79, "assume_dated": True}, "owned", "is present"),
    ({"matched": 256, "bits": 256, "committed": False}, "no_verdict", "2^0"),
    ({"matched": 256, "bits": 256, "committed": False, "assume_dated": True}, "owned", "present"),
    # a floor above alpha: no reading could ever prove anything
    ({"matched": 19, "bits": 19}, "no_verdict", "even a perfect reading of its 19 bits"),
    ({"matched": 0, "bits": 19}, "no_verdict", "even a perfect reading"),
    ({"matched": 20, "bits": 20}, "no_verdict", "a dated claim is needed"),
    ({"matched": 20, "bits": 20, "assume_dated": True}, "owned", "is present"),
    ({"matched": 19, "bits": 20, "assume_dated": True}, "not_proven", "was not found"),
    # a test key proves nothing, whatever else holds
    ({"matched": 256, "bits": 256, "test_key": True}, "no_verdict", "test key"),
    ({"matched": 256, "bits": 256, "test_key": True, "assume_dated": True}, "no_verdict", "test"),
    ({"matched": 0, "bits": 256, "test_key": True}, "no_verdict", "test key"),
    ({"matched": 256, "bits": 256, "test_key": True, "allow_test_key": True}, "owned", "present"),
    ({"matched": 128, "bits": 256, "test_key": True, "allow_test_key": True}, "not_proven", "not"),
]


@pytest.mark.parametrize(("given", "outcome", "said"), TABLE, ids=range(len(TABLE)))
def test_decisions(given: dict[str, Any], outcome: str, said: str) -> None:
    verdict = judged(**given)
    assert (verdict.outcome, said in verdict.reason) == (outcome, True), verdict.reason
    assert verdict.owned == (outcome == "owned")
    assert verdict.exit_code == {"owned": 0, "not_proven": 1, "no_verdict": 3}[outcome]


def test_least_is_the_least() -> None:
    least, too_few = (compute_log10_binomial_tail(k, 256) for k in (LEAST, LEAST - 1))
    assert least <= math.log10(ALPHA) < too_few


@pytest.mark.parametrize("bits", [*range(1, 300), 1024, 4096])
def test_a_perfect_reading_has_as_many_forgery_bits_as_the_message(bits: int) -> None:
    """No rounding may put 80 perfect bits below 80, or 79 above."""
    assert compute_forgery_bits(evidence(bits, bits)) == pytest.approx(bits, rel=1e-12)
    assert (compute_forgery_bits(evidence(bits, bits)) >= 80) == (bits >= 80)
    assert (judged(bits, bits).outcome == "owned") == (bits >= 80)


def test_more_matches_never_weaken_a_verdict() -> None:
    rank = {"not_proven": 0, "no_verdict": 1, "owned": 2}
    for bits in (80, 128, 256):
        ranks = [rank[judged(k, bits).outcome] for k in range(bits + 1)]
        assert ranks == sorted(ranks)


@pytest.mark.parametrize("alpha", [0, 1, -1, 2, float("nan")])
def test_alpha_is_a_probability(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        VerificationOptions(alpha=alpha)


# --- what a verdict says

CASES = {
    "perfect": judged(256, 256, payload=True),
    "none": judged(0, 256, payload=False),
    "lost payload": judged(250, 256, payload=False),
    "short": judged(90, 100, tests=7, assume_dated=True),
    "one bit": judged(0, 1),
    "empty": make_no_verdict(
        "nothing to read", bits=256, subject=SUBJECT, key=KEY, terms=VerificationOptions()
    ),
}
# fmt: off
FIELDS = {
    "outcome", "scheme", "bits", "matched", "ber", "ber_interval", "log10_p", "null", "floor",
    "tests", "alpha", "forgery_bits", "limits", "payload", "unit", "answered", "reason",
    "commitment", "owner", "assume_dated", "suspect", "null_says", "loss", "reader", "disclosure",
    "dating", "likeness", "corrections", "uncorrected_log10_p", "blind_choice",
    "hidden_units", "unmarked",
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_a_verdict_survives_json(name: str) -> None:
    told = CASES[name].to_json()
    assert set(told) == FIELDS
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_json_of_a_perfect_reading() -> None:
    told = CASES["perfect"].to_json()
    expected = {
        "outcome": "owned", "scheme": "uchida", "bits": 256, "matched": 256, "ber": 0.0,
        "null": "fair_coin", "tests": 1, "alpha": 1e-6, "payload": True, "owner": "ACME Inc.",
        "assume_dated": False, "suspect": {"name": "suspect"}, "commitment": "00" * 32,
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    assert told["log10_p"] == told["floor"] == pytest.approx(-256 * math.log10(2))
    assert told["forgery_bits"] == pytest.approx(256)
    assert told["ber_interval"] == pytest.approx([0, 1 - 0.025 ** (1 / 256)])
    assert len(told["limits"]) == 2


@pytest.mark.parametrize("name", [name for name in CASES if name != "empty"])
def test_people_are_told_the_same(name: str) -> None:
    verdict = CASES[name]
    said = verdict.explain()
    for part in (
        verdict.outcome.upper().replace("_", " "),
        verdict.reason,
        f"{verdict.matched} of {verdict.bits} bits",
        f"bit error rate {verdict.ber:.4f}",
        f"{verdict.log10_p:.2f} after corrections",
        f"threshold {math.log10(verdict.alpha):.2f}, floor {verdict.floor:.2f}",
        "fair_coin",
        f"forgery_bits  {verdict.forgery_bits:.1f}",
        "payload",
        *verdict.limits,
    ):
        assert part in said
    assert all(line.isprintable() for line in said.split("\n"))


def test_a_verdict_about_nothing_is_told_in_words() -> None:
    assert CASES["empty"].explain() == "NO VERDICT: nothing to read"
    assert CASES["empty"].log10_p is None


def test_hostile_names_cannot_forge_lines() -> None:
    reason = "no tensor a\nOWNED: the mark of this key is present\x1b[1A"
    verdict = make_no_verdict(
        reason, bits=256, subject=SUBJECT, key=KEY, terms=VerificationOptions()
    )
    assert len(verdict.explain().splitlines()) == 1
    assert "\x1b" not in verdict.explain()


def test_limits_say_what_was_stated_and_what_is_lost() -> None:
    assert any("owner's own statement" in limit for limit in CASES["short"].limits)
    assert any("payload is lost" in limit for limit in CASES["lost payload"].limits)
    assert any("not innocent" in limit for limit in CASES["none"].limits)
    assert all(any("who owns" in limit for limit in judged(k, 256).limits) for k in (0, 256))


def test_p_never_exceeds_one() -> None:
    verdict = judged(0, 256, tests=1000)
    assert verdict.log10_p == 0.0
    assert verdict.forgery_bits == 0.0


def test_cross_entropy_of_scores() -> None:
    scores = np.array([3.0, -2.0, 0.5])
    found = Reading(np.array([1, 0, 1]), np.array([1, 1, 0]), scores=scores)
    expected = -np.log(1 / (1 + np.exp(-np.array([3.0, -2.0, -0.5])))).mean()
    assert found.cross_entropy == pytest.approx(expected)
    assert evidence(1, 2).cross_entropy is None


# --- a learnt reader: its bits are no evidence, and it must have been measured on siblings

MEASURED = ReaderFacts(siblings=4, threshold=0.05, permuted=256, false_reads=17, quiet_loss=0.001)


UNITS = HiddenUnits({"w": 0}, 12, "shapes")
CHANCE = (
    UnmarkedModel("base", "00" * 32, 0.7, -0.3),
    UnmarkedModel("other", None, 0.65, -1.5),
)


def learnt(
    loss: float = 0.001, worse: int = 1000, reader: ReaderFacts = MEASURED, *,
    quiet: float | None = None, tests: int = 1, test_key: bool = False, null: NullHypothesis | None = None,
    unmarked: tuple[UnmarkedModel, ...] = CHANCE, **terms: Any,
) -> Verdict:  # fmt: skip
    """The verdict on a reading of 128 bits whose loss is lower than that many of 1000 others."""
    expected = np.arange(128, dtype=np.uint8) % 2
    score = -math.log(math.expm1(loss))
    if reader.threshold is not None and reader is not UNHEARD:
        reader = replace(reader, quiet_loss=loss if quiet is None else quiet)
    scores = (2.0 * expected - 1.0) * score
    read = (scores > 0).astype(np.uint8)
    found = Reading(read, expected, committed=False, payload=True, scores=scores, reader=reader)
    losses = np.r_[np.full(1000 - worse, loss / 2), np.full(worse, 2 * loss)]
    ranked = null or PermutedUnits(lambda _: [losses], loss, 1000)
    key = replace(KEY, scheme="independent_network", test_key=test_key)
    given = VerificationOptions(**{"alpha": 1e-3, **terms})
    subject = replace(SUBJECT, readings=tests, hidden_units=UNITS, unmarked=unmarked)
    return judge(found, ranked, subject=subject, key=key, terms=given)


UNHEARD = ReaderFacts(siblings=4, threshold=0.05, permuted=256, false_reads=17)
NONE = ReaderFacts(siblings=0, threshold=None, permuted=256, false_reads=0)
ONE = ReaderFacts(siblings=1, threshold=None, permuted=256, false_reads=0)
DATED: dict[str, Any] = {"assume_dated": True}

LEARNT: list[tuple[dict[str, Any], str, str]] = [
    ({}, "no_verdict", "a reader can be trained afterwards to find any bits in anybody's model"),
    ({**DATED}, "owned", "is present"),
    ({**DATED, "test_key": True}, "no_verdict", "test key"),
    ({**DATED, "test_key": True, "allow_test_key": True}, "owned", "is present"),
    # the rank
    ({**DATED, "worse": 999}, "not_proven", "was not found"),
    ({**DATED, "worse": 999, "alpha": 3e-3}, "owned", "is present"),
    ({**DATED, "alpha": 1e-6}, "no_verdict", "cannot prove anything here"),
    ({**DATED, "tests": 2}, "no_verdict", "cannot prove anything here"),
    ({**DATED, "tests": 2, "alpha": 2e-3}, "owned", "is present"),
    ({"worse": 0}, "not_proven", "was not found"),
    # the siblings
    ({**DATED, "loss": 0.0499}, "owned", "is present"),
    ({**DATED, "loss": 0.0501}, "no_verdict", "may be an unmarked sibling"),
    ({**DATED, "loss": 0.6}, "no_verdict", "its L2 0.6, no unit louder than in that, is not below"),
    ({"loss": 0.6}, "no_verdict", "may be an unmarked sibling"),
    ({**DATED, "quiet": 0.0501}, "no_verdict", "its L2 0.0501, no unit louder than in that"),
    ({**DATED, "loss": 0.6, "quiet": 0.0499}, "no_verdict", "does not tell the suspect"),
    # the examiner's unmarked models
    ({**DATED, "unmarked": ()}, "no_verdict", "only the owner's word says"),
    ({**DATED, "unmarked": CHANCE[:1]}, "owned", "the supplied model is unmarked (the examiner's"),
    (
        {**DATED, "unmarked": (*CHANCE, UnmarkedModel("c", None, 0.3, -3))},
        "no_verdict",
        "also finds its mark in unmarked models: in 1 of 3, such as c with L2 0.3",
    ),
    (
        {**DATED, "loss": 0.04, "unmarked": (*CHANCE, UnmarkedModel("c", None, 0.39, -1))},
        "no_verdict",
        "does not tell the suspect from unmarked models: in 1 of 3",
    ),
    ({"unmarked": (), "worse": 0}, "not_proven", "was not found"),
    ({**DATED, "loss": math.log(2)}, "not_proven", "knows nothing has ln 2"),
    ({**DATED, "quiet": 0.7}, "not_proven", "knows nothing has ln 2"),
    ({**DATED, "reader": UNHEARD}, "no_verdict", "does not say how loud that is"),
    ({**DATED, "loss": 0.6, "worse": 0}, "not_proven", "was not found"),
    ({**DATED, "reader": NONE}, "no_verdict", "on 0 held-out unmarked siblings, and a threshold"),
    ({**DATED, "reader": ONE}, "no_verdict", "on 1 held-out unmarked siblings, and a threshold"),
    ({"reader": NONE}, "no_verdict", "no copy can be told from a sibling"),
    ({**DATED, "reader": NONE, "worse": 0}, "not_proven", "was not found"),
]


@pytest.mark.parametrize(("given", "outcome", "said"), LEARNT, ids=range(len(LEARNT)))
def test_decisions_on_a_learnt_reader(given: dict[str, Any], outcome: str, said: str) -> None:
    verdict = learnt(**given)
    assert (verdict.outcome, said in verdict.reason) == (outcome, True), verdict.reason
    assert verdict.exit_code == {"owned": 0, "not_proven": 1, "no_verdict": 3}[outcome]
    assert verdict.forgery_bits == 0


@pytest.mark.parametrize("worse", [1000, 999, 995])
def test_no_rank_makes_up_for_a_sibling(worse: int) -> None:
    verdict = learnt(0.3, worse, alpha=0.5, assume_dated=True)
    assert (verdict.outcome, verdict.log10_p) == ("no_verdict", pytest.approx(
        math.log10((1001 - worse) / 1001)
    ))  # fmt: skip


def test_people_are_told_of_the_reader() -> None:
    said = learnt(assume_dated=True).explain()
    for line in (
        "L2            0.001 nats a bit, measured here; ln 2 = 0.693 knows nothing",
        "units         axis 0 of w: 12 hidden units, as shown by the suspect's shapes",
        "siblings, threshold and loudness are the owner's word",
        "unmarked      2 supplied by the examiner, L2 0.65 to 0.7; the suspect has rank 1 of 3",
        "2 support no rank below 1/3 = 0.33",
        "siblings      L2 must be below 0.05, set on 4 held-out unmarked siblings; one passes with",
        "false reads   17 of 256 hidden-unit permutations of the suspect read at least as many",
        "null          permuted_units: on a model trained independently",
        "forgery_bits  0.0 (an undated key needs 80)",
        "the number of matching bits, its interval and the payload are no evidence by themselves",
        "only the supplied unmarked models and the owner's sibling threshold speak",
        "the key is older than the suspect is the owner's own statement",
    ):
        assert line in said
    assert "published" not in said
    assert "siblings      1 held-out, by the owner's word: too few" in learnt(reader=ONE).explain()
    unheard = learnt(reader=UNHEARD).explain()
    assert "siblings      the key does not say how loud the marked model is" in unheard
    assert "L2 " not in CASES["perfect"].explain()


@pytest.mark.parametrize(("loss", "met"), [(0.001, "met"), (0.0999, "met"), (0.2, "not met")])
def test_the_published_criterion_is_shown_and_refused(loss: float, met: str) -> None:
    reader = ReaderFacts(4, 0.05, 256, 256, published=0.1)
    said = learnt(loss, reader=reader).explain()
    line = f"published     L2 <= 0.1: {met}; refused as proof, the rank of L2 is judged instead"
    assert line in said


def test_machines_are_told_of_the_reader() -> None:
    told = learnt(reader=ReaderFacts(4, 0.05, 256, 17, published=0.1), assume_dated=True).to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["loss"] == pytest.approx(0.001)
    assert told["reader"] == {
        "siblings": 4, "threshold": 0.05, "permuted": 256, "false_reads": 17,
        "quiet_loss": pytest.approx(0.001), "published": 0.1,
    }  # fmt: skip
    assert (told["null"], told["forgery_bits"]) == ("permuted_units", 0)
    assert len(told["limits"]) == 8
    assert told["hidden_units"] == {
        "axes": {"w": 0}, "size": 12, "shown_by": "shapes", "refused": None,
    }  # fmt: skip
    assert (told["unmarked"]["rank"], told["unmarked"]["floor"]) == (1, pytest.approx(1 / 3))
    linear = CASES["perfect"].to_json()
    assert (linear["loss"], linear["reader"]) == (None, None)


def test_a_limit_of_permutations_is_not_said_of_unmarked_models() -> None:
    others = UnmarkedModels(np.array([0.5, 0.6]))
    limits = learnt(null=others, alpha=0.5).limits
    assert not any("trained independently" in limit for limit in limits)
    assert any("no evidence by themselves" in limit for limit in limits)


@pytest.mark.parametrize("scores", [np.full(128, 1e308), np.full(128, -1e308), np.zeros(128)])
def test_extreme_scores_give_finite_json(scores: Any) -> None:
    expected = np.arange(128, dtype=np.uint8) % 2
    read = (scores > 0).astype(np.uint8)
    found = Reading(read, expected, committed=False, scores=scores / 128, reader=MEASURED)
    null = PermutedUnits(lambda _: [np.full(99, 1e308)], 1.0, 99)
    verdict = judge(found, null, subject=SUBJECT, key=KEY, terms=VerificationOptions(alpha=0.1))
    assert verdict.outcome == "not_proven"  # half of the bits are wrong, or nothing is known
    json.dumps(verdict.to_json(), allow_nan=False)
    assert "nan" not in verdict.explain()


# --- triggers whose labels are no keyed random output: a rank among unmarked models, and a date

MISSES = np.array([8.0, 14, 30, 30, 30, 30, 30, 30, 30])  # of 32, by nine unmarked models


def published(
    matched: int = 31, misses: Any = MISSES, *, examiners: bool = True, **terms: Any
) -> Verdict:
    read = np.where(np.arange(32) < matched, 0, 1)
    found = Reading(
        read, np.zeros(32, dtype=np.int64), committed=False, choices=10, unit="triggers"
    )
    key = replace(KEY, scheme="deepstego")
    given = VerificationOptions(**{"alpha": 0.1, **terms})
    unmarked = tuple(UnmarkedModel("n", None, each) for each in misses) if examiners else ()
    subject = replace(SUBJECT, unmarked=unmarked)
    return judge(found, UnmarkedModels(misses), subject=subject, key=key, terms=given)


PUBLISHED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "no_verdict", "a key can be made afterwards to which anybody's model gives such"),
    ({**DATED}, "owned", "is present"),
    ({**DATED, "matched": 25}, "owned", "is present"),
    ({**DATED, "matched": 24}, "not_proven", "was not found"),
    ({**DATED, "matched": 15, "misses": np.full(9, 32.0)}, "not_proven", "was not found"),
    ({**DATED, "matched": 2}, "not_proven", "was not found"),
    ({**DATED, "matched": 24, "alpha": 0.2}, "owned", "is present"),
    (
        {**DATED, "alpha": 0.09},
        "no_verdict",
        "a rank before all 9 unmarked models that you supplied",
    ),
    (
        {**DATED, "alpha": 0.09, "examiners": False},
        "no_verdict",
        "all 9 unmarked models in the key",
    ),
    ({**DATED, "examiners": False}, "no_verdict", "only the owner's word says"),
    ({**DATED, "examiners": False, "matched": 2}, "not_proven", "was not found"),
    ({**DATED, "alpha": 1e-6}, "no_verdict", "gives log10 p -1.00, above the threshold -6.00"),
    ({**DATED, "matched": 32, "misses": np.zeros(0)}, "no_verdict", "on no unmarked models"),
    ({**DATED, "matched": 32, "misses": np.zeros(9)}, "not_proven", "was not found"),
]


@pytest.mark.parametrize(("given", "outcome", "said"), PUBLISHED, ids=range(len(PUBLISHED)))
def test_decisions_on_triggers_of_the_published_kind(
    given: dict[str, Any], outcome: str, said: str
) -> None:
    verdict = published(**given)
    assert (verdict.outcome, said in verdict.reason) == (outcome, True), verdict.reason
    assert verdict.forgery_bits == 0


@pytest.mark.parametrize("matched", [0, 16, 32])
def test_no_trigger_accuracy_proves_anything_at_the_usual_alpha(matched: int) -> None:
    for misses in (MISSES, np.full(998, 32.0)):
        verdict = published(matched, misses, alpha=ALPHA, assume_dated=True)
        assert verdict.outcome == "no_verdict"
        assert verdict.floor == pytest.approx(-math.log10(len(misses) + 1))


def test_people_are_told_of_trigger_accuracy_and_of_its_rank() -> None:
    said = published(assume_dated=True).explain()
    for line in (
        "matched       31 of 32 triggers",
        "published     trigger accuracy 0.9688: refused as proof, its rank among unmarked models",
        "threshold -1.00, floor -1.00",
        "null          unmarked_models: the suspect's loss, or its misses among the triggers",
        "a rank among 9 unmarked models that the examiner supplied",
        "it is never below 1/10, and speaks of models like them",
        "these triggers and answers are no keyed random output",
        "can train them out",
    ):
        assert line in said
    assert "unmarked_models" not in CASES["perfect"].explain()


def test_the_command_line_has_the_same_threshold() -> None:
    from countermark.cli import options
    from countermark.results.verdict import ALPHA

    assert options.ALPHA == ALPHA
