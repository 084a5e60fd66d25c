"""The arithmetic of verdicts against exact integers, scipy, textbooks and simulation."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from countermark.results import statistics

LOG10_2 = math.log10(2.0)


def exact_tails(n: int, p: Fraction) -> list[Fraction]:
    """P[Bin(n, p) ≥ k] for k = 0..n in integers: Σ C(n,i) aⁱ (b−a)ⁿ⁻ⁱ / bⁿ for p = a/b."""
    a, b = p.numerator, p.denominator
    ways = [math.comb(n, i) * a**i * (b - a) ** (n - i) for i in range(n + 1)]
    return [Fraction(total, b**n) for total in accumulate(reversed(ways))][::-1]


def log10_fraction(value: Fraction) -> float:
    """log10 of an exact probability, right even beside 1 and below the smallest float."""
    if value > Fraction(1, 2):
        return math.log1p(-float(1 - value)) / math.log(10.0)
    if value > Fraction(1, 10**300):
        return math.log10(float(value))
    return math.log10(value.numerator) - math.log10(value.denominator)


# --- the binomial tail


@pytest.mark.parametrize(
    "p", [Fraction(1, 2), Fraction(1, 10), Fraction(63, 64), Fraction(1, 1000)]
)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 257])
def test_tail_equals_exact_integers_at_every_k(n: int, p: Fraction) -> None:
    for k, tail in enumerate(exact_tails(n, Fraction(float(p)))):
        expected = log10_fraction(tail)
        assert statistics.compute_log10_binomial_tail(k, n, float(p)) == pytest.approx(
            expected, rel=1e-11
        )


def test_tail_of_a_hundred_thousand_fair_bits_is_right_to_1e_9() -> None:
    """One sweep of exact sums from the top: C(n,i) = C(n,i+1)·(i+1)/(n−i)."""
    n, sampled = 100_000, {99_990, 90_000, 60_000, 51_000, 50_000, 49_000}
    ways, total = 1, 0
    for i in range(n, 48_999, -1):
        total += ways
        if i in sampled:
            expected = log10_fraction(Fraction(total, 2**n))
            assert statistics.compute_log10_binomial_tail(i, n) == pytest.approx(expected, rel=1e-9)
        ways = ways * i // (n - i + 1)


@pytest.mark.parametrize(("n", "p"), [(1000, 0.5), (5000, 0.1), (100_000, 0.001), (100_000, 0.37)])
def test_tail_equals_scipy(n: int, p: float) -> None:
    mean, spread = n * p, math.sqrt(n * p * (1 - p))
    for k in (int(mean + c * spread) for c in (-6, -2, -0.5, 0, 0.5, 2, 6, 12)):
        expected = scipy_stats.binom.logsf(k - 1, n, p) / math.log(10.0)
        found = statistics.compute_log10_binomial_tail(k, n, p)
        # scipy takes the log of a rounded probability, which costs it digits beside 1.
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_tail_below_the_smallest_float() -> None:
    assert statistics.compute_log10_binomial_tail(4096, 4096) == -4096 * LOG10_2
    assert statistics.compute_log10_binomial_tail(4095, 4096) == pytest.approx(
        math.log10(4097) - 4096 * LOG10_2, rel=1e-12
    )


@pytest.mark.parametrize(
    ("k", "n", "p", "expected"),
    [
        (0, 10, 0.5, 0.0),
        (-3, 10, 0.5, 0.0),
        (11, 10, 0.5, -math.inf),
        (1, 10, 0.0, -math.inf),
        (0, 10, 0.0, 0.0),
        (10, 10, 1.0, 0.0),
        (3, 10, 1.0, 0.0),
        (11, 10, 1.0, -math.inf),
        (0, 0, 0.5, 0.0),
        (1, 0, 0.5, -math.inf),
    ],
)
def test_tail_at_the_edges(k: int, n: int, p: float, expected: float) -> None:
    assert statistics.compute_log10_binomial_tail(k, n, p) == expected


@pytest.mark.parametrize(("n", "p"), [(-1, 0.5), (5, -0.1), (5, 1.1), (5, math.nan)])
def test_tail_refuses_what_is_no_binomial(n: int, p: float) -> None:
    with pytest.raises(ValueError, match="binomial"):
        statistics.compute_log10_binomial_tail(0, n, p)


@settings(deadline=None)
@given(n=st.integers(1, 600), p=st.floats(0.001, 0.999))
def test_tail_falls_in_k_and_is_never_above_one(n: int, p: float) -> None:
    tails = [statistics.compute_log10_binomial_tail(k, n, p) for k in range(n + 2)]
    assert tails[0] == 0.0
    assert all(later <= earlier for earlier, later in pairwise(tails))


@settings(deadline=None)
@given(st.data())
def test_fair_tails_mirror_each_other(data: st.DataObject) -> None:
    """P[X ≥ k] + P[X ≥ n−k+1] = 1 for p = ½."""
    n = data.draw(st.integers(1, 3000))
    k = data.draw(st.integers(0, n + 1))
    both = 10 ** statistics.compute_log10_binomial_tail(
        k, n
    ) + 10 ** statistics.compute_log10_binomial_tail(n - k + 1, n)
    assert both == pytest.approx(1.0, abs=1e-12)


# --- the least number of matches


@pytest.mark.parametrize(
    ("n", "least"),
    [
        (256, (154, 167, 176, 200)),
        (512, (292, 311, 324, 358)),
        (1024, (562, 589, 609, 657)),
        (2048, (1095, 1132, 1161, 1230)),
    ],
)
def test_least_matching_bits_of_common_lengths(n: int, least: tuple[int, ...]) -> None:
    alphas = (-3.0, -6.0, -9.0, -64 * LOG10_2)
    assert tuple(statistics.find_least_matches(n, alpha) for alpha in alphas) == least


def test_least_matches_of_ten_classes() -> None:
    assert statistics.find_least_matches(100, -6.0, 0.1) == 28


@pytest.mark.parametrize(("classes", "fewest"), [(2, 20), (10, 6), (100, 3)])
def test_fewest_triggers_that_reach_one_in_a_million(classes: int, fewest: int) -> None:
    """Perfect retention; for 10 and 100 classes p equals 1e-6, so rounding must not add to it."""
    assert statistics.find_least_matches(fewest, -6.0, 1 / classes) == fewest
    assert statistics.find_least_matches(fewest - 1, -6.0, 1 / classes) is None


@settings(deadline=None)
@given(n=st.integers(0, 400), alpha=st.floats(-40.0, 0.0), p=st.floats(0.05, 0.95))
def test_least_matches_is_where_the_tail_crosses(n: int, alpha: float, p: float) -> None:
    """P[X ≥ k] ≤ alpha < P[X ≥ k−1]."""
    least = statistics.find_least_matches(n, alpha, p)
    if least is None:
        assert statistics.compute_log10_binomial_tail(n, n, p) > alpha
    else:
        assert statistics.compute_log10_binomial_tail(least, n, p) <= alpha
        assert least == 0 or statistics.compute_log10_binomial_tail(least - 1, n, p) > alpha


@pytest.mark.parametrize("alpha", [0.001, math.nan])
def test_least_matches_wants_a_log(alpha: float) -> None:
    with pytest.raises(ValueError, match="log10_alpha"):
        statistics.find_least_matches(256, alpha)


# --- intervals

COUNTS = [(0, 1), (1, 1), (0, 50), (1, 50), (25, 50), (50, 50), (7, 300), (4000, 4096), (1, 4096)]


@pytest.mark.parametrize(("k", "n"), COUNTS)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_clopper_pearson_equals_the_beta_quantiles(k: int, n: int, confidence: float) -> None:
    side = (1 - confidence) / 2
    low, high = statistics.compute_clopper_pearson(k, n, confidence)
    assert low == pytest.approx(scipy_stats.beta.ppf(side, k, n - k + 1) if k else 0.0, rel=1e-11)
    wanted = scipy_stats.beta.ppf(1 - side, k + 1, n - k) if k < n else 1.0
    assert high == pytest.approx(wanted, rel=1e-11)


def test_clopper_pearson_known_value() -> None:
    """81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I, method 5."""
    assert statistics.compute_clopper_pearson(81, 263) == pytest.approx((0.2527, 0.3676), abs=5e-5)


def coverage(intervals: list[tuple[float, float]], rate: float) -> float:
    """The probability under Bin(n, rate) that the interval of k holds the rate."""
    n = len(intervals) - 1
    chances = scipy_stats.binom.pmf(range(n + 1), n, rate)
    held = zip(chances, intervals, strict=True)
    return float(sum(chance for chance, (low, high) in held if low <= rate <= high))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 120), rate=st.floats(0.001, 0.999), confidence=st.sampled_from([0.8, 0.95]))
def test_clopper_pearson_covers_at_least_its_confidence(
    n: int, rate: float, confidence: float
) -> None:
    intervals = [statistics.compute_clopper_pearson(k, n, confidence) for k in range(n + 1)]
    assert coverage(intervals, rate) >= confidence - 1e-9


@settings(deadline=None)
@given(st.data())
def test_an_interval_holds_the_observed_rate(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 2000))
    k = data.draw(st.integers(0, n))
    low, high = statistics.compute_clopper_pearson(k, n)
    assert 0.0 <= low <= k / n <= high <= 1.0


@pytest.mark.parametrize(
    ("k", "n", "confidence"), [(0, 0, 0.9), (6, 5, 0.9), (-1, 5, 0.9), (1, 2, 1)]
)
def test_an_interval_refuses_bad_arguments(k: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"expected|count"):
        statistics.compute_clopper_pearson(k, n, confidence)


# --- Holm, empirical and sequential p-values


def test_holm_textbook_example() -> None:
    """p = .01, .04, .03, .005 at four tests give .03, .06, .06, .02."""
    adjusted = statistics.adjust_by_holm([math.log10(p) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [10**value for value in adjusted] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_edges() -> None:
    assert statistics.adjust_by_holm([]) == []
    assert statistics.adjust_by_holm([-7.5]) == [-7.5]
    assert statistics.adjust_by_holm([-math.inf, 0.0]) == [-math.inf, 0.0]
    for wrong in (0.01, math.nan):
        with pytest.raises(ValueError, match="log10 p-value"):
            statistics.adjust_by_holm([-1.0, wrong])


@settings(deadline=None)
@given(st.lists(st.floats(-400.0, 0.0), min_size=1, max_size=30))
def test_holm_laws(log10_ps: list[float]) -> None:
    """p ≤ adjusted ≤ Bonferroni, in the order of p, and the smallest one is Bonferroni's."""
    adjusted, tests = statistics.adjust_by_holm(log10_ps), math.log10(len(log10_ps))
    for before, after in zip(log10_ps, adjusted, strict=True):
        assert before <= after <= min(0.0, before + tests)
    by_p = [after for _, after in sorted(zip(log10_ps, adjusted, strict=True))]
    assert by_p == sorted(by_p)
    assert by_p[0] == min(0.0, min(log10_ps) + tests)


def test_empirical_p_counts_the_suspect_and_has_a_floor() -> None:
    assert (
        statistics.compute_empirical_log10_p(0, 999)
        == -3.0
        == statistics.compute_empirical_log10_floor(999)
    )
    assert statistics.compute_empirical_log10_p(999, 999) == 0.0
    assert statistics.compute_empirical_log10_p(0, 0) == 0.0
    for wrong in (-1, 1000):
        with pytest.raises(ValueError, match="count"):
            statistics.compute_empirical_log10_p(wrong, 999)


def test_empirical_p_is_valid_by_exchangeability() -> None:
    """Whatever rank the suspect has among n + 1 draws, P[p ≤ a] ≤ a."""
    draws = 99
    ps = [10 ** statistics.compute_empirical_log10_p(rank, draws) for rank in range(draws + 1)]
    for alpha in np.linspace(0.001, 1.0, 500):
        assert sum(p <= alpha * (1 + 1e-12) for p in ps) / (draws + 1) <= alpha * (1 + 1e-12)


def test_sequential_p() -> None:
    assert statistics.compute_sequential_log10_p(10, 40, 10) == math.log10(10 / 40)
    assert statistics.compute_sequential_log10_p(3, 999, 10) == math.log10(4 / 1000)
    for exceedances, draws, stop_at in [(11, 40, 10), (0, 40, 0), (5, 4, 10)]:
        with pytest.raises(ValueError, match=r"stop_at|count"):
            statistics.compute_sequential_log10_p(exceedances, draws, stop_at)


def sequential_p_by_draws(rng: np.random.Generator, draws: int, stop_at: int) -> float:
    """One run of the procedure as a user runs it: suspect and draws from the same law."""
    suspect, exceedances = rng.random(), 0
    for drawn in range(1, draws + 1):
        exceedances += int(rng.random() <= suspect)
        if exceedances == stop_at:
            return statistics.compute_sequential_log10_p(exceedances, drawn, stop_at)
    return statistics.compute_sequential_log10_p(exceedances, draws, stop_at)


def test_sequential_p_is_valid_when_simulated() -> None:
    rng = np.random.default_rng(5)
    ps = 10 ** np.array([sequential_p_by_draws(rng, 199, 5) for _ in range(4000)])
    for alpha in (0.01, 0.05, 0.2, 0.5):
        spread = math.sqrt(alpha * (1 - alpha) / len(ps))
        assert np.mean(ps <= alpha + 1e-12) == pytest.approx(alpha, abs=4 * spread)


# --- randomised p-values


@pytest.mark.parametrize(("n", "p"), [(20, 0.5), (256, 0.5), (40, 0.1)])
def test_randomised_p_is_uniform(n: int, p: float) -> None:
    """... where the plain tail is not, which is why it exists."""
    rng = np.random.default_rng(11)
    ks, us = rng.binomial(n, p, 4000), rng.random(4000)
    ps = [
        statistics.compute_randomised_p(int(k), n, float(u), p) for k, u in zip(ks, us, strict=True)
    ]
    assert scipy_stats.kstest(ps, "uniform").pvalue > 0.01
    plain = [10 ** statistics.compute_log10_binomial_tail(int(k), n, p) for k in ks]
    assert scipy_stats.kstest(plain, "uniform").pvalue < 1e-3


@settings(deadline=None)
@given(st.data())
def test_randomised_p_lies_between_the_tails(data: st.DataObject) -> None:
    """u = 1 gives P[X ≥ k], u = 0 gives P[X ≥ k+1]."""
    n = data.draw(st.integers(0, 300))
    k = data.draw(st.integers(0, n))
    for u, tail_from in ((1.0, k), (0.0, k + 1)):
        expected = 10 ** statistics.compute_log10_binomial_tail(tail_from, n, 0.3)
        assert statistics.compute_randomised_p(k, n, u, 0.3) == pytest.approx(
            expected, rel=1e-9, abs=1e-300
        )


@pytest.mark.parametrize(("k", "u", "p"), [(6, 0.5, 0.5), (2, 1.5, 0.5), (2, 0.5, 2.0)])
def test_randomised_p_refuses_bad_arguments(k: int, u: float, p: float) -> None:
    with pytest.raises(ValueError, match=r"must be in|binomial"):
        statistics.compute_randomised_p(k, 5, u, p)


# --- the likelihood ratio


@settings(deadline=None)
@given(st.data())
def test_likelihood_ratio_equals_scipy(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 300))
    k = data.draw(st.integers(0, n))
    rate, p = data.draw(st.floats(0.01, 0.9)), data.draw(st.floats(0.1, 0.9))
    survived = scipy_stats.binom.logpmf(k, n, 1 - rate)
    expected = (survived - scipy_stats.binom.logpmf(k, n, p)) / math.log(10.0)
    found = statistics.compute_log10_likelihood_ratio(k, n, rate, p)
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_likelihood_ratio_edges() -> None:
    assert statistics.compute_log10_likelihood_ratio(256, 256, 0.0) == pytest.approx(256 * LOG10_2)
    assert statistics.compute_log10_likelihood_ratio(255, 256, 0.0) == -math.inf
    assert statistics.compute_log10_likelihood_ratio(1, 256, 1.0) == -math.inf
    assert statistics.compute_log10_likelihood_ratio(100, 256, 0.5) == pytest.approx(0.0, abs=1e-12)
    assert statistics.compute_log10_likelihood_ratio(0, 0, 0.1) == 0.0


@pytest.mark.parametrize(("k", "rate", "p"), [(6, 0.1, 0.5), (2, 1.5, 0.5), (2, 0.1, 0.0)])
def test_likelihood_ratio_refuses_bad_arguments(k: int, rate: float, p: float) -> None:
    with pytest.raises(ValueError, match=r"expected|count"):
        statistics.compute_log10_likelihood_ratio(k, 5, rate, p)
