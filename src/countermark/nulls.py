"""The null hypotheses that say how probable evidence is on a model without the mark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from countermark import stats
from countermark.evidence import Evidence
from countermark.xof import Stream

_MOST_TRIED = 10  # classes: 9! maps take half a second, 10! would take ten times as long
_MAPS = 10_000  # random maps at a time

LEAST_FORGERY_BITS = 80.0
LEAST_DATED_BITS = 40.0
"""Below this an undated key proves nothing: 2^80 keys could be tried for one that fits."""

LEAST_SIBLINGS = 2
"""Fewer have no spread, and set no sibling threshold."""


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
class AlignedCoin(FairCoin):
    """`FairCoin` after alignment to a reference that bears the mark: simulated, not proven.

    Only tensors that the key does not read were matched, and only suspects are judged by it whose
    neurons are unmistakable copies of the reference's. Aligned to a marked reference all the same,
    unrelated models read too many bits right (docs/verdicts.md).
    """

    name: ClassVar[str] = "aligned_coin"
    says: ClassVar[str] = (
        "on a model made without this key's secret, whose neurons are copies of those of the "
        "marked reference, each raw bit agrees with probability 1/2, independently: simulated on "
        "disjoint pairs of models, not proven"
    )


@dataclass(frozen=True)
class SecretLabels:
    """Each trigger gets its label with probability 1/C: exact where the labels are XOF output.

    p = P[Bin(T, 1/C) ≥ k], the labels being uniform over all C classes and fixed after the
    triggers. Exact for every suspect that does not depend on the key's secret, whatever it answers.
    """

    name: ClassVar[str] = "secret_labels"
    says: ClassVar[str] = (
        "a model made without this key's secret gives each trigger its label with probability "
        "1/classes, independently, because the labels are keyed random output, uniform over all "
        "classes and fixed by the commitment after the triggers were"
    )

    def log10_p(self, evidence: Evidence) -> float:
        """The exact binomial tail."""
        return stats.log10_binomial_tail(evidence.matched, evidence.bits, 1 / evidence.choices)

    def log10_floor(self, evidence: Evidence) -> float:
        """T matches out of T: C^−T. Fewer where not all triggers were opened."""
        if evidence.readable < evidence.bits:
            rate = 1 / evidence.choices
            return stats.log10_binomial_tail(evidence.readable, evidence.bits, rate)
        return -evidence.bits * math.log10(evidence.choices)


@dataclass(frozen=True)
class SecretClassMap:
    """Fresh triggers are answered by the key's map of the classes: ranked among all such maps.

    A map is one cycle through all C classes, so that none stays what it is; the key's own is keyed
    random and any of the (C − 1)! alike. p is the share of them by which at least as many triggers
    are answered: all of them up to 10 classes, else (1 + exceedances) / (draws + 1) of random ones.
    Exact for every suspect that does not depend on the key's secret, whatever it answers, as long
    as the covers were chosen without looking at the answers.

    Attributes:
        classes: the covers' own classes (T,).
        stream: draws random maps where there are too many to try.
        draws: how many of them.
    """

    name: ClassVar[str] = "secret_class_map"
    says: ClassVar[str] = (
        "a model made without this key's secret answers fresh triggers by the key's map of the "
        "classes no more often than by any other map that is one cycle through all classes"
    )

    classes: NDArray[np.int64] = field(repr=False)
    stream: Stream = field(repr=False)
    draws: int = 999_999

    def log10_p(self, evidence: Evidence) -> float:
        """The rank of the key's map, ties counted against it."""
        count = evidence.choices
        answers = np.zeros((count, count), dtype=np.int64)  # how often class c is answered a
        readable = (evidence.read >= 0) & (evidence.read < count)
        np.add.at(answers, (self.classes[readable], evidence.read[readable]), 1)
        total = reached = 0
        for maps in self._maps(count):
            matched = answers[np.arange(count), maps].sum(axis=1)
            reached += int(np.count_nonzero(matched >= evidence.matched))
            total += len(maps)
        if count <= _MOST_TRIED:  # the key's own map is among them
            return math.log10(reached / total)
        return stats.empirical_log10_p(reached, total)

    def log10_floor(self, evidence: Evidence) -> float:
        """1 / (C − 1)!, or what the draws can tell."""
        if evidence.choices <= _MOST_TRIED:
            return 0.0 - math.lgamma(evidence.choices) / math.log(10)
        return stats.empirical_log10_floor(self.draws)

    def _maps(self, count: int) -> Iterator[NDArray[np.int64]]:
        """Maps (m, C), in parts."""
        if count <= _MOST_TRIED:
            others = np.array(list(itertools.permutations(range(1, count))), dtype=np.int64)
            yield _cycles(np.insert(others, 0, 0, axis=1))
            return
        for first in range(0, self.draws, _MAPS):
            size = min(_MAPS, self.draws - first)
            yield _cycles(np.stack([self.stream.permutation(count) for _ in range(size)]))


def _cycles(orders: NDArray[np.int64]) -> NDArray[np.int64]:
    """Orders (m, C) of the classes as maps (m, C): each goes to the one before it."""
    maps = np.empty_like(orders)
    np.put_along_axis(maps, orders, np.roll(orders, 1, axis=1), axis=1)
    return maps


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
        drawn = (np.array([self.redraw() >= evidence.matched]) for _ in range(self.draws))
        return stats.sequential_log10_p(*_counts(drawn, self.stop_at), self.stop_at)

    def log10_floor(self, evidence: Evidence) -> float:  # noqa: ARG002 - the same for any evidence
        """1 / (draws + 1)."""
        return stats.empirical_log10_floor(self.draws)


@dataclass(frozen=True)
class PermutedUnits:
    """The reader's loss on a suspect ranked among its losses on permutations of hidden units.

    p = (1 + #{loss(permuted) ≤ loss(suspect)}) / (draws + 1), stopping early at `stop_at`
    exceedances (Besag and Clifford 1991), which keeps it valid. Exact for a suspect trained
    independently from i.i.d. initial units: its units are exchangeable. Not for suspects that share
    the marked model's start, which is why the sibling threshold always applies as well.

    Attributes:
        losses: the losses under `draws` random permutations, in batches of any size; NaN-free.
        loss: the suspect's own, by the same arithmetic.
        draws: how many permutations at the most.
    """

    name: ClassVar[str] = "permuted_units"
    says: ClassVar[str] = (
        "on a model trained independently of the marked one, from independent initial units, the "
        "reader's loss ranks among its losses on hidden-unit permutations of that model like any "
        "one of them"
    )

    losses: Callable[[int], Iterable[NDArray[np.float64]]] = field(repr=False)
    loss: float
    draws: int
    stop_at: int = 10

    def counts(self) -> tuple[int, int]:
        """How many permutations read at least as well, of how many until it stopped."""
        return _counts((batch <= self.loss for batch in self.losses(self.draws)), self.stop_at)

    def log10_p(self, evidence: Evidence) -> float:  # noqa: ARG002 - the loss says it all
        """The rank of the suspect among its permutations."""
        return stats.sequential_log10_p(*self.counts(), self.stop_at)

    def log10_floor(self, evidence: Evidence) -> float:  # noqa: ARG002 - the same for any evidence
        """1 / (draws + 1)."""
        return stats.empirical_log10_floor(self.draws)


@dataclass(frozen=True)
class UnmarkedModels:
    """How far a suspect is from the mark, ranked among unmarked models: a loss, or misses.

    p = (1 + #{distance(unmarked) ≤ distance(suspect)}) / (n + 1): the unit is the model, so n
    models support nothing below 1/(n + 1). Only models that the examiner supplies make anything
    *owned*: the distances that a key brings along are its owner's word.

    A suspect that misses more than half of the triggers, or of whose images more than half fail,
    has p = 1, wherever it ranks: models that are none of the task, untrained ones say, hit a map of
    the classes more often than those that are, and the rank knows nothing of them.

    Attributes:
        distances: (n,) those of the unmarked models, see `Evidence.distance`.
    """

    name: ClassVar[str] = "unmarked_models"
    says: ClassVar[str] = (
        "the suspect's loss, or its misses among the triggers, ranks like that of any one of the "
        "unmarked models that it is compared with"
    )

    distances: NDArray[np.float64] = field(repr=False)

    def log10_p(self, evidence: Evidence) -> float:
        """The rank of the suspect among the unmarked models."""
        if evidence.unit != "bits" and 2 * evidence.matched < evidence.bits:
            return 0.0
        distance = math.inf if evidence.distance is None else evidence.distance
        exceedances = int(np.count_nonzero(self.distances <= distance))
        return stats.empirical_log10_p(exceedances, len(self.distances))

    def log10_floor(self, evidence: Evidence) -> float:  # noqa: ARG002 - the same for any evidence
        """1 / (n + 1)."""
        return stats.empirical_log10_floor(len(self.distances))


def _counts(drawn: Iterator[NDArray[np.bool_]], stop_at: int) -> tuple[int, int]:
    """Of batches that say which draws are at least as good: how many are, of how many seen.

    Nothing is looked at after the draw that makes them `stop_at`.
    """
    exceedances = seen = 0
    for batch in drawn:
        at = np.flatnonzero(batch)
        if exceedances + len(at) >= stop_at:
            return stop_at, seen + int(at[stop_at - exceedances - 1]) + 1
        exceedances, seen = exceedances + len(at), seen + len(batch)
    return exceedances, seen


def forgery_bits(evidence: Evidence, tests: int = 1) -> float:
    """−log2 of the chance that one key, tried by a cheat, reads at least as well by luck.

    0 where the bits are not XOF output over a commitment: then nothing has to be searched.
    """
    if not evidence.committed:
        return 0.0
    tail = stats.log10_binomial_tail(evidence.matched, evidence.bits, 1 / evidence.choices)
    return max(0.0, -tail / math.log10(2) - math.log2(tests))
