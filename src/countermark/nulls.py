"""Evidence, and the null hypotheses that say how probable it is on a model without the mark."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from countermark import stats
from countermark.message import Bits


@dataclass(frozen=True)
class Evidence:
    """What a key read out of a suspect.

    Attributes:
        read: the raw bits (T,) that were read.
        expected: the message (T,).
        committed: whether `expected` is XOF output over a commitment that holds everything else;
            only then does a cheat have to search for a key that fits.
        payload: whether the payload decodes; None when the message has none.
        scores: the real values (T,) whose signs are the bits, where a scheme has them.
    """

    read: Bits = field(repr=False)
    expected: Bits = field(repr=False)
    committed: bool = True
    payload: bool | None = None
    scores: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def bits(self) -> int:
        """T."""
        return len(self.expected)

    @property
    def matched(self) -> int:
        """How many of the T bits are as expected."""
        return int(np.count_nonzero(self.read == self.expected))

    @property
    def cross_entropy(self) -> float | None:
        """E_R per bit in nats: the mean of −log P(expected bit) under sigmoid(scores)."""
        if self.scores is None:
            return None
        agreement = (2.0 * self.expected - 1.0) * self.scores
        return float(np.logaddexp(0.0, -agreement).mean())


class Null(Protocol):
    """A null hypothesis: how probable evidence is on a model that never saw the mark."""

    name: ClassVar[str]
    says: ClassVar[str]

    def log10_p(self, evidence: Evidence) -> float:
        """log10 of the probability of evidence at least as good."""

    def log10_floor(self, evidence: Evidence) -> float:
        """log10 of the smallest p that this null can give."""


@dataclass(frozen=True)
class FairCoin:
    """Each raw bit agrees with probability ½: exact where the message is XOF output.

    p = P[Bin(T, ½) ≥ k]. Exact for every suspect that does not depend on the key's secret,
    siblings of the marked model included.
    """

    name: ClassVar[str] = "fair_coin"
    says: ClassVar[str] = (
        "on a model made without this key's secret each raw bit agrees with probability 1/2, "
        "independently, because the message is keyed random output fixed by the commitment"
    )

    def log10_p(self, evidence: Evidence) -> float:
        """The exact binomial tail."""
        return stats.log10_binomial_tail(evidence.matched, evidence.bits)

    def log10_floor(self, evidence: Evidence) -> float:
        """T matches out of T: 2^−T."""
        return -evidence.bits * math.log10(2)


@dataclass(frozen=True)
class FreshKeys:
    """The owner's key ranked among new keys on the same suspect: exact for linear keys.

    p = (1 + #{fresh keys that match at least as many bits}) / (draws + 1), stopping early at
    `stop_at` exceedances (Besag and Clifford 1991), which keeps it valid.

    Attributes:
        redraw: draws one fresh key of the same scheme, fields and owner, and returns how many of
            its own bits it finds in the suspect.
        draws: how many fresh keys at the most.
    """

    name: ClassVar[str] = "fresh_keys"
    says: ClassVar[str] = (
        "on a model made without this key's secret the owner's key ranks among fresh keys of the "
        "same scheme, read from the same suspect, like any one of them"
    )

    redraw: Callable[[], int] = field(repr=False)
    draws: int = 1999
    stop_at: int = 10

    def log10_p(self, evidence: Evidence) -> float:
        """The rank of the owner's key."""
        exceedances = 0
        for drawn in range(1, self.draws + 1):
            exceedances += self.redraw() >= evidence.matched
            if exceedances == self.stop_at:
                return stats.sequential_log10_p(exceedances, drawn, self.stop_at)
        return stats.sequential_log10_p(exceedances, self.draws, self.stop_at)

    def log10_floor(self, evidence: Evidence) -> float:  # noqa: ARG002 - the same for any evidence
        """1 / (draws + 1)."""
        return stats.empirical_log10_floor(self.draws)


def forgery_bits(evidence: Evidence, tests: int = 1) -> float:
    """−log2 of the chance that one key, tried by a cheat, reads at least as well by luck.

    0 where the bits are not XOF output over a commitment: then nothing has to be searched.
    """
    if not evidence.committed:
        return 0.0
    tail = stats.log10_binomial_tail(evidence.matched, evidence.bits)
    return max(0.0, -tail / math.log10(2) - math.log2(tests))
