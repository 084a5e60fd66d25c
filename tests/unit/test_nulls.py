"""The nulls never accuse falsely: simulated, and compared with each other on innocent suspects."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from keys import InMemory
from numpy.typing import NDArray
from readers import drawn_key, fitted_key, gaussian, hosted, network, unmarked_hosts
from scipy import stats
from torch import nn

from countermark.checkpoints import Array
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.results.null_hypotheses import FairCoin, FreshKeys, PermutedUnits, UnmarkedModels
from countermark.results.reading import ReaderFacts, Reading
from countermark.results.statistics import compute_randomised_sequential_p
from countermark.results.verdict import Verdict, VerificationOptions
from countermark.schemes import load_scheme
from countermark.schemes.learnt_reader import SIBLINGS, THRESHOLD
from countermark.schemes.uchida.scheme import Uchida
from countermark.verification.verify import examine, verify


def evidence(matched: int) -> Reading:
    """Evidence of 256 bits with that many matches."""
    expected = np.zeros(256, dtype=np.uint8)
    return Reading((np.arange(256) >= matched).astype(np.uint8), expected)


def ranked(matched: int, others: list[int], draws: int, stop_at: int = 10) -> tuple[float, int]:
    """p of a key with that many matches among the others, and how many were drawn."""
    source = iter(others)
    null = FreshKeys(redraw=lambda: next(source), draws=draws, stop_at=stop_at)
    p = 10 ** null.compute_log10_p(evidence(matched))
    return p, len(others) - len(list(source))


@pytest.mark.parametrize(
    ("others", "p", "drawn"),
    [
        ([100] * 99, 1 / 100, 99),
        ([200] + [100] * 98, 2 / 100, 99),
        ([150] + [100] * 98, 2 / 100, 99),  # a tie counts against the owner
        ([149] + [100] * 98, 1 / 100, 99),
        ([200] * 9 + [100] * 90, 10 / 100, 99),
        ([200] * 10, 1.0, 10),
        ([100] * 40 + [200] * 10 + [100] * 49, 10 / 50, 50),
        ([100] * 89 + [200] * 10, 10 / 99, 99),
    ],
)
def test_rank_among_fresh_keys(others: list[int], p: float, drawn: int) -> None:
    assert ranked(150, others, 99) == (pytest.approx(p), drawn)


@pytest.mark.parametrize("stop_at", [1, 3, 10])
def test_stopping_early_never_makes_p_too_small(stop_at: int) -> None:
    """On an innocent suspect P[p ≤ a] ≤ a for every a: the owner's key is one of many."""
    random, runs, draws = np.random.default_rng(5), 4000, 199
    matches = random.binomial(256, 0.5, size=(runs, draws + 1)).tolist()
    ps = np.array([ranked(own, others, draws, stop_at)[0] for own, *others in matches])
    for a in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9):
        at_most = int(np.count_nonzero(ps <= a + 1e-12))
        assert stats.binomtest(at_most, runs, a, alternative="greater").pvalue > 1e-4
    assert ps.mean() < 0.56 + 0.5 / stop_at  # and not much too large


def test_stopping_early_saves_draws() -> None:
    others = np.random.default_rng(6).binomial(256, 0.5, size=1999).tolist()
    p, drawn = ranked(128, others, 1999)
    assert drawn < 60
    assert p > 0.1


def short_key(seed: int) -> Key:
    """A key of 64 bits without the test flag, although its secret comes from a number."""
    material = KeyMaterial.from_test_seed(seed)
    with pytest.warns(UserWarning, match="without a dated claim"):
        return Uchida(layer="w", bits=64).generate_key(
            {"w": (8, 8)}, owner="A", material=KeyMaterial(material.secret, material.nonce)
        )


def lopsided(seed: int) -> NDArray[np.float32]:
    """Innocent weights of one sign and of very different sizes: as unlike noise as can be."""
    return np.random.default_rng(seed).lognormal(0, 3, (8, 8)).astype(np.float32)


def redraw(key: Key, weights: NDArray[np.float32]) -> Callable[[], int]:
    """Matches of one key after another, each from its own number: these tests cannot flicker."""
    numbers, scheme = count(1000), load_scheme(key)

    def matched() -> int:
        fresh = replace(key, material=KeyMaterial.from_test_seed(next(numbers)))
        return scheme.extract({"w": weights}, fresh).match_count

    return matched


@pytest.mark.parametrize("seed", range(4))
def test_fresh_keys_agree_with_the_fair_coin_on_an_innocent(seed: int) -> None:
    key, weights, draws = short_key(seed), lopsided(seed), 1000
    found = load_scheme(key).extract({"w": weights}, key)
    coin = 10 ** FairCoin().compute_log10_p(found)
    fresh = 10 ** FreshKeys(redraw(key, weights), draws, stop_at=draws + 1).compute_log10_p(found)
    exceeding = round(fresh * (draws + 1)) - 1
    assert stats.binomtest(exceeding, draws, coin).pvalue > 0.001


def test_matches_of_fresh_keys_are_binomial_on_any_weights() -> None:
    draw = redraw(short_key(1), lopsided(1))
    counts = np.bincount([draw() for _ in range(2000)], minlength=65)
    expected = 2000 * stats.binom.pmf(np.arange(65), 64, 0.5)
    middle = slice(22, 43)  # the tails are joined, so that every bin expects enough
    joined = [
        np.array([side[: middle.start].sum(), *side[middle], side[middle.stop :].sum()])
        for side in (counts, expected)
    ]
    assert stats.chisquare(*joined).pvalue > 0.001


def test_verify_ranks_the_key_among_fresh_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count(1000)
    monkeypatch.setattr(KeyMaterial, "generate", lambda: KeyMaterial.from_test_seed(next(numbers)))
    key, weights = short_key(2), lopsided(2)
    suspect, terms = InMemory({"w": weights}), VerificationOptions(alpha=0.01)
    verdict = examine(suspect, key, terms, null="fresh_keys")
    expected = FreshKeys(redraw(key, weights))
    found = load_scheme(key).extract({"w": weights}, key)
    assert (verdict.outcome, verdict.null) == ("not_proven", "fresh_keys")
    assert verdict.log10_p == expected.compute_log10_p(found)


def test_a_floor_above_alpha_is_no_verdict_for_fresh_keys() -> None:
    key, suspect = short_key(1), InMemory({"w": lopsided(1)})
    verdict = verify(suspect, key, null="fresh_keys")
    assert (verdict.outcome, verdict.floor) == ("no_verdict", pytest.approx(-math.log10(2000)))
    assert "cannot prove anything" in verdict.reason


def test_an_unknown_null_is_refused() -> None:
    key, suspect = short_key(1), InMemory({"w": lopsided(1)})
    with pytest.raises(ConfigError, match="expected fair_coin or fresh_keys"):
        verify(suspect, key, null="coin")


# --- a learnt reader, ranked among permutations of the suspect


def in_batches(losses: list[float], *sizes: int) -> Callable[[int], Iterator[NDArray[np.float64]]]:
    """Losses as a rank draws them, in batches of these sizes and a rest."""

    def drawn(draws: int) -> Iterator[NDArray[np.float64]]:
        assert draws == len(losses)
        yield from np.split(np.array(losses), np.cumsum(sizes))

    return drawn


@pytest.mark.parametrize("sizes", [(), (1, 1), (50, 30), (40,), (41,), (49, 50)])
@pytest.mark.parametrize(
    ("losses", "p"),
    [
        ([0.5] * 99, 1 / 100),
        ([0.05] + [0.5] * 98, 2 / 100),
        ([0.1] + [0.5] * 98, 2 / 100),  # a tie counts against the owner
        ([0.5] * 98 + [0.1], 2 / 100),
        ([0.05] * 9 + [0.5] * 90, 10 / 100),
        ([0.05] * 99, 1.0),
        ([0.5] * 40 + [0.05] * 10 + [0.5] * 49, 10 / 50),
        ([0.5] * 40 + [0.05] * 59, 10 / 50),
        ([0.5] * 89 + [0.05] * 10, 10 / 99),
    ],
)
def test_rank_among_permutations(losses: list[float], p: float, sizes: tuple[int, ...]) -> None:
    null = PermutedUnits(in_batches(losses, *sizes), 0.1, 99)
    assert 10 ** null.compute_log10_p(evidence(0)) == pytest.approx(p)
    assert 10 ** null.compute_log10_floor(evidence(0)) == pytest.approx(1 / 100)


def test_nothing_is_read_after_the_rank_has_stopped() -> None:
    def losses(_: int) -> Iterator[NDArray[np.float64]]:
        yield np.zeros(10)
        raise AssertionError("the next batch was asked for")

    assert PermutedUnits(losses, 0.1, 1000).compute_log10_p(evidence(0)) == 0.0


READERS = {"drawn": drawn_key(), "of another model": fitted_key(gaussian(10_000))}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("stop_at", [10, 100])
def test_ranks_are_uniform_on_innocents(name: str, stop_at: int) -> None:
    """Exactly, once spread over their atoms: suspects whose units were drawn alike."""
    key, scheme, draws, runs = READERS[name], network(), 99, 600
    spread = np.random.default_rng(7).random(runs)
    ps, spread_ps = [], []
    for number, u in enumerate(spread):
        null = scheme.nulls(gaussian(number), key, draws)["permuted_units"]
        assert isinstance(null, PermutedUnits)
        counts = replace(null, stop_at=stop_at).count_exceedances()
        ps.append(10 ** replace(null, stop_at=stop_at).compute_log10_p(evidence(0)))
        spread_ps.append(compute_randomised_sequential_p(*counts, stop_at, u))
    assert stats.kstest(spread_ps, "uniform").pvalue > 1e-3
    for a in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9):
        at_most = int(np.count_nonzero(np.array(ps) <= a + 1e-12))
        assert stats.binomtest(at_most, runs, a, alternative="greater").pvalue > 1e-4


def test_a_reader_made_afterwards_finds_its_bits_and_ranks_first() -> None:
    """Which is why the bits are no evidence, and why such a key needs a date."""
    suspect = gaussian(3)
    verdict = verify(hosted(suspect), fitted_key(suspect), alpha=1e-3, unmarked=unmarked_hosts())
    assert (verdict.matched, verdict.forgery_bits, verdict.outcome) == (128, 0, "no_verdict")
    assert verdict.log10_p == pytest.approx(-math.log10(1001))
    assert "a dated claim is needed" in verdict.reason


def test_alpha_says_how_many_permutations_are_drawn() -> None:
    suspect = gaussian(3)
    key = fitted_key(suspect)
    for alpha, floor in ((1e-2, 101), (1e-3, 1001), (0.3, 5)):
        verdict = verify(
            hosted(suspect), key, alpha=alpha, assume_dated=True, unmarked=unmarked_hosts()
        )
        assert (verdict.outcome, verdict.test_count) == ("owned", 1)
        assert verdict.log10_p == verdict.floor == pytest.approx(-math.log10(floor))


def test_each_arrangement_asks_for_as_many_permutations_again() -> None:
    suspect = gaussian(3)
    renamed = nn.Sequential(OrderedDict(x=nn.Linear(8, 12), y=nn.ReLU(), z=nn.Linear(12, 3)))
    renamed.x.weight.data = torch.from_numpy(suspect["a"])
    for number in (4, 5):
        renamed.register_buffer(f"decoy{number}", torch.from_numpy(gaussian(number)["a"]))
    key = fitted_key(suspect)
    verdict = verify(renamed, key, alpha=1e-2, assume_dated=True, unmarked=unmarked_hosts())
    assert (verdict.outcome, verdict.test_count) == ("owned", 3)
    assert verdict.subject.tensors == {"a": "x.weight"}
    assert verdict.floor == pytest.approx(-math.log10(301))
    assert verdict.log10_p == pytest.approx(math.log10(3 / 301))


@pytest.mark.parametrize("most", [10, 98, 99, 100, 500])
def test_more_permutations_than_allowed_are_no_verdict(most: int) -> None:
    suspect = gaussian(3)
    key = fitted_key(suspect, most_permutations=most)
    verdict = verify(hosted(suspect), key, alpha=1e-3, assume_dated=True)
    assert verdict.outcome == "no_verdict"
    assert "cannot prove anything here" in verdict.reason
    assert verdict.floor == pytest.approx(-math.log10(1 + min(most, 256)))
    enough = verify(hosted(suspect), key, alpha=1e-2, assume_dated=True, unmarked=unmarked_hosts())
    assert enough.outcome == ("owned" if most >= 99 else "no_verdict")


# --- a learnt reader, ranked among unmarked models


def read_with_loss(loss: float) -> Reading:
    """Evidence of one bit whose cross-entropy is this."""
    score = -math.log(math.expm1(loss))
    one = np.ones(1, dtype=np.uint8)
    return Reading(one, one, scores=np.array([score]), reader=ReaderFacts(4, 0.05, 256, 0))


@pytest.mark.parametrize(
    ("losses", "p"),
    [([0.5, 0.6, 0.7, 0.8], 1 / 5), ([0.05, 0.6, 0.7, 0.8], 2 / 5), ([0.01] * 4, 1.0), ([], 1.0)],
)
def test_rank_among_unmarked_models(losses: list[float], p: float) -> None:
    null = UnmarkedModels(np.array(losses))
    assert 10 ** null.compute_log10_p(read_with_loss(0.1)) == pytest.approx(p)
    assert 10 ** null.compute_log10_floor(read_with_loss(0.1)) == pytest.approx(
        1 / (1 + len(losses))
    )


def answered(matched: int, triggers: int = 20) -> Reading:
    """Answers to triggers of ten classes, so many of them as expected."""
    read = np.where(np.arange(triggers) < matched, 0, 1)
    return Reading(read, np.zeros(triggers, dtype=np.int64), choices=10, unit="triggers")


@pytest.mark.parametrize(
    ("matched", "p"),
    [(20, 1 / 5), (15, 1 / 5), (13, 2 / 5), (12, 2 / 5), (10, 2 / 5), (9, 1.0), (0, 1.0)],
)
def test_triggers_rank_by_their_misses(matched: int, p: float) -> None:
    null = UnmarkedModels(np.array([7.0, 12, 12, 16]))  # of 20: the first gets 13 right
    assert 10 ** null.compute_log10_p(answered(matched)) == pytest.approx(p)


def test_what_models_are_ranked_by() -> None:
    assert answered(13).mark_distance == 7
    assert read_with_loss(0.1).mark_distance == pytest.approx(0.1)
    assert evidence(256).mark_distance is None


def test_a_reading_without_scores_ranks_last() -> None:
    assert UnmarkedModels(np.array([0.5, 0.6])).compute_log10_p(evidence(256)) == 0.0


def test_unmarked_models_never_exceed_their_level() -> None:
    random, runs = np.random.default_rng(8), 3000
    drawn = random.random((runs, 10))
    ps = np.array(
        [10 ** UnmarkedModels(each[1:]).compute_log10_p(read_with_loss(each[0])) for each in drawn]
    )
    for a in (0.1, 0.2, 0.5, 0.9):
        at_most = int(np.count_nonzero(ps <= a + 1e-12))
        assert stats.binomtest(at_most, runs, a).pvalue > 1e-4


def test_a_few_unmarked_models_prove_little() -> None:
    suspect, stranger = gaussian(3), gaussian(4)
    key = fitted_key(suspect)
    key = replace(key, learnt={**key.learnt, SIBLINGS: np.array([0.6, 0.7, 0.8, 0.9])})

    def judged(weights: Mapping[str, Array], alpha: float, models: int = 4) -> Verdict:
        unmarked = unmarked_hosts(models)
        return verify(
            InMemory(weights), key, alpha=alpha, assume_dated=True, null="unmarked_models",
            unmarked=unmarked,
        )  # fmt: skip

    assert judged(suspect, 1e-6).outcome == "no_verdict"
    assert judged(suspect, 0.19).outcome == "no_verdict"
    assert judged(suspect, 0.2).outcome == "owned"
    assert judged(stranger, 0.2).outcome == "not_proven"
    owners = judged(suspect, 0.2, 0)
    assert (owners.outcome, owners.log10_p) == ("no_verdict", pytest.approx(math.log10(0.2)))
    assert "only the owner's word" in owners.reason


def test_without_unmarked_models_there_is_no_rank_among_them() -> None:
    key = drawn_key()
    bare = {n: each for n, each in key.learnt.items() if n not in (SIBLINGS, THRESHOLD)}
    with pytest.raises(ConfigError, match=r"expected permuted_units$"):
        verify(InMemory(gaussian(3)), replace(key, learnt=bare), null="unmarked_models")
    with pytest.raises(ConfigError, match=r"expected permuted_units or unmarked_models$"):
        verify(InMemory(gaussian(3)), key, null="fair_coin")
