"""Which of a suspect's neurons is which of the reference's, and by how much each was scaled.

Classes of neurons are aligned one after the other, each by the tensors whose other axes are
aligned already, beginning where most is known: at the inputs and the outputs. More rounds see both
neighbours of every class, until nothing moves.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.assigning import assigned
from countermark.alignment.reducing import (
    Floats,
    Tensors,
    reduce,
    rows_of,
    scale,
    unit,
    upright,
    with_rows,
)
from countermark.errors import AlignmentError
from countermark.units import Member, Units

_Pairs: TypeAlias = tuple[NDArray[np.intp], NDArray[np.intp]]  # the reference's, the suspect's
_Features: TypeAlias = dict[tuple[int, int], Floats]  # (domain, power) -> (units, values)

_MOST_ROUNDS = 3  # after the first
_LEAST_KNOWN = 2  # values of a neuron that say anything of its direction
_LOUDEST = 3.0  # of a line beside most others, above which it is brought down to them
_HALF_WEIGHT = 16  # a direction of so many values counts half of one of very many


@dataclass(frozen=True)
class Matched:
    """Tensors in the order, scale and shapes of the reference, and how alike the neurons are.

    Attributes:
        tensors: all tensors that units are found in, float64.
        similarity: mean cosine of matched neurons, over what they were matched by; 1 for a copy.
            The least one of those classes that have a tensor which is not compared.
        known: how many values a neuron of those classes was matched by, at the least.
    """

    tensors: Tensors
    similarity: float
    known: int


def align(
    suspect: Mapping[str, NDArray[Any]], reference: Mapping[str, NDArray[Any]],
    units: Sequence[Units], *, by: Container[str],
) -> Matched:  # fmt: skip
    """Bring a suspect's tensors into the order, scale and shapes of a reference's.

    Args:
        suspect: tensors by the reference's names; axes of neurons may be longer or shorter.
        reference: its tensors; those that are not in `by` are used for their shapes alone.
        units: the classes of neurons.
        by: names of the tensors that neurons are matched by.

    Raises:
        AlignmentError: nothing says how the neurons of some class are ordered.
    """
    work = _Alignment(suspect, reference, units, by)
    work.run()
    read = [
        number for number, each in enumerate(units)
        if any(member.name not in by for member in each.members)
    ] or list(range(len(units)))  # fmt: skip
    return Matched(
        work.tensors,
        min(work.similarities[number] for number in read),
        min(work.known(number) for number in read),
    )


class _Alignment:
    """The suspect's tensors on their way."""

    def __init__(
        self, suspect: Mapping[str, NDArray[Any]], reference: Mapping[str, NDArray[Any]],
        units: Sequence[Units], by: Container[str],
    ) -> None:  # fmt: skip
        names = {member.name for each in units for member in each.members}
        self.tensors: Tensors = {name: np.array(suspect[name], np.float64) for name in names}
        self._reference = {
            name: np.asarray(reference[name], np.float64) for name in names if name in by
        }
        self._units, self._done = units, set[int]()
        # Before a norm a neuron counts with the sign that makes the norm's weight positive. So a
        # flip is known where nothing else says so: of what the key reads, and of what follows it.
        upright(self.tensors, units)
        self._turned = upright(self._reference, units)
        self._classes: dict[tuple[str, int], set[int]] = {}
        for number, each in enumerate(units):
            for member in each.members:
                self._classes.setdefault((member.name, member.axis), set()).add(number)
        self._scales = {
            name: float(np.sqrt(np.mean(each**2))) or 1.0 for name, each in self._reference.items()
        }
        self.similarities = [0.0] * len(units)

    def run(self) -> None:
        """All rounds."""
        self._match()
        for turned, units in zip(self._turned, self._units, strict=True):
            scale(self.tensors, units, turned)

    def _match(self) -> None:
        reduce(self.tensors, self._units)
        while len(self._done) < len(self._units):
            left = [number for number in range(len(self._units)) if number not in self._done]
            known = {number: self.known(number) for number in left}
            best = max(left, key=known.__getitem__)
            if known[best] < _LEAST_KNOWN:
                members = ", ".join(sorted({m.name for m in self._units[best].members}))
                raise AlignmentError(
                    f"the key reads all that tells the neurons between {members} apart: they "
                    "cannot be put in order without looking at the mark; expected a reference with "
                    "the weights from before it, as the key has kept them"
                )
            self.similarities[best], _ = self._align(best)
            self._done.add(best)
        for _ in range(_MOST_ROUNDS):
            seen = [self._align(number) for number in range(len(self._units))]
            self.similarities = [similarity for similarity, _ in seen]
            if not any(moved for _, moved in seen):
                return

    def known(self, number: int) -> int:
        """How many values a neuron of a class can be matched by now."""
        return sum(each.shape[1] for each in self._features(self._reference, number).values())

    def _usable(self, member: Member, dimensions: int) -> bool:
        """Whether the other axes of a member are in order."""
        others = (axis for axis in range(dimensions) if axis != member.axis)
        return all(self._classes.get((member.name, axis), set()) <= self._done for axis in others)

    def _features(self, tensors: Mapping[str, Floats], number: int) -> _Features:
        """What the neurons of a class are matched by: values that scale alike, side by side."""
        units, parts = self._units[number], dict[tuple[int, int], list[Floats]]()
        for member in units.members:
            if member.name not in self._reference:
                continue
            if not self._usable(member, self._reference[member.name].ndim):
                continue
            rows = rows_of(tensors[member.name], member, units) / self._scales[member.name]
            parts.setdefault((member.domain, member.power), []).append(rows)
        return {place: np.concatenate(each, axis=1) for place, each in parts.items()}

    def _align(self, number: int) -> tuple[float, bool]:
        """Put one class in order and scale; the mean cosine of its neurons, and if any moved."""
        units = self._units[number]
        own, wanted = self._both(number)
        alike = self._alike(units, wanted, own)  # (units, the suspect's)
        at, chosen = assigned(alike, largest=True)
        for name in {member.name for member in units.members}:
            self.tensors[name] = self._put_in_order(name, units, (at, chosen))
        self._scale(number)
        moved = alike.shape[1] != units.size or not np.array_equal(at, chosen)
        return float(alike[at, chosen].mean()), moved

    def _scale(self, number: int) -> None:
        """Undo what the neurons of a class, which are in order, were scaled and flipped by."""
        units = self._units[number]
        own, wanted = self._both(number)
        domains = range(len(units.domains))
        scale(self.tensors, units, {d: self._factors(units, d, (wanted, own)) for d in domains})

    def _both(self, number: int) -> tuple[_Features, _Features]:
        """The features of a class in the suspect and in the reference."""
        own, wanted = (self._features(each, number) for each in (self.tensors, self._reference))
        return {place: _quieten(rows, wanted[place]) for place, rows in own.items()}, wanted

    def _alike(self, units: Units, wanted: _Features, own: _Features) -> Floats:
        """Mean cosines (units, the suspect's), directions of many values counting more."""
        weights = 0.0
        found: Floats = np.zeros(())
        for (domain, power), rows in wanted.items():
            if power == 2:  # a variance has no direction
                continue
            one, other = (unit(each).astype(np.float32) for each in (rows, own[domain, power]))
            cosines = (one @ other.T).astype(np.float64)
            if units.domains[domain].flippable:
                cosines = np.abs(cosines)
            weight = rows.shape[1] / (rows.shape[1] + _HALF_WEIGHT)
            found, weights = found + weight * cosines, weights + weight
        return found / weights

    def _factors(self, units: Units, domain: int, both: tuple[_Features, _Features]) -> Floats:
        """By how much the suspect's neurons (units,) are larger than the reference's."""
        wanted, own = both
        weights, log, product = 0, np.zeros(units.size), np.zeros(units.size)
        for power in (2, 1, -1):
            if (domain, power) in wanted:
                a, b = own[domain, power], wanted[domain, power]
                lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
                usable = (lengths[0] > 0) & (lengths[1] > 0)
                one, other = (np.where(usable, each, 1) for each in lengths)
                log = log + b.shape[1] / power * np.log(one / other)
                weights += b.shape[1]
                if power != 2:
                    product = product + (a * b).sum(1) / (one * other)
        allowed = units.domains[domain]
        size = np.exp(log / max(1, weights)) if allowed.scalable else np.ones(units.size)
        return np.where(product < 0, -size, size) if allowed.flippable else size

    def _put_in_order(self, name: str, units: Units, order: _Pairs) -> Floats:
        """One tensor with the neurons of a class in order; zeros for those that are gone."""
        at, chosen = order
        tensor = self.tensors[name]
        for member in (each for each in units.members if each.name == name):
            rows = rows_of(tensor, member, units)  # (the suspect's, each·rest)
            whole = np.zeros((units.size, rows.shape[1]))
            whole[at] = rows[chosen]
            tensor = with_rows(tensor, member, units, whole)
        return tensor


def _quieten(own: Floats, wanted: Floats) -> Floats:
    """Features (units, values) of a suspect, no value of which is far louder than the others.

    What a dead neuron sends, or the vector of a word that is never used, may be anything: neurons
    would be told apart by that alone.
    """
    with np.errstate(over="ignore"):
        sizes = [np.sqrt(np.square(each).mean(axis=0)) for each in (own, wanted)]
    known = (sizes[0] > 0) & (sizes[1] > 0)
    ratios = np.where(known, sizes[0] / np.where(known, sizes[1], 1), 0)  # (values,)
    usual = float(np.median(ratios[known])) if known.any() else 0.0
    if usual == 0:
        return own
    return own / np.where(ratios > _LOUDEST * usual, ratios / usual, 1.0)
