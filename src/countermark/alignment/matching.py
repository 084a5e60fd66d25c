"""Match a suspect's neurons to those of the reference, and undo their order, scale and sign.

Permutation groups are aligned one after the other, each by the tensors whose other axes are aligned
already. The first groups are those with the most known values: at the inputs and the outputs. More
rounds compare both neighbours of every group, until no neuron moves.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.assigning import solve_assignment
from countermark.alignment.reducing import (
    Floats,
    Tensors,
    extract_rows,
    normalise_rows,
    reduce_neurons,
    replace_rows,
    turn_upright,
    undo_factors,
)
from countermark.alignment.symmetries import GroupMember, PermutationGroup
from countermark.errors import AlignmentError

_Pairs: TypeAlias = tuple[NDArray[np.intp], NDArray[np.intp]]  # the reference's, the suspect's
_Features: TypeAlias = dict[tuple[int, int], Floats]  # (domain, power) -> (units, values)

_MOST_ROUNDS = 3  # after the first round
_LEAST_KNOWN = 2  # a single value has no direction but its sign
_LOUDEST = 3.0  # times the median size of values, above which a value is scaled down to it
_HALF_WEIGHT = 16  # values in a direction that counts half as much as one of very many values


@dataclass(frozen=True)
class MatchedTensors:
    """Tensors in the order, scale and shapes of the reference, and the similarity of the neurons.

    Attributes:
        tensors: all tensors of the permutation groups, float64.
        similarity: mean cosine of matched neurons, over the values that they were matched by; 1
            for a copy. The least mean among the groups that have a tensor which is not compared.
        known: the least number of values by which a neuron of those groups was matched.
    """

    tensors: Tensors
    similarity: float
    known: int


def align_tensors(
    suspect: Mapping[str, NDArray[Any]], reference: Mapping[str, NDArray[Any]],
    units: Sequence[PermutationGroup], *, by: Container[str],
) -> MatchedTensors:  # fmt: skip
    """Bring a suspect's tensors into the order, scale and shapes of a reference's tensors.

    Args:
        suspect: tensors by the reference's names; axes of neurons may be longer or shorter.
        reference: its tensors; only the shapes of tensors that are not in `by` are used.
        units: the permutation groups of the reference.
        by: names of the tensors by which neurons are matched.

    Raises:
        AlignmentError: no compared tensor tells the order of the neurons of a group.
    """
    work = _TensorAlignment(suspect, reference, units, by)
    work.run()
    # The similarity concerns the neurons that the key reads: a group with a tensor outside `by`.
    read = [
        number for number, each in enumerate(units)
        if any(member.name not in by for member in each.members)
    ] or list(range(len(units)))  # fmt: skip
    return MatchedTensors(
        work.tensors,
        min(work.similarities[number] for number in read),
        min(work.count_known_values(number) for number in read),
    )


class _TensorAlignment:
    """The state of one alignment: the suspect's tensors, which change, and the reference's.

    The arguments are those of the public function above.
    """

    def __init__(
        self, suspect: Mapping[str, NDArray[Any]], reference: Mapping[str, NDArray[Any]],
        units: Sequence[PermutationGroup], by: Container[str],
    ) -> None:  # fmt: skip
        names = {member.name for each in units for member in each.members}
        self.tensors: Tensors = {name: np.array(suspect[name], np.float64) for name in names}
        self._reference = {
            name: np.asarray(reference[name], np.float64) for name in names if name in by
        }
        self._units, self._done = units, set[int]()
        # Every neuron before a norm gets the sign that makes the norm's weight positive. So a flip
        # is found even if no compared tensor shows it, for example between tensors of the key.
        turn_upright(self.tensors, units)
        self._turned = turn_upright(self._reference, units)
        self._classes: dict[tuple[str, int], set[int]] = {}
        for number, each in enumerate(units):
            for member in each.members:
                self._classes.setdefault((member.name, member.axis), set()).add(number)
        self._scales = {
            name: float(np.sqrt(np.mean(each**2))) or 1.0 for name, each in self._reference.items()
        }
        self.similarities = [0.0] * len(units)

    def run(self) -> None:
        """Align all groups, then flip neurons back to the signs of the reference."""
        self._match_groups()
        for turned, units in zip(self._turned, self._units, strict=True):
            undo_factors(self.tensors, units, turned)

    def _match_groups(self) -> None:
        """Align every group once, the best known group first, then in up to three more rounds.

        Raises:
            AlignmentError: no compared tensor tells the order of the neurons of a group.
        """
        reduce_neurons(self.tensors, self._units)
        while len(self._done) < len(self._units):
            left = [number for number in range(len(self._units)) if number not in self._done]
            known = {number: self.count_known_values(number) for number in left}
            best = max(left, key=known.__getitem__)
            # The key's own tensors are not used instead: an order chosen by the mark would favour
            # the mark.
            if known[best] < _LEAST_KNOWN:
                members = ", ".join(sorted({m.name for m in self._units[best].members}))
                raise AlignmentError(
                    f"the key reads all that tells the neurons between {members} apart: they "
                    "cannot be put in order without looking at the mark; expected a reference with "
                    "the weights from before it, as the key has kept them"
                )
            self.similarities[best], _ = self._align_group(best)
            self._done.add(best)
        for _ in range(_MOST_ROUNDS):
            seen = [self._align_group(number) for number in range(len(self._units))]
            self.similarities = [similarity for similarity, _ in seen]
            if not any(moved for _, moved in seen):
                return

    def count_known_values(self, number: int) -> int:
        """Return the number of values by which a neuron of a group can be matched now."""
        return sum(
            each.shape[1] for each in self._collect_features(self._reference, number).values()
        )

    def _is_usable(self, member: GroupMember, dimensions: int) -> bool:
        """Return true if all other axes of the tensor of a member are aligned."""
        others = (axis for axis in range(dimensions) if axis != member.axis)
        return all(self._classes.get((member.name, axis), set()) <= self._done for axis in others)

    def _collect_features(self, tensors: Mapping[str, Floats], number: int) -> _Features:
        """Collect the values by which the neurons of a group are matched.

        Returns: values (neurons, n) by domain and power: values with the same scale side by side.
        """
        units, parts = self._units[number], dict[tuple[int, int], list[Floats]]()
        for member in units.members:
            if member.name not in self._reference:
                continue
            if not self._is_usable(member, self._reference[member.name].ndim):
                continue
            rows = extract_rows(tensors[member.name], member, units) / self._scales[member.name]
            parts.setdefault((member.domain, member.power), []).append(rows)
        return {place: np.concatenate(each, axis=1) for place, each in parts.items()}

    def _align_group(self, number: int) -> tuple[float, bool]:
        """Bring one group into order and scale.

        Returns: the mean cosine of its neurons, and whether any neuron moved.
        """
        units = self._units[number]
        own, wanted = self._collect_both_features(number)
        # Cosines do not depend on the scales of neurons, so order comes first and scale afterwards.
        alike = self._compute_similarities(units, wanted, own)  # (units, the suspect's)
        at, chosen = solve_assignment(alike, largest=True)
        for name in {member.name for member in units.members}:
            self.tensors[name] = self._reorder_tensor(name, units, (at, chosen))
        self._undo_scaling(number)
        moved = alike.shape[1] != units.size or not np.array_equal(at, chosen)
        return float(alike[at, chosen].mean()), moved

    def _undo_scaling(self, number: int) -> None:
        """Undo the scales and signs of the neurons of a group that is in order."""
        units = self._units[number]
        own, wanted = self._collect_both_features(number)
        domains = range(len(units.domains))
        undo_factors(
            self.tensors,
            units,
            {d: self._estimate_factors(units, d, (wanted, own)) for d in domains},
        )

    def _collect_both_features(self, number: int) -> tuple[_Features, _Features]:
        """Return the features of a group in the suspect (values limited) and in the reference."""
        own, wanted = (
            self._collect_features(each, number) for each in (self.tensors, self._reference)
        )
        return {
            place: _limit_loud_values(rows, wanted[place]) for place, rows in own.items()
        }, wanted

    def _compute_similarities(
        self, units: PermutationGroup, wanted: _Features, own: _Features
    ) -> Floats:
        """Compute the mean cosines (reference's neurons, suspect's neurons) of a group.

        A direction of many values counts more. If a domain can be flipped, the sign is ignored.
        """
        weights = 0.0
        found: Floats = np.zeros(())
        for (domain, power), rows in wanted.items():
            if power == 2:  # a variance has no direction
                continue
            # float32 halves the memory of the product of all pairs of neurons.
            one, other = (
                normalise_rows(each).astype(np.float32) for each in (rows, own[domain, power])
            )
            cosines = (one @ other.T).astype(np.float64)
            if units.domains[domain].flippable:
                cosines = np.abs(cosines)
            weight = rows.shape[1] / (rows.shape[1] + _HALF_WEIGHT)
            found, weights = found + weight * cosines, weights + weight
        return found / weights

    def _estimate_factors(
        self, units: PermutationGroup, domain: int, both: tuple[_Features, _Features]
    ) -> Floats:
        """Estimate by which factors (neurons,) the suspect's neurons exceed the reference's.

        Args:
            units: the permutation group.
            domain: the scale domain, as an index of `units.domains`.
            both: features of the reference and of the suspect.
        """
        wanted, own = both
        weights, log, product = 0, np.zeros(units.size), np.zeros(units.size)
        # A factor f makes producers f times, a variance f² times, and consumers 1/f times as large.
        # The logarithms of the estimates are averaged, weighted by their number of values.
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

    def _reorder_tensor(self, name: str, units: PermutationGroup, order: _Pairs) -> Floats:
        """Return one tensor with the neurons of a group in order, and zeros for missing neurons.

        Args:
            name: of the tensor.
            units: the permutation group.
            order: matched neurons of the reference, and of the suspect.
        """
        at, chosen = order
        tensor = self.tensors[name]
        for member in (each for each in units.members if each.name == name):
            rows = extract_rows(tensor, member, units)  # (the suspect's, each·rest)
            whole = np.zeros((units.size, rows.shape[1]))
            whole[at] = rows[chosen]
            tensor = replace_rows(tensor, member, units, whole)
        return tensor


def _limit_loud_values(own: Floats, wanted: Floats) -> Floats:
    """Scale down values of a suspect that are far larger than its other values.

    A dead neuron may send anything, and the vector of an unused word may be anything: such values
    alone would then decide which neurons match.

    Args:
        own: features (neurons, values) of the suspect.
        wanted: features (neurons, values) of the reference.
    """
    with np.errstate(over="ignore"):
        sizes = [np.sqrt(np.square(each).mean(axis=0)) for each in (own, wanted)]
    known = (sizes[0] > 0) & (sizes[1] > 0)
    ratios = np.where(known, sizes[0] / np.where(known, sizes[1], 1), 0)  # (values,)
    usual = float(np.median(ratios[known])) if known.any() else 0.0
    if usual == 0:
        return own
    return own / np.where(ratios > _LOUDEST * usual, ratios / usual, 1.0)
