"""Tardos's code (STOC 2003) with the symmetric scores of Škorić, Katzenbeisser and Celik (2008).

    p_i = sin²(r), r uniform between the cut-off and π/2 minus the cut-off
    x_ji = 1 with probability p_i
    score of j = Σ_i g(y_i, x_ji, p_i),   g = ±√((1−q)/q) for agreement, ∓√(q/(1−q)) otherwise,

where q is the probability of the bit that was read. The terms of an innocent recipient's score are
independent, of mean 0 and variance 1 each, for any bits that were read, because the recipient's own
bits are drawn independently of the bits that were read.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from countermark.keys.messages import Bits
from countermark.keys.streams import KeyStream

Biases = NDArray[np.float64]
"""The probability p (m,) of a 1 at each place of the code."""

_CUT = 300.0  # the cut-off is 1 / (300 c), as in the paper
_MISSED = 0.1  # probability that a coalition's mean score misses the threshold
_SLOPES = np.concatenate([[0.0], np.geomspace(5e-3, 1.5, 80)])  # λ of the Chernoff bound


def compute_code_length(recipients: int, coalition: int, epsilon: float) -> int:
    """Return m, so long that a coalition's mean score, 2m/(πc), passes the threshold.

    The threshold is that of a Chernoff bound, √(2 ln(n/ε)) standard deviations √m. m is a multiple
    of 8, for whole bytes.

    Args:
        recipients: n.
        coalition: c, the largest coalition.
        epsilon: ε, the largest probability that any innocent recipient is named.
    """
    threshold = math.sqrt(2 * math.log(recipients / epsilon))
    slack = NormalDist().inv_cdf(1 - _MISSED)
    # Solve 2m/(πc) = (threshold + slack)·√m for m.
    m = ((threshold + slack) * math.pi * coalition / 2) ** 2
    return 8 * math.ceil(m / 8)


def compute_biases(uniform: NDArray[np.float64], coalition: int) -> Biases:
    """Return the biases (m,) from numbers (m,) uniform in (0, 1)."""
    # The cut-off keeps p away from 0 and 1, where a single place would dominate a score.
    least = math.asin(math.sqrt(1 / (_CUT * coalition)))
    found: Biases = np.sin(least + uniform * (math.pi / 2 - 2 * least)) ** 2
    return found


def draw_uniform_numbers(stream: KeyStream, count: int) -> NDArray[np.float64]:
    """Return numbers (count,) uniform in (0, 1) from a stream, of 53 bits each."""
    words = stream.take_words(count) >> np.uint64(11)
    # The half step keeps 0 and 1 out.
    return (words.astype(np.float64) + 0.5) / 2.0**53


def score_recipients(codes: NDArray[np.uint8], read: Bits, p: Biases) -> NDArray[np.float64]:
    """Return the score of each of n recipients (n,).

    Args:
        codes: the code words (n, m).
        read: y (m,), the bits of the suspect.
        p: the biases (m,).
    """
    ones, zeros = _compute_addends(read, p)
    # A single matrix product: each place adds `zeros`, and a 1 adds the difference.
    found: NDArray[np.float64] = codes @ (ones - zeros) + zeros.sum()
    return found


def _compute_addends(read: Bits, p: Biases) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the addends (m,) of a score for a 1 and for a 0 at each place."""
    heads = np.sqrt((1 - p) / p)
    agree = np.where(read == 1, 1.0, -1.0)
    return agree * heads, -agree / heads


def bound_log10_chance(found: NDArray[np.float64], read: Bits, p: Biases) -> NDArray[np.float64]:
    """Return an upper bound of log10 of the probability that an innocent reaches each score (n,).

    Chernoff: P[S ≥ s] ≤ E e^{λS} / e^{λs} for every λ ≥ 0, where E runs over an innocent
    recipient's own bits with everything else fixed. The bound is the least over 80 fixed λ.

    Args:
        found: scores (n,).
        read: y (m,), the bits of the suspect.
        p: the biases (m,).
    """
    ones, zeros = _compute_addends(read, p)
    # logaddexp, because e^{λs} of a place with a small p may overflow.
    exponents = np.array(
        [np.logaddexp(np.log(p) + s * ones, np.log1p(-p) + s * zeros).sum() for s in _SLOPES]
    )  # ln E e^{λS}
    bounds = exponents[:, None] - _SLOPES[:, None] * found[None, :]
    least: NDArray[np.float64] = np.minimum(0.0, bounds.min(axis=0)) / math.log(10)
    return least
