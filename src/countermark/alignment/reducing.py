"""Neurons as they are compared: added ones joined or dropped, flipped ones turned upright.

Neurons are joined or dropped, from the inputs on, only where the suspect has more of them than the
reference. Copies of a neuron become one, which its consumers hear as they heard all; what no
consumer hears is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.units import Member, Units

Floats: TypeAlias = NDArray[np.float64]
Tensors: TypeAlias = dict[str, Floats]

# Cosine above which two neurons hear nearly the same. Where copies differ by less, a thief may let
# them send nearly opposite noise at next to no cost.
_PARALLEL = 1 - 1e-3
_SILENT = 1e-6  # of the loudest neuron, below which one is not heard


def reduce(tensors: Tensors, units: Sequence[Units]) -> None:
    """Join copies and drop silent neurons, in place, until nothing changes.

    Args:
        tensors: the suspect's, whose axes of neurons may be longer than `units` says.
        units: the reference's classes, those nearest to the inputs first.
    """
    for _ in units:  # what is added to one class may hide copies in the next
        changed = [_reduced(tensors, each) for each in units if each.grows]
        if not any(changed):
            return


def _reduced(tensors: Tensors, units: Units) -> bool:
    count = _count(tensors, units)
    if count <= units.size:
        return False
    gone: set[int] = set()
    most = count - units.size
    for one, other, ratios in _copies(tensors, units):
        if len(gone) < most and not gone & {one, other}:
            _join(tensors, units, (one, other), ratios)
            gone.add(other)
    for silent in _unheard(tensors, units):
        if len(gone) < most:
            gone.add(silent)
    if gone:
        kept = np.array([unit for unit in range(count) if unit not in gone])
        for member in units.members:
            at = member.positions(kept)
            tensors[member.name] = np.take(tensors[member.name], at, axis=member.axis)
    return bool(gone)


def _copies(tensors: Tensors, units: Units) -> list[tuple[int, int, dict[int, float]]]:
    """Pairs of neurons that hear nearly the same, closest first, and the second one's factors."""
    parts: dict[int, list[Floats]] = {}
    for member in units.members:
        if member.power == 1:
            rows = rows_of(tensors[member.name], member, units)
            parts.setdefault(member.domain, []).append(rows)
    rows_by = {domain: np.concatenate(each, axis=1) for domain, each in parts.items()}
    if not rows_by:
        return []
    closest = np.minimum.reduce([np.abs(unit(each) @ unit(each).T) for each in rows_by.values()])
    pairs = np.argwhere(np.triu(closest, 1) > _PARALLEL)
    pairs = pairs[np.argsort(-closest[tuple(pairs.T)], kind="stable")]
    return [
        (int(a), int(b), {d: float(r[b] @ r[a] / (r[a] @ r[a])) for d, r in rows_by.items()})
        for a, b in pairs
    ]


def _join(tensors: Tensors, units: Units, pair: tuple[int, int], ratios: dict[int, float]) -> None:
    """Let the consumers hear the first neuron where they heard its copy."""
    one, other = (np.array([each]) for each in pair)
    for member in units.members:
        if member.power < 0:
            moved = np.moveaxis(tensors[member.name], member.axis, 0)  # a view
            ratio = ratios.get(member.domain, 1.0)
            moved[member.positions(one)] += ratio * moved[member.positions(other)]
            moved[member.positions(other)] = 0


def _unheard(tensors: Tensors, units: Units) -> list[int]:
    """Neurons that no consumer hears."""
    heard = np.zeros(_count(tensors, units))
    for member in units.members:
        if member.power < 0:
            lengths = np.linalg.norm(rows_of(tensors[member.name], member, units), axis=1)
            heard = np.maximum(heard, lengths / (lengths.max() or 1.0))
    return [int(silent) for silent in np.flatnonzero(heard < _SILENT)]


def _count(tensors: Tensors, units: Units) -> int:
    member = units.members[0]
    return int(tensors[member.name].shape[member.axis] // member.each)


def rows_of(tensor: Floats, member: Member, units: Units) -> Floats:
    """One row of values for each neuron: (neurons, each·rest)."""
    moved = np.moveaxis(tensor, member.axis, 0)
    count = moved.shape[0] // member.each if units.grows else units.size
    part = moved[member.offset : member.offset + count * member.each]
    return part.reshape(count, -1)


def with_rows(tensor: Floats, member: Member, units: Units, rows: Floats) -> Floats:
    """The tensor with such rows in place of its own, along the axis of a member."""
    moved = np.moveaxis(tensor, member.axis, 0)
    part = rows.reshape(len(rows) * member.each, *moved.shape[1:])
    count = moved.shape[0] // member.each if units.grows else units.size
    behind = moved[member.offset + count * member.each :]
    joined = np.concatenate([moved[: member.offset], part, behind])
    return np.moveaxis(joined, 0, member.axis)


def upright(tensors: Tensors, units: Sequence[Units]) -> list[dict[int, Floats]]:
    """Flip neurons, in place, so that no weight of the last batch norm behind them is negative.

    Returns: the signs (neurons,) of each class, −1 or 1, by domain; `scale` by them flips back.
    """
    turned = []
    for each in units:
        signs = {
            norm.before: np.where(tensors[norm.weight] < 0, -1.0, 1.0)
            for norm in each.norms
            if norm.weight in tensors and each.domains[norm.before].flippable
        }
        scale(tensors, each, signs)
        turned.append(signs)
    return turned


def scale(tensors: Tensors, units: Units, factors: Mapping[int, Floats]) -> None:
    """Undo, in place, what neurons of one class were scaled by: factors (neurons,) by domain."""
    for member in units.members:
        if member.domain in factors and member.name in tensors:
            tensor = tensors[member.name]
            powers = factors[member.domain][:, None] ** member.power
            rows = rows_of(tensor, member, units) / powers
            tensors[member.name] = with_rows(tensor, member, units, rows)
    for norm in units.norms:
        if norm.before in factors and norm.weight in tensors:
            tensors[norm.weight] = tensors[norm.weight] * np.sign(factors[norm.before])


def unit(rows: Floats) -> Floats:
    """Rows of length 1; zeros stay zeros."""
    with np.errstate(over="ignore"):  # what no square holds has no direction
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.where(lengths > 0, lengths, 1)
    return found
