"""The nulls never accuse falsely: simulated, and compared with each other on innocent suspects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from keys import InMemory
from numpy.typing import NDArray
from scipy import stats

from countermark.errors import ConfigError
from countermark.examine import examine, verify
from countermark.key import Key, KeyMaterial
from countermark.nulls import Evidence, FairCoin, FreshKeys
from countermark.schemes import scheme_of
from countermark.schemes.uchida import Uchida
from countermark.verdict import Terms


def evidence(matched: int) -> Evidence:
    """Evidence of 256 bits with that many matches."""
    expected = np.zeros(256, dtype=np.uint8)
    return Evidence((np.arange(256) >= matched).astype(np.uint8), expected)


def ranked(matched: int, others: list[int], draws: int, stop_at: int = 10) -> tuple[float, int]:
    """p of a key with that many matches among the others, and how many were drawn."""
    source = iter(others)
    null = FreshKeys(redraw=lambda: next(source), draws=draws, stop_at=stop_at)
    p = 10 ** null.log10_p(evidence(matched))
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
    material = KeyMaterial.for_tests(seed)
    with pytest.warns(UserWarning, match="without a dated claim"):
        return Uchida(layer="w", bits=64).generate_key(
            {"w": (8, 8)}, owner="A", material=KeyMaterial(material.secret, material.nonce)
        )


def lopsided(seed: int) -> NDArray[np.float32]:
    """Innocent weights of one sign and of very different sizes: as unlike noise as can be."""
    return np.random.default_rng(seed).lognormal(0, 3, (8, 8)).astype(np.float32)


def redraw(key: Key, weights: NDArray[np.float32]) -> Callable[[], int]:
    """Matches of one key after another, each from its own number: these tests cannot flicker."""
    numbers, scheme = count(1000), scheme_of(key)

    def matched() -> int:
        fresh = replace(key, material=KeyMaterial.for_tests(next(numbers)))
        return scheme.extract({"w": weights}, fresh).matched

    return matched


@pytest.mark.parametrize("seed", range(4))
def test_fresh_keys_agree_with_the_fair_coin_on_an_innocent(seed: int) -> None:
    key, weights, draws = short_key(seed), lopsided(seed), 1000
    found = scheme_of(key).extract({"w": weights}, key)
    coin = 10 ** FairCoin().log10_p(found)
    fresh = 10 ** FreshKeys(redraw(key, weights), draws, stop_at=draws + 1).log10_p(found)
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
    monkeypatch.setattr(KeyMaterial, "fresh", lambda: KeyMaterial.for_tests(next(numbers)))
    key, weights = short_key(2), lopsided(2)
    suspect, terms = InMemory({"w": weights}), Terms(alpha=0.01)
    verdict = examine(suspect, key, terms, null="fresh_keys")
    expected = FreshKeys(redraw(key, weights))
    found = scheme_of(key).extract({"w": weights}, key)
    assert (verdict.outcome, verdict.null) == ("not_proven", "fresh_keys")
    assert verdict.log10_p == expected.log10_p(found)


def test_a_floor_above_alpha_is_no_verdict_for_fresh_keys() -> None:
    key, suspect = short_key(1), InMemory({"w": lopsided(1)})
    verdict = verify(suspect, key, null="fresh_keys")
    assert (verdict.outcome, verdict.floor) == ("no_verdict", pytest.approx(-math.log10(2000)))
    assert "cannot prove anything" in verdict.reason


def test_an_unknown_null_is_refused() -> None:
    key, suspect = short_key(1), InMemory({"w": lopsided(1)})
    with pytest.raises(ConfigError, match="expected fair_coin or fresh_keys"):
        verify(suspect, key, null="coin")
