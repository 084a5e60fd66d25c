"""Null hypotheses: the probability of a reading on a model without the mark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from countermark.keys.streams import KeyStream
from countermark.results import statistics
from countermark.results.reading import Reading

_MOST_TRIED = 10  # classes: 9! maps take half a second, 10! would take ten times as long
# A batch of maps bounds the memory; it does not change which maps are drawn.
_MAPS = 10_000  # random maps at a time

# 2^80 trials are out of reach. A dated key needs 2^40 against keys picked before the claim, because
# half a minute of drawing finds triggers whose labels fit foreseeable answers (docs/verdicts.md).
LEAST_FORGERY_BITS = 80.0
LEAST_DATED_BITS = 40.0
"""Below this an undated key proves nothing: 2^80 keys could be tried for one that fits."""

LEAST_SIBLINGS = 2
"""Fewer have no spread, and set no sibling threshold."""


class NullHypothesis(Protocol):
    """A null hypothesis: the probability of a reading on a model that never saw the mark."""

    name: ClassVar[str]
    says: ClassVar[str]

    def compute_log10_p(self, evidence: Reading) -> float:
        """Return log10 of the probability of a reading that is at least as good."""

    def compute_log10_floor(self, evidence: Reading) -> float:
        """Return log10 of the smallest p that this null hypothesis can give."""


@dataclass(frozen=True)
class FairCoin:
    """Each raw bit agrees with probability ½: exact if the message is XOF output.

    p = P[Bin(T, ½) ≥ k]. Exact for every suspect that does not depend on the key's secret,
    siblings of the marked model included.
    """

    name: ClassVar[str] = "fair_coin"
    says: ClassVar[str] = (
        "on a model made without this key's secret each raw bit agrees with probability 1/2, "
        "independently, because the message is keyed random output fixed by the commitment"
    )

    def compute_log10_p(self, evidence: Reading) -> float:
        """Compute the exact binomial tail."""
        return statistics.compute_log10_binomial_tail(evidence.match_count, evidence.bits)

    def compute_log10_floor(self, evidence: Reading) -> float:
        """Return log10 of 2^−T, the probability of T matches out of T."""
        return -evidence.bits * math.log10(2)


@dataclass(frozen=True)
class AlignedCoin(FairCoin):
    """`FairCoin` after alignment to a reference that bears the mark: simulated, not proven.

    Neurons were matched only by tensors that the key does not read, and only suspects whose
    neurons are unmistakable copies of the reference's neurons are judged by it. Without the second
    condition, unrelated models aligned to a marked reference match too many bits
    (docs/verdicts.md).
    """

    name: ClassVar[str] = "aligned_coin"
    says: ClassVar[str] = (
        "on a model made without this key's secret, whose neurons are copies of those of the "
        "marked reference, each raw bit agrees with probability 1/2, independently: simulated on "
        "disjoint pairs of models, not proven"
    )


@dataclass(frozen=True)
class SecretLabels:
    """Each trigger gets its label with probability 1/C: exact if the labels are XOF output.

    p = P[Bin(T, 1/C) ≥ k], the labels being uniform over all C classes and fixed after the
    triggers. Exact for every suspect that does not depend on the key's secret, whatever it answers.
    """

    name: ClassVar[str] = "secret_labels"
    says: ClassVar[str] = (
        "a model made without this key's secret gives each trigger its label with probability "
        "1/classes, independently, because the labels are keyed random output, uniform over all "
        "classes and fixed by the commitment after the triggers were"
    )

    def compute_log10_p(self, evidence: Reading) -> float:
        """Compute the exact binomial tail."""
        return statistics.compute_log10_binomial_tail(
            evidence.match_count, evidence.bits, 1 / evidence.choices
        )

    def compute_log10_floor(self, evidence: Reading) -> float:
        """Return log10 of C^−T, for T matches out of T; larger if not all triggers were opened."""
        # Unopened triggers count as misses, so even the best answers match only the opened ones.
        if evidence.readable_count < evidence.bits:
            rate = 1 / evidence.choices
            return statistics.compute_log10_binomial_tail(
                evidence.readable_count, evidence.bits, rate
            )
        return -evidence.bits * math.log10(evidence.choices)


@dataclass(frozen=True)
class SecretClassMap:
    """The key's class map explains the answers to fresh triggers, ranked among all such maps.

    A map is one cycle through all C classes, so that no class is mapped to itself; the key's own
    map is keyed random, and all (C − 1)! maps are equally likely. p is the share of maps that match
    at least as many answers: the share of all maps up to 10 classes, else
    (1 + exceedances) / (draws + 1) of random maps. Exact for every suspect that does not depend on
    the key's secret, whatever it answers, as long as the covers were chosen without looking at the
    answers.

    Attributes:
        classes: the covers' own classes (T,).
        stream: draws random maps if there are too many to try.
        draws: number of random maps.
    """

    name: ClassVar[str] = "secret_class_map"
    says: ClassVar[str] = (
        "a model made without this key's secret answers fresh triggers by the key's map of the "
        "classes no more often than by any other map that is one cycle through all classes"
    )

    classes: NDArray[np.int64] = field(repr=False)
    stream: KeyStream = field(repr=False)
    draws: int = 999_999

    def compute_log10_p(self, evidence: Reading) -> float:
        """Compute the rank of the key's map; maps that match equally well count against it."""
        count = evidence.choices
        answers = np.zeros((count, count), dtype=np.int64)  # [c, a]: answers a to class c
        # A hostile service may answer a class that does not exist: the answer counts as a miss.
        readable = (evidence.read >= 0) & (evidence.read < count)
        np.add.at(answers, (self.classes[readable], evidence.read[readable]), 1)
        total = reached = 0
        for maps in self._iterate_maps(count):
            matched = answers[np.arange(count), maps].sum(axis=1)
            reached += int(np.count_nonzero(matched >= evidence.match_count))
            total += len(maps)
        if count <= _MOST_TRIED:  # the key's own map is among them
            return math.log10(reached / total)
        return statistics.compute_empirical_log10_p(reached, total)

    def compute_log10_floor(self, evidence: Reading) -> float:
        """Return log10 of 1 / (C − 1)!, or of the smallest p that the draws support."""
        if evidence.choices <= _MOST_TRIED:
            return 0.0 - math.lgamma(evidence.choices) / math.log(10)
        return statistics.compute_empirical_log10_floor(self.draws)

    def _iterate_maps(self, count: int) -> Iterator[NDArray[np.int64]]:
        """Yield batches of maps (m, C): all maps for few classes, else random maps."""
        if count <= _MOST_TRIED:
            # A cycle can start at any class: with class 0 first, (C − 1)! orders remain.
            others = np.array(list(itertools.permutations(range(1, count))), dtype=np.int64)
            yield _make_cycles(np.insert(others, 0, 0, axis=1))
            return
        for first in range(0, self.draws, _MAPS):
            size = min(_MAPS, self.draws - first)
            yield _make_cycles(np.stack([self.stream.draw_permutation(count) for _ in range(size)]))


def _make_cycles(orders: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn orders (m, C) of the classes into maps (m, C): each class goes to the one before it."""
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
        draws: largest number of fresh keys.
        stop_at: number of exceedances after which no more keys are drawn.
    """

    name: ClassVar[str] = "fresh_keys"
    says: ClassVar[str] = (
        "on a model made without this key's secret the owner's key ranks among fresh keys of the "
        "same scheme, read from the same suspect, like any one of them"
    )

    redraw: Callable[[], int] = field(repr=False)
    draws: int = 1999
    stop_at: int = 10

    def compute_log10_p(self, evidence: Reading) -> float:
        """Compute the rank of the owner's key among fresh keys."""
        # A generator: keys are drawn one by one and only until `stop_at` is reached.
        drawn = (np.array([self.redraw() >= evidence.match_count]) for _ in range(self.draws))
        return statistics.compute_sequential_log10_p(
            *_count_exceedances(drawn, self.stop_at), self.stop_at
        )

    def compute_log10_floor(self, evidence: Reading) -> float:  # noqa: ARG002 - the same for any evidence
        """Return log10 of 1 / (draws + 1)."""
        return statistics.compute_empirical_log10_floor(self.draws)


@dataclass(frozen=True)
class PermutedUnits:
    """The reader's loss on a suspect ranked among its losses on permutations of hidden units.

    p = (1 + #{loss(permuted) ≤ loss(suspect)}) / (draws + 1), stopping early at `stop_at`
    exceedances (Besag and Clifford 1991), which keeps it valid. Exact for a suspect trained
    independently from i.i.d. initial units, because its units are exchangeable. Not valid for
    suspects that share the marked model's initial weights; therefore the sibling threshold always
    applies as well.

    Attributes:
        losses: the losses under `draws` random permutations, in batches of any size; NaN-free.
        loss: the suspect's own loss, by the same arithmetic.
        draws: largest number of permutations.
        stop_at: number of exceedances after which no more permutations are drawn.
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

    def count_exceedances(self) -> tuple[int, int]:
        """Return how many permutations have a loss at least as small, and how many were drawn."""
        return _count_exceedances(
            (batch <= self.loss for batch in self.losses(self.draws)), self.stop_at
        )

    def compute_log10_p(self, evidence: Reading) -> float:  # noqa: ARG002 - the loss says it all
        """Compute the rank of the suspect's loss among its permutations."""
        return statistics.compute_sequential_log10_p(*self.count_exceedances(), self.stop_at)

    def compute_log10_floor(self, evidence: Reading) -> float:  # noqa: ARG002 - the same for any evidence
        """Return log10 of 1 / (draws + 1)."""
        return statistics.compute_empirical_log10_floor(self.draws)


@dataclass(frozen=True)
class UnmarkedModels:
    """A suspect's distance from the mark, a loss or misses, ranked among unmarked models.

    p = (1 + #{distance(unmarked) ≤ distance(suspect)}) / (n + 1). The unit is the model, so n
    models support no p below 1/(n + 1). Only models that the examiner supplies can make a verdict
    *owned*: the distances stored in a key are its owner's word.

    p = 1, whatever the rank, for a suspect that misses more than half of the triggers, or more than
    half of whose images fail. Models of another task, and untrained models, match a class map more
    often than models of the task, and the rank does not account for them.

    Attributes:
        distances: distances (n,) of the unmarked models, see `Reading.mark_distance`.
    """

    name: ClassVar[str] = "unmarked_models"
    says: ClassVar[str] = (
        "the suspect's loss, or its misses among the triggers, ranks like that of any one of the "
        "unmarked models that it is compared with"
    )

    distances: NDArray[np.float64] = field(repr=False)

    def compute_log10_p(self, evidence: Reading) -> float:
        """Compute the rank of the suspect among the unmarked models."""
        # The rank assumes a model of the task; a suspect that fails most entries may be none.
        if evidence.unit != "bits" and 2 * evidence.match_count < evidence.bits:
            return 0.0
        distance = math.inf if evidence.mark_distance is None else evidence.mark_distance
        exceedances = int(np.count_nonzero(self.distances <= distance))
        return statistics.compute_empirical_log10_p(exceedances, len(self.distances))

    def compute_log10_floor(self, evidence: Reading) -> float:  # noqa: ARG002 - the same for any evidence
        """Return log10 of 1 / (n + 1)."""
        return statistics.compute_empirical_log10_floor(len(self.distances))


def _count_exceedances(drawn: Iterator[NDArray[np.bool_]], stop_at: int) -> tuple[int, int]:
    """Count exceedances in batches of draws, up to the `stop_at`-th exceedance.

    Args:
        drawn: batches (m,) of flags; true for a draw that is at least as good as the suspect.
        stop_at: number of exceedances after which counting stops.

    Returns: the number of exceedances, and the number of draws up to the last one that counted.
    """
    exceedances = seen = 0
    for batch in drawn:
        # The sequential p-value r/l needs the exact draw l of the `stop_at`-th exceedance, even if
        # it lies in the middle of a batch.
        at = np.flatnonzero(batch)
        if exceedances + len(at) >= stop_at:
            return stop_at, seen + int(at[stop_at - exceedances - 1]) + 1
        exceedances, seen = exceedances + len(at), seen + len(batch)
    return exceedances, seen


def compute_forgery_bits(evidence: Reading, tests: int = 1) -> float:
    """Return −log2 of the chance that one key, tried by a cheat, reads at least as well by luck.

    0 if the expected bits are not XOF output over a commitment, since a cheat need not search then.

    Args:
        evidence: the reading.
        tests: number of readings of each tried key, for which the bits are reduced.
    """
    # A key that is not drawn from its commitment can be built to fit; nothing needs to be searched.
    if not evidence.committed:
        return 0.0
    tail = statistics.compute_log10_binomial_tail(
        evidence.match_count, evidence.bits, 1 / evidence.choices
    )
    return max(0.0, -tail / math.log10(2) - math.log2(tests))
