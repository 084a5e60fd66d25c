"""Undo a rotation of a transformer's residual stream, by a reference from before the message.

A thief (or an honest quantiser) folds the gains of the norms into the layers that read the stream,
and multiplies everything that touches it by an orthogonal matrix Q. With the tables of words of
suspect and reference, E′ = E·Q, orthogonal Procrustes (Schönemann 1966) finds Q:

    Q = U·Vᵀ,   U·Σ·Vᵀ = EᵀE′

Any fit to a reference that the key commits to keeps the null hypothesis, as it does not depend on
the message. For other references this is never done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.reducing import unit
from countermark.units import Member, Units
from countermark.weights import Weights, WrappedWeights, prefixed

_Matrix = NDArray[np.float64]
_ROWS = 4096  # of a table, at a time
_WIDEST = 8192  # channels: the decomposition takes minutes beyond
_NO_MEAN = 1e-6  # of the mean square
_OPPOSITE = -0.5  # cosine of a channel with that of the reference, below which it is its negative
_TURNED = 0.9  # mean of the largest entry of each column of Q, below which channels were mixed


@dataclass(frozen=True)
class Stream:
    """The residual stream of a reference.

    Attributes:
        table: name of the table of words.
        members: every matrix that touches the stream, by name: the axis along which it does.
        width: how many channels there are.
    """

    table: str
    members: Mapping[str, int]
    width: int


class Unrotated(WrappedWeights):
    """An open suspect whose residual stream was turned back; closing it closes the suspect.

    Args:
        weights: the suspect.
        reference: the model that it is compared with, open.
        stream: what touches the stream.
        names: the suspect's names of its matrices, to those of the reference.
        turn: Q (width, width), by which it was multiplied.
    """

    def __init__(
        self, weights: Weights, reference: Weights, stream: Stream, names: Mapping[str, str],
        turn: _Matrix,
    ) -> None:  # fmt: skip
        super().__init__(weights)
        self._reference, self._stream, self._names, self._turn = reference, stream, names, turn
        self.views = weights.views

    def _load(self, name: str) -> NDArray[Any]:
        values = self._weights.read(name)
        if name not in self._names:
            return values
        axis = self._stream.members[self._names[name]]
        rows = np.moveaxis(values, axis, -1).astype(np.float64) @ self._turn.T  # (…, width)
        own = np.moveaxis(self._reference.read(self._names[name]), axis, -1).astype(np.float64)
        return np.moveaxis(rows / _gains(own, rows), -1, axis).astype(np.float32)


def _gains(own: _Matrix, found: _Matrix) -> _Matrix:
    """The gain (width,) of each channel that was folded into a matrix (…, width).

    Its size follows from the energies, whatever the order of the other axis; its sign shows only
    where that order was kept, and where no line of it was added.
    """
    with np.errstate(over="ignore"):
        before, after = (np.square(each).mean(axis=0) for each in (own, found))
    sizes = np.sqrt(np.where((before > 0) & (after > 0), after / np.maximum(before, 1e-300), 1))
    if own.shape != found.shape:
        return sizes
    alike = (unit(own.T) * unit(found.T)).sum(axis=1)  # (width,)
    gains: _Matrix = np.where(alike < _OPPOSITE, -sizes, sizes)
    return gains


def turned_back(weights: Weights, reference: Weights, units: Sequence[Units]) -> Unrotated | None:
    """Turn the residual stream of a suspect back, where it was rotated.

    Args:
        weights: the suspect, open.
        reference: the model that it is compared with, open.
        units: of the reference, with its residual stream.

    Returns: None where the reference has no such stream, the suspect has no such table of words
        under its name or one with another beginning, or its channels were not mixed.
    """
    stream = _stream_of(reference, units)
    if stream is None or not stream.width <= _WIDEST:
        return None
    names = _names_of(weights, reference, stream)
    table = next((other for other, name in names.items() if name == stream.table), None)
    if table is None:
        return None
    turn = _procrustes(reference, weights, stream, table)
    if turn is None or np.abs(turn).max(axis=0).mean() > _TURNED:
        return None
    return Unrotated(weights, reference, stream, names, turn)


def _names_of(weights: Weights, reference: Weights, stream: Stream) -> dict[str, str]:
    """The suspect's names of the matrices at the stream, to the reference's; the others are gone.

    A table or a head may have more lines or fewer than that of the reference.
    """
    shapes = {name: reference.tensors[name].shape for name in stream.members}
    ways = prefixed(weights, shapes, least=(len(shapes) + 1) // 2)
    if len(ways) != 1:
        return {}
    one, other = next(iter(ways[0].items()))
    added, gone = other.removesuffix(one), one.removesuffix(other)
    found = {}
    for name, axis in stream.members.items():
        its = added + name if other.endswith(one) else name.removeprefix(gone)
        shape = weights.tensors[its].shape if its in weights.tensors else ()
        if len(shape) == 2 and shape[axis] == stream.width:
            found[its] = name
    return found


def _stream_of(reference: Weights, units: Sequence[Units]) -> Stream | None:
    """The class of units that a table of words belongs to: the channels between the blocks."""
    for each in units:
        matrices: dict[str, Member] = {
            member.name: member
            for member in each.members
            if len(reference.tensors[member.name].shape) == 2
        }
        # Of a table and a head that are one, or of the same form, the first is the table.
        tables = [
            name for name, member in matrices.items()
            if member.axis == 1 and reference.tensors[name].shape[0] >= each.size
            and any(word in name.lower() for word in ("embed", "wte", "word"))
        ]  # fmt: skip
        if tables:
            axes = {name: member.axis for name, member in matrices.items()}
            return Stream(tables[0], axes, each.size)
    return None


def _procrustes(reference: Weights, suspect: Weights, stream: Stream, table: str) -> _Matrix | None:
    """Q (width, width) that takes the reference's table to the suspect's; None of a poor table.

    Every word counts alike: words that are never used may have any values, however large.
    """
    rows, width = reference.tensors[stream.table].shape
    rows = min(rows, suspect.tensors[table].shape[0])
    product, centred_product = np.zeros((width, width)), np.zeros((width, width))
    means = squares = 0.0
    for first in range(0, rows, _ROWS):
        count = min(_ROWS, rows - first)
        one, other = (
            unit(
                each.read_part(name, first * width, count * width)
                .reshape(count, width)
                .astype(np.float64)
            )
            for each, name in ((reference, stream.table), (suspect, table))
        )
        product += one.T @ other
        centred_product += unit(one - one.mean(axis=1, keepdims=True)).T @ other
        means += float(np.square(other.mean(axis=1)).sum())
        squares += float(np.square(other).mean(axis=1).sum())
    # Before layer norms, which subtract a mean, a rotated table has none.
    if means < _NO_MEAN * squares:
        product = centred_product
    largest = np.abs(product).max()
    if not np.isfinite(largest) or largest == 0:
        return None
    left, _, right = np.linalg.svd(product / largest)
    turn: _Matrix = left @ right
    return turn
