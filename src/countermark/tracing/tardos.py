"""Tardos's code (STOC 2003) with the symmetric scores of Škorić, Katzenbeisser and Celik (2008).

    p_i = sin²(r), r uniform between the cut-off and π/2 minus it;  x_ji = 1 with probability p_i
    score of j = Σ_i g(y_i, x_ji, p_i),   g = ±√((1−q)/q) for agreement, ∓√(q/(1−q)) otherwise,

q the probability of the bit that was read. An innocent's terms are independent, of mean 0 and
variance 1 each, whatever was read, because his bits are drawn independently of it.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from countermark.message import Bits
from countermark.xof import Stream

Biases = NDArray[np.float64]
"""p (m,), the probability of a 1 at each place of the code."""

_CUT = 300.0  # the cut-off is 1 / (300 c), as in the paper
_MISSED = 0.1  # how often a coalition's mean score may lie below the threshold
_SLOPES = np.concatenate([[0.0], np.geomspace(5e-3, 1.5, 80)])  # λ of the Chernoff bound


def code_length(recipients: int, coalition: int, epsilon: float) -> int:
    """m: so long that the mean score of a coalition, 2m/(πc), passes the threshold.

    The threshold is that of a Chernoff bound, √(2 ln(n/ε)) standard deviations √m. Whole bytes.
    """
    threshold = math.sqrt(2 * math.log(recipients / epsilon))
    slack = NormalDist().inv_cdf(1 - _MISSED)
    m = ((threshold + slack) * math.pi * coalition / 2) ** 2
    return 8 * math.ceil(m / 8)


def biases(uniform: NDArray[np.float64], coalition: int) -> Biases:
    """P (m,) from numbers (m,) uniform in (0, 1)."""
    least = math.asin(math.sqrt(1 / (_CUT * coalition)))
    found: Biases = np.sin(least + uniform * (math.pi / 2 - 2 * least)) ** 2
    return found


def keyed(stream: Stream, count: int) -> NDArray[np.float64]:
    """Numbers (count,) uniform in (0, 1) from a stream: 53 bits of each word."""
    words = stream.words(count) >> np.uint64(11)
    return (words.astype(np.float64) + 0.5) / 2.0**53


def scores(codes: NDArray[np.uint8], read: Bits, p: Biases) -> NDArray[np.float64]:
    """The score of each of n recipients (n,).

    Args:
        codes: their words (n, m).
        read: y (m,), the bits of the suspect.
        p: the biases.
    """
    ones, zeros = _terms(read, p)
    found: NDArray[np.float64] = codes @ (ones - zeros) + zeros.sum()
    return found


def _terms(read: Bits, p: Biases) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a 1, and what a 0, at each place adds to a score."""
    heads = np.sqrt((1 - p) / p)
    agree = np.where(read == 1, 1.0, -1.0)
    return agree * heads, -agree / heads


def log10_chance(found: NDArray[np.float64], read: Bits, p: Biases) -> NDArray[np.float64]:
    """An upper bound of log10 of the chance that an innocent scores as high, for scores (n,).

    Chernoff: P[S ≥ s] ≤ E e^{λS} / e^{λs} for every λ ≥ 0, with E over an innocent's own bits and
    everything else as it is; the least of 80 fixed λ.
    """
    ones, zeros = _terms(read, p)
    exponents = np.array(
        [np.logaddexp(np.log(p) + s * ones, np.log1p(-p) + s * zeros).sum() for s in _SLOPES]
    )  # ln E e^{λS}
    bounds = exponents[:, None] - _SLOPES[:, None] * found[None, :]
    least: NDArray[np.float64] = np.minimum(0.0, bounds.min(axis=0)) / math.log(10)
    return least
