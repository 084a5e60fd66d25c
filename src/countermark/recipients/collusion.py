"""Collusion of recipients: attacks on their code words, and how often tracing withstands them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from countermark.keys.messages import Bits
from countermark.recipients.tardos import bound_log10_chance, compute_biases, score_recipients
from countermark.results import statistics

Strategy = Callable[[Bits, np.random.Generator], Bits]
"""A function from the code words of a coalition (c, m) to the bits (m,) of its copy."""


def _average_words(words: Bits, drawn: np.random.Generator) -> Bits:
    """Return the bits of averaged weights: the majority; a tie reads a random bit of the host."""
    twice = 2 * words.sum(axis=0, dtype=np.int64)
    # Equal weights of both bits cancel, so the unmarked host decides; its bit is random.
    ties = drawn.integers(0, 2, words.shape[1])
    found: Bits = np.where(twice == len(words), ties, twice > len(words)).astype(np.uint8)
    return found


def _interleave_words(words: Bits, drawn: np.random.Generator) -> Bits:
    """Return for each place the bit of a random member."""
    chosen = drawn.integers(0, len(words), words.shape[1])
    found: Bits = words[chosen, np.arange(words.shape[1])]
    return found


def _take_majority(words: Bits, drawn: np.random.Generator) -> Bits:  # noqa: ARG001
    """Return for each place the bit that most members have; a tie becomes 1."""
    found: Bits = (2 * words.sum(axis=0, dtype=np.int64) >= len(words)).astype(np.uint8)
    return found


STRATEGIES: Mapping[str, Strategy] = {
    "average": _average_words, "interleave": _interleave_words, "majority": _take_majority,
}  # fmt: skip


@dataclass(frozen=True)
class SimulationCounts:
    """The counts of simulated coalitions.

    Attributes:
        runs: number of simulated coalitions.
        traced: number of runs that named a member.
        accused: number of runs that named an innocent recipient.
    """

    runs: int
    traced: int
    accused: int

    @property
    def accusation_bound(self) -> float:
        """Upper end of the 95 % interval (Clopper-Pearson) of the rate of false accusations."""
        return statistics.compute_clopper_pearson(self.accused, self.runs)[1]


@dataclass(frozen=True)
class RecipientCode:
    """The parameters of a code for n recipients.

    Attributes:
        recipients, coalition: n, and the largest coalition that the code withstands.
        length: m, the number of places of a code word.
        epsilon: the largest probability that any innocent recipient is named.
    """

    recipients: int
    coalition: int
    length: int
    epsilon: float

    def simulate_coalitions(
        self, strategy: str, size: int, *, runs: int, seed: int
    ) -> SimulationCounts:
        """Simulate coalitions of the given size and strategy, with a fresh code for each run.

        Args:
            strategy: a name in `STRATEGIES`.
            size: number of members.
            runs: number of coalitions.
            seed: seed of codes and strategies.
        """
        drawn, traced, accused = np.random.default_rng([seed, size]), 0, 0
        for _ in range(runs):
            p = compute_biases(drawn.random(self.length), self.coalition)
            # float32 halves the memory of n·m numbers; its resolution of 2^-24 is enough for a
            # simulation.
            codes = drawn.random((self.recipients, self.length), dtype=np.float32) < p
            words = codes.view(np.uint8)
            # The first `size` recipients collude; all code words are drawn alike.
            read = STRATEGIES[strategy](words[:size], drawn)
            named = self.find_recipients(words, read, p)
            traced += bool((named < size).any())
            accused += bool((named >= size).any())
        return SimulationCounts(runs, traced, accused)

    def find_recipients(self, codes: Bits, read: Bits, p: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return recipients whose scores innocents reach with total probability epsilon at most.

        Args:
            codes: the code words (n, m).
            read: the bits of the suspect (m,).
            p: the biases (m,).
        """
        chances = bound_log10_chance(score_recipients(codes, read, p), read, p)
        # A union bound over the n recipients.
        return np.flatnonzero(chances + math.log10(len(codes)) <= math.log10(self.epsilon))
