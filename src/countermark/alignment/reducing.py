"""Remove added neurons of a suspect before matching, and give neurons a standard sign.

Neurons are joined or dropped, from the inputs on, only if the suspect has more of them than the
reference. Copies of a neuron become one neuron, and its consumers weigh it as they weighed all
copies together. A neuron whose outputs no consumer uses is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.symmetries import GroupMember, PermutationGroup

Floats: TypeAlias = NDArray[np.float64]
Tensors: TypeAlias = dict[str, Floats]

# Cosine above which two neurons count as copies. It is below 1, because a thief may let two near
# copies send nearly opposite noise, at almost no cost.
_PARALLEL = 1 - 1e-3
_SILENT = 1e-6  # relative to the largest outgoing weights of a neuron of the group


def reduce_neurons(tensors: Tensors, units: Sequence[PermutationGroup]) -> None:
    """Join copies and drop silent neurons, in place, until nothing changes.

    Args:
        tensors: the suspect's tensors, whose axes of neurons may be longer than `units` says.
        units: the reference's permutation groups, those nearest to the inputs first.
    """
    # Neurons added to one group may hide copies in the next group, hence several passes.
    for _ in units:
        changed = [_reduce_group(tensors, each) for each in units if each.grows]
        if not any(changed):
            return


def _reduce_group(tensors: Tensors, units: PermutationGroup) -> bool:
    """Join or drop surplus neurons of one group in place; return true if any are gone."""
    count = _count_neurons(tensors, units)
    if count <= units.size:
        return False
    gone: set[int] = set()
    most = count - units.size
    # No more neurons go than the suspect has in excess: the reference may have copies as well.
    for one, other, ratios in _find_copies(tensors, units):
        if len(gone) < most and not gone & {one, other}:
            _join_copies(tensors, units, (one, other), ratios)
            gone.add(other)
    for silent in _find_unheard(tensors, units):
        if len(gone) < most:
            gone.add(silent)
    if gone:
        kept = np.array([unit for unit in range(count) if unit not in gone])
        for member in units.members:
            at = member.compute_positions(kept)
            tensors[member.name] = np.take(tensors[member.name], at, axis=member.axis)
    return bool(gone)


def _find_copies(
    tensors: Tensors, units: PermutationGroup
) -> list[tuple[int, int, dict[int, float]]]:
    """List pairs of neurons with nearly the same inputs, closest pairs first.

    Returns: the first neuron, the second neuron, and by domain the factor by which the second is
        larger than the first.
    """
    parts: dict[int, list[Floats]] = {}
    for member in units.members:
        if member.power == 1:
            rows = extract_rows(tensors[member.name], member, units)
            parts.setdefault(member.domain, []).append(rows)
    rows_by = {domain: np.concatenate(each, axis=1) for domain, each in parts.items()}
    if not rows_by:
        return []
    # A copy must be parallel in every scale domain; a flip or a scale in one domain is allowed.
    closest = np.minimum.reduce(
        [np.abs(normalise_rows(each) @ normalise_rows(each).T) for each in rows_by.values()]
    )
    pairs = np.argwhere(np.triu(closest, 1) > _PARALLEL)
    pairs = pairs[np.argsort(-closest[tuple(pairs.T)], kind="stable")]
    return [
        (int(a), int(b), {d: float(r[b] @ r[a] / (r[a] @ r[a])) for d, r in rows_by.items()})
        for a, b in pairs
    ]


def _join_copies(
    tensors: Tensors, units: PermutationGroup, pair: tuple[int, int], ratios: dict[int, float]
) -> None:
    """Let all consumers use the first neuron in place of its copy, with the weights added."""
    one, other = (np.array([each]) for each in pair)
    for member in units.members:
        if member.power < 0:
            moved = np.moveaxis(tensors[member.name], member.axis, 0)  # a view
            ratio = ratios.get(member.domain, 1.0)
            moved[member.compute_positions(one)] += ratio * moved[member.compute_positions(other)]
            # The copy is silent now; the caller cuts it out of all tensors.
            moved[member.compute_positions(other)] = 0


def _find_unheard(tensors: Tensors, units: PermutationGroup) -> list[int]:
    """List the neurons whose outgoing weights are negligible in every consumer."""
    heard = np.zeros(_count_neurons(tensors, units))
    for member in units.members:
        if member.power < 0:
            lengths = np.linalg.norm(extract_rows(tensors[member.name], member, units), axis=1)
            heard = np.maximum(heard, lengths / (lengths.max() or 1.0))
    return [int(silent) for silent in np.flatnonzero(heard < _SILENT)]


def _count_neurons(tensors: Tensors, units: PermutationGroup) -> int:
    """Return the number of neurons of a group in the suspect, from its first member."""
    member = units.members[0]
    return int(tensors[member.name].shape[member.axis] // member.each)


def extract_rows(tensor: Floats, member: GroupMember, units: PermutationGroup) -> Floats:
    """Return one row of values for each neuron along the axis of a member: (neurons, each·rest)."""
    moved = np.moveaxis(tensor, member.axis, 0)
    count = moved.shape[0] // member.each if units.grows else units.size
    part = moved[member.offset : member.offset + count * member.each]
    return part.reshape(count, -1)


def replace_rows(
    tensor: Floats, member: GroupMember, units: PermutationGroup, rows: Floats
) -> Floats:
    """Return the tensor with `rows` (neurons, each·rest) in place of its own rows."""
    moved = np.moveaxis(tensor, member.axis, 0)
    part = rows.reshape(len(rows) * member.each, *moved.shape[1:])
    count = moved.shape[0] // member.each if units.grows else units.size
    # A tensor may join several matrices: values before and behind this member stay in place.
    behind = moved[member.offset + count * member.each :]
    joined = np.concatenate([moved[: member.offset], part, behind])
    return np.moveaxis(joined, 0, member.axis)


def turn_upright(tensors: Tensors, units: Sequence[PermutationGroup]) -> list[dict[int, Floats]]:
    """Flip neurons, in place, so that no weight of the last batch norm behind them is negative.

    Returns: the signs (neurons,) of each group, −1 or 1, by domain; undoing them flips back.
    """
    turned = []
    for each in units:
        signs = {
            norm.before: np.where(tensors[norm.weight] < 0, -1.0, 1.0)
            for norm in each.norms
            if norm.weight in tensors and each.domains[norm.before].flippable
        }
        undo_factors(tensors, each, signs)
        turned.append(signs)
    return turned


def undo_factors(tensors: Tensors, units: PermutationGroup, factors: Mapping[int, Floats]) -> None:
    """Undo, in place, the factors (neurons,) of one group, given by domain.

    A norm's statistics absorb the size of a factor; only its sign is undone in the norm's weight.
    """
    for member in units.members:
        if member.domain in factors and member.name in tensors:
            tensor = tensors[member.name]
            powers = factors[member.domain][:, None] ** member.power
            rows = extract_rows(tensor, member, units) / powers
            tensors[member.name] = replace_rows(tensor, member, units, rows)
    for norm in units.norms:
        if norm.before in factors and norm.weight in tensors:
            tensors[norm.weight] = tensors[norm.weight] * np.sign(factors[norm.before])


def normalise_rows(rows: Floats) -> Floats:
    """Scale rows to length 1; rows of zeros stay zeros."""
    with np.errstate(over="ignore"):  # an overflowing length gives zeros
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.where(lengths > 0, lengths, 1)
    return found
