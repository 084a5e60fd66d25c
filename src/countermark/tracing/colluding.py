"""What recipients may do together to their code words, and how often tracing holds against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from countermark import stats
from countermark.message import Bits
from countermark.tracing.tardos import biases, log10_chance, scores

Strategy = Callable[[Bits, np.random.Generator], Bits]
"""From the words of a coalition (c, m) to the bits (m,) of its copy."""


def _average(words: Bits, drawn: np.random.Generator) -> Bits:
    """Averaged weights: a place goes to more of them; a tie to what the host reads by chance."""
    twice = 2 * words.sum(axis=0, dtype=np.int64)
    ties = drawn.integers(0, 2, words.shape[1])
    found: Bits = np.where(twice == len(words), ties, twice > len(words)).astype(np.uint8)
    return found


def _interleave(words: Bits, drawn: np.random.Generator) -> Bits:
    """Each place from one of them at random."""
    chosen = drawn.integers(0, len(words), words.shape[1])
    found: Bits = words[chosen, np.arange(words.shape[1])]
    return found


def _majority(words: Bits, drawn: np.random.Generator) -> Bits:  # noqa: ARG001
    """What more of them have; a tie becomes 1."""
    found: Bits = (2 * words.sum(axis=0, dtype=np.int64) >= len(words)).astype(np.uint8)
    return found


STRATEGIES: Mapping[str, Strategy] = {
    "average": _average, "interleave": _interleave, "majority": _majority,
}  # fmt: skip


@dataclass(frozen=True)
class Simulated:
    """What became of simulated coalitions.

    Attributes:
        runs: how many there were.
        traced: how many of them had a member named.
        accused: how many had somebody else named.
    """

    runs: int
    traced: int
    accused: int

    @property
    def most_accused(self) -> float:
        """Upper end of the 95 % interval (Clopper-Pearson) of the rate of false accusations."""
        return stats.clopper_pearson(self.accused, self.runs)[1]


@dataclass(frozen=True)
class Code:
    """A code for n recipients.

    Attributes:
        recipients, coalition: n, and how many may come together.
        length: m.
        epsilon: the largest chance that any innocent is named.
    """

    recipients: int
    coalition: int
    length: int
    epsilon: float

    def simulated(self, strategy: str, size: int, *, runs: int, seed: int) -> Simulated:
        """Coalitions of some size by one strategy, each with a code of its own."""
        drawn, traced, accused = np.random.default_rng([seed, size]), 0, 0
        for _ in range(runs):
            p = biases(drawn.random(self.length), self.coalition)
            codes = drawn.random((self.recipients, self.length), dtype=np.float32) < p
            words = codes.view(np.uint8)
            read = STRATEGIES[strategy](words[:size], drawn)
            named = self.named(words, read, p)
            traced += bool((named < size).any())
            accused += bool((named >= size).any())
        return Simulated(runs, traced, accused)

    def named(self, codes: Bits, read: Bits, p: NDArray[np.float64]) -> NDArray[np.int64]:
        """The recipients whose scores no innocent has, but for a chance of epsilon in all."""
        chances = log10_chance(scores(codes, read, p), read, p)
        return np.flatnonzero(chances + math.log10(len(codes)) <= math.log10(self.epsilon))
