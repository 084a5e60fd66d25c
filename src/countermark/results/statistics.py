"""Statistics of a verdict: binomial tails, intervals and corrections. Pure functions on numpy.

Every p-value is kept as its log10, because a p-value that convicts is often smaller than the
smallest float. Bad arguments are mistakes of the calling code and raise ValueError; they never
come from a suspect.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_LN10 = math.log(10.0)
_HALVINGS = 60  # of an interval inside [0, 1]: past the last bit of a float
_NEGLIGIBLE = 60.0  # a term e⁻⁶⁰ of the largest does not reach the last bit of a sum


def compute_log10_binomial_tail(k: int, n: int, p: float = 0.5) -> float:
    """Compute log10 P[X ≥ k] for X ~ Bin(n, p): the chance of k or more matches by coincidence.

    P[X ≥ k] = Σ_{i≥k} C(n,i) pⁱ (1−p)ⁿ⁻ⁱ, summed in logs on the side of the mean that k is on
    (the other side is its complement), so small tails and tails near 1 keep their digits:
    the relative error of the log10 stays below 1e-9 for n up to 1e5. P[X ≥ n] is n·log10 p itself.

    Returns:
        A number ≤ 0; 0.0 for k ≤ 0 and −inf for an impossible event.

    Raises:
        ValueError: n is negative or p is outside [0, 1].
    """
    _check_binomial(n, p)
    if k <= 0:
        return 0.0
    if k > n or p == 0.0:
        return -math.inf
    return _compute_log10_tail(k, p, _cached_log_pmf(n, p))


def find_least_matches(n: int, log10_alpha: float, p: float = 0.5) -> int | None:
    """Find the least k with P[Bin(n, p) ≥ k] ≤ alpha: the matches out of n needed to convict.

    P[X ≥ k] ≤ alpha < P[X ≥ k−1]; for n = 256 fair bits and alpha = 1e-6 it is 167.

    Returns:
        A count from 0 to n, or None if even n matches of n are too probable.

    Raises:
        ValueError: n is negative, p is outside [0, 1] or alpha above 1.
    """
    if not log10_alpha <= 0.0:
        raise ValueError(f"log10_alpha must be 0 or less, not {log10_alpha!r}")
    _check_binomial(n, p)
    # The tail falls with k, so the condition is false up to some k and true from there on.
    found = bisect_left(
        range(n + 1), True, key=lambda k: compute_log10_binomial_tail(k, n, p) <= log10_alpha
    )
    return found if found <= n else None


def compute_clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the exact confidence interval for the rate behind k successes in n trials.

    Its ends are P_low[X ≥ k] = P_high[X ≤ k] = (1 − confidence)/2, found by bisection:
    relative error below 1e-11. The coverage is at least the confidence for every rate.
    C. J. Clopper and E. S. Pearson, Biometrika 26 (1934).

    Raises:
        ValueError: k is not in 0..n, n is 0 or confidence not inside (0, 1).
    """
    _check_interval(k, n, confidence)
    # The upper limit for k successes is one minus the lower limit for n − k failures.
    log10_side = math.log10((1.0 - confidence) / 2.0)
    return _find_lower_limit(k, n, log10_side), 1.0 - _find_lower_limit(n - k, n, log10_side)


def adjust_by_holm(log10_ps: Sequence[float]) -> list[float]:
    """Correct m p-values for m tests by Holm's step-down method.

    adjusted_(i) = max_{j≤i} min(1, (m − j + 1)·p_(j)) over the sorted p_(1) ≤ … ≤ p_(m); for any
    dependence between the tests, P[any false rejection] ≤ alpha. S. Holm, Scand. J. Statist. 6
    (1979).

    Returns:
        The adjusted log10 p-values, each ≤ 0, in the order of the input.

    Raises:
        ValueError: a log10 p-value is above 0 or not a number.
    """
    if not all(value <= 0.0 for value in log10_ps):
        raise ValueError(f"every log10 p-value must be 0 or less, not {list(log10_ps)!r}")
    tests, reached = len(log10_ps), -math.inf
    adjusted = [0.0] * tests
    for rank, index in enumerate(sorted(range(tests), key=log10_ps.__getitem__)):
        # Step-down: an adjusted value must not be smaller than the one before it.
        reached = max(reached, min(0.0, log10_ps[index] + math.log10(tests - rank)))
        adjusted[index] = reached
    return adjusted


def compute_empirical_log10_p(exceedances: int, draws: int) -> float:
    """Compute log10 of p = (1 + r)/(1 + n): r of n null draws are as extreme as the suspect.

    The suspect counts as one of the draws, so P[p ≤ a] ≤ a holds exactly and p is never 0.

    Raises:
        ValueError: r is not in 0..n.
    """
    _check_count(exceedances, draws)
    return math.log10((1 + exceedances) / (1 + draws))


def compute_empirical_log10_floor(draws: int) -> float:
    """Compute log10 of 1/(1 + n), the smallest p-value that n draws support.

    Raises:
        ValueError: n is negative.
    """
    return compute_empirical_log10_p(0, draws)


def compute_sequential_log10_p(exceedances: int, draws: int, stop_at: int) -> float:
    """Compute log10 p of draws that stop at the stop_at-th exceedance, or else at a fixed n.

    p = r/l if the r-th exceedance came with draw l, (1 + r)/(1 + n) if all n were drawn. Valid,
    P[p ≤ a] ≤ a, if stop_at and n were fixed before. Besag and Clifford, Biometrika 78 (1991).

    Raises:
        ValueError: the exceedances are not in 0..draws or above stop_at, or stop_at is below 1.
    """
    _check_count(exceedances, draws)
    if stop_at < 1 or exceedances > stop_at:
        raise ValueError(f"stop_at must be 1 or more and {exceedances} at least, not {stop_at}")
    if exceedances == stop_at:
        # Not (1 + r)/(1 + l): the stopping draw is itself an exceedance (Besag and Clifford 1991).
        return math.log10(exceedances / draws)
    return compute_empirical_log10_p(exceedances, draws)


def compute_randomised_sequential_p(exceedances: int, draws: int, stop_at: int, u: float) -> float:
    """Compute `compute_sequential_log10_p` as a p that is exactly uniform under the null, for uniform u.

    P[stop at draw l] = r/(l(l+1)) gives r/(l+1) + u·r/(l(l+1)); if all n were drawn, each count
    has probability 1/(n+1). For tests of uniformity only, like `compute_randomised_p`, and no log10.

    Raises:
        ValueError: as `compute_sequential_log10_p`, or u is outside [0, 1].
    """
    compute_sequential_log10_p(exceedances, draws, stop_at)  # for its checks
    if not 0.0 <= u <= 1.0:
        raise ValueError(f"u must be in [0, 1], not {u!r}")
    if exceedances == stop_at:
        return stop_at / (draws + 1) + u * stop_at / (draws * (draws + 1))
    return (exceedances + u) / (draws + 1)


def compute_randomised_p(k: int, n: int, u: float, p: float = 0.5) -> float:
    """Compute P[X > k] + u·P[X = k]: exactly uniform under the null when u is uniform on [0, 1].

    For tests of uniformity only: the plain tail has atoms, and a correct implementation fails a
    Kolmogorov-Smirnov test on it. The result is a probability, not a log10.

    Raises:
        ValueError: k is not in 0..n, or p or u is outside [0, 1].
    """
    _check_count(k, n)
    _check_binomial(n, p)
    if not 0.0 <= u <= 1.0:
        raise ValueError(f"u must be in [0, 1], not {u!r}")
    # A float may underflow to 0 here: this p serves uniformity tests and convicts nobody.
    at: float = math.exp(_cached_log_pmf(n, p)[k])
    return min(1.0, math.pow(10.0, compute_log10_binomial_tail(k + 1, n, p)) + u * at)


def compute_log10_likelihood_ratio(k: int, n: int, error_rate: float, p: float = 0.5) -> float:
    """Compute the log10 likelihood ratio of "the mark is there" against "coincidence".

    log10 LR = k·log10((1 − e)/p) + (n − k)·log10(e/(1 − p)) for k of n matches: bits that survive
    with an error rate e each, against Bin(n, p). A report must state both propositions beside the
    figure (ENFSI guideline, 2015).

    Returns:
        Above 0 for the mark, below 0 for coincidence; −inf if e excludes the observation.

    Raises:
        ValueError: k is not in 0..n, e is outside [0, 1] or p not inside (0, 1).
    """
    _check_count(k, n)
    if not (0.0 <= error_rate <= 1.0 and 0.0 < p < 1.0):
        raise ValueError(f"error_rate in [0, 1], p inside (0, 1) expected: {error_rate!r}, {p!r}")
    matched = _multiply_log(k, 1.0 - error_rate) - _multiply_log(k, p)
    missed = _multiply_log(n - k, error_rate) - _multiply_log(n - k, 1.0 - p)
    return (matched + missed) / _LN10


def _check_binomial(n: int, p: float) -> None:
    """Raise ValueError unless n ≥ 0 and p lies in [0, 1]."""
    if n < 0 or not 0.0 <= p <= 1.0:
        raise ValueError(f"a binomial needs n ≥ 0 and p in [0, 1], not n = {n!r} and p = {p!r}")


def _check_count(k: int, n: int) -> None:
    """Raise ValueError unless k lies in 0..n."""
    if not 0 <= k <= n:
        raise ValueError(f"a count of at most {n} must be in 0..{n}, not {k!r}")


def _check_interval(k: int, n: int, confidence: float) -> None:
    """Raise ValueError unless k lies in 0..n, n ≥ 1 and the confidence is inside (0, 1)."""
    _check_count(k, n)
    if n == 0 or not 0.0 < confidence < 1.0:
        raise ValueError(f"n ≥ 1, confidence inside (0, 1) expected: {n!r}, {confidence!r}")


def _compute_log_pmf(n: int, p: float) -> NDArray[np.float64]:
    """Compute the natural log of P[X = i] for i = 0..n, shape (n + 1,).

    Sums of ln P[X=i+1]/P[X=i] = ln((n−i)/(i+1)) + ln(p/(1−p)) outwards from the mode, normalised to
    Σ P = 1: unlike log-gammas, whose large values cancel, each log keeps its relative accuracy.
    """
    if p in (0.0, 1.0):
        certain = np.full(n + 1, -np.inf)
        certain[round(n * p)] = 0.0
        return certain
    i = np.arange(n)
    steps = np.log((n - i) / (i + 1)) + (math.log(p) - math.log1p(-p))
    # The mode has the largest term: its log is set to 0, and all others are sums of steps from it.
    mode = min(n, int((n + 1) * p))
    above, below = np.cumsum(steps[mode:]), -np.cumsum(steps[:mode][::-1])[::-1]
    logs: NDArray[np.float64] = np.concatenate((below, [0.0], above))
    logs -= _sum_logs(logs)
    logs.setflags(write=False)  # callers share the cached array
    return logs


_cached_log_pmf = lru_cache(maxsize=8)(_compute_log_pmf)


def _sum_logs(logs: NDArray[np.float64]) -> float:
    """Compute log Σ exp(logs); −inf for no terms."""
    # The largest term is factored out, so that exp can neither overflow nor underflow to all zeros.
    top = float(np.max(logs, initial=-np.inf))
    return top if top == -math.inf else top + math.log(float(np.sum(np.exp(logs - top))))


def _compute_log10_tail(k: int, p: float, log_pmf: NDArray[np.float64]) -> float:
    """Compute log10 P[X ≥ k] for 0 < k ≤ n and p > 0, from the n + 1 log-terms."""
    n = len(log_pmf) - 1
    if k == n:
        return n * math.log10(p)
    # The smaller side of the mean is summed; a complement of a sum near 1 would lose its digits.
    if k > n * p:
        return min(0.0, _sum_logs(log_pmf[k:]) / _LN10)
    return min(0.0, math.log1p(-math.exp(_sum_logs(log_pmf[:k]))) / _LN10)


def _find_lower_limit(k: int, n: int, log10_side: float) -> float:
    """Find by bisection the largest p below k/n with log10 P_p[X ≥ k] ≤ log10_side.

    The tail at the rate r = k/n is above the target, so p lies in [0, r]. Each tail is computed
    from the terms at r: P_p[X=i] = P_r[X=i] (p/r)^i ((1−p)/(1−r))^(n−i).
    """
    if k in (0, n):
        return 0.0 if k == 0 else math.pow(10.0, log10_side / n)
    low = 0.0
    high = rate = k / n
    terms = _compute_log_pmf(n, rate)[k:]
    terms = terms[terms > terms[0] - _NEGLIGIBLE]  # they fall from k on, the tilted ones faster
    i = np.arange(k, k + len(terms))
    # A fixed number of halvings instead of a tolerance: the loop always ends, at float accuracy.
    for _ in range(_HALVINGS):
        p = (low + high) / 2.0
        tilted = terms + i * math.log(p / rate) + (n - i) * math.log((1.0 - p) / (1.0 - rate))
        if _sum_logs(tilted) / _LN10 <= log10_side:
            low = p
        else:
            high = p
    return low


def _multiply_log(count: int, probability: float) -> float:
    """Compute the log of probability^count, with 0⁰ = 1: events that did not occur add 0."""
    if count == 0:
        return 0.0
    return count * math.log(probability) if probability > 0.0 else -math.inf
