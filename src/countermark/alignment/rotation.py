"""Undo a rotation of a transformer's residual stream, by a reference from before the message.

A thief (or an honest quantiser) folds the gains of the norms into the layers that read the stream,
and multiplies every tensor at the stream by an orthogonal matrix Q. From the embedding tables of
the reference and the suspect, E and E′ = E·Q, orthogonal Procrustes (Schönemann 1966) finds Q:

    Q = U·Vᵀ,   U·Σ·Vᵀ = EᵀE′

Any fit to a reference that the key commits to keeps the null hypothesis valid, because the fit does
not depend on the message. The rotation is never undone by another reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.reducing import normalise_rows
from countermark.alignment.symmetries import GroupMember, PermutationGroup
from countermark.checkpoints import Weights, WrappedWeights, find_prefixed_names

_Matrix = NDArray[np.float64]
_ROWS = 4096  # rows of a table that are read at a time
_WIDEST = 8192  # channels; the singular value decomposition of wider streams takes minutes
_NO_MEAN = 1e-6  # relative to the mean square
_OPPOSITE = -0.5  # cosine with the reference's channel, below which a channel was flipped
_TURNED = 0.9  # mean of the largest entries of Q's columns, up to which channels were mixed


@dataclass(frozen=True)
class ReferenceStream:
    """The residual stream of a reference.

    Attributes:
        table: name of the embedding table.
        members: every matrix that reads or writes the stream: its name and the axis of the stream.
        width: number of channels.
    """

    table: str
    members: Mapping[str, int]
    width: int


class UnrotatedWeights(WrappedWeights):
    """An open suspect whose residual stream is rotated back; closing it closes the suspect.

    Args:
        weights: the suspect.
        reference: the model that the suspect is compared with, open.
        stream: the reference's residual stream.
        names: maps the suspect's names of the matrices to those of the reference.
        turn: Q (width, width), by which the suspect's stream was multiplied.
    """

    def __init__(
        self, weights: Weights, reference: Weights, stream: ReferenceStream, names: Mapping[str, str],
        turn: _Matrix,
    ) -> None:  # fmt: skip
        super().__init__(weights)
        self._reference, self._stream, self._names, self._turn = reference, stream, names, turn
        self.views = weights.views

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor; a matrix at the stream is multiplied by Qᵀ and divided by its gains."""
        values = self._weights.read(name)
        if name not in self._names:
            return values
        axis = self._stream.members[self._names[name]]
        rows = np.moveaxis(values, axis, -1).astype(np.float64) @ self._turn.T  # (…, width)
        own = np.moveaxis(self._reference.read(self._names[name]), axis, -1).astype(np.float64)
        return np.moveaxis(rows / _estimate_gains(own, rows), -1, axis).astype(np.float32)


def _estimate_gains(own: _Matrix, found: _Matrix) -> _Matrix:
    """Estimate the gain (width,) of each channel that was folded into a matrix (…, width).

    The size of a gain follows from the channel's energies, whatever the order of the other axis.
    Its sign is visible only if that order is unchanged and no line was added.

    Args:
        own: the reference's matrix.
        found: the suspect's matrix, rotated back.
    """
    with np.errstate(over="ignore"):
        before, after = (np.square(each).mean(axis=0) for each in (own, found))
    # The limit 1e-300 only avoids a division by zero in entries that `where` discards.
    sizes = np.sqrt(np.where((before > 0) & (after > 0), after / np.maximum(before, 1e-300), 1))
    if own.shape != found.shape:
        return sizes
    alike = (normalise_rows(own.T) * normalise_rows(found.T)).sum(axis=1)  # (width,)
    gains: _Matrix = np.where(alike < _OPPOSITE, -sizes, sizes)
    return gains


def undo_rotation(
    weights: Weights, reference: Weights, units: Sequence[PermutationGroup]
) -> UnrotatedWeights | None:
    """Rotate the residual stream of a suspect back, if it was rotated.

    Args:
        weights: the suspect, open.
        reference: the model that the suspect is compared with, open.
        units: permutation groups of the reference, with its residual stream.

    Returns: None if the reference has no residual stream or one too wide, the suspect has no
        embedding table of that name (apart from a prefix), or its channels were not mixed.
    """
    stream = _find_stream(reference, units)
    if stream is None or not stream.width <= _WIDEST:
        return None
    names = _find_stream_names(weights, reference, stream)
    table = next((other for other, name in names.items() if name == stream.table), None)
    if table is None:
        return None
    turn = _solve_procrustes(reference, weights, stream, table)
    # A Q close to a signed permutation only reorders channels, which the matching handles.
    if turn is None or np.abs(turn).max(axis=0).mean() > _TURNED:
        return None
    return UnrotatedWeights(weights, reference, stream, names, turn)


def _find_stream_names(
    weights: Weights, reference: Weights, stream: ReferenceStream
) -> dict[str, str]:
    """Map the suspect's names of the matrices at the stream to the reference's names.

    Matrices that the suspect lacks are left out. A table or a head may have more or fewer lines
    than in the reference.
    """
    shapes = {name: reference.tensors[name].shape for name in stream.members}
    ways = find_prefixed_names(weights, shapes, least=(len(shapes) + 1) // 2)
    # With two possible prefixes, the names do not tell which matrix is which.
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


def _find_stream(reference: Weights, units: Sequence[PermutationGroup]) -> ReferenceStream | None:
    """Find the permutation group that contains an embedding table: the channels between blocks."""
    for each in units:
        matrices: dict[str, GroupMember] = {
            member.name: member
            for member in each.members
            if len(reference.tensors[member.name].shape) == 2
        }
        # If a table and a head are tied or have the same shape, the first one is the table.
        tables = [
            name for name, member in matrices.items()
            if member.axis == 1 and reference.tensors[name].shape[0] >= each.size
            and any(word in name.lower() for word in ("embed", "wte", "word"))
        ]  # fmt: skip
        if tables:
            axes = {name: member.axis for name, member in matrices.items()}
            return ReferenceStream(tables[0], axes, each.size)
    return None


def _solve_procrustes(
    reference: Weights, suspect: Weights, stream: ReferenceStream, table: str
) -> _Matrix | None:
    """Compute Q (width, width), which takes the reference's embedding table to the suspect's.

    Every row counts alike, because rows of unused words may have any values, however large.

    Returns: None if the tables give no finite, nonzero product.
    """
    rows, width = reference.tensors[stream.table].shape
    rows = min(rows, suspect.tensors[table].shape[0])
    product, centred_product = np.zeros((width, width)), np.zeros((width, width))
    means = squares = 0.0
    for first in range(0, rows, _ROWS):
        count = min(_ROWS, rows - first)
        one, other = (
            normalise_rows(
                each.read_part(name, first * width, count * width)
                .reshape(count, width)
                .astype(np.float64)
            )
            for each, name in ((reference, stream.table), (suspect, table))
        )
        product += one.T @ other
        centred_product += normalise_rows(one - one.mean(axis=1, keepdims=True)).T @ other
        means += float(np.square(other.mean(axis=1)).sum())
        squares += float(np.square(other).mean(axis=1).sum())
    # A suspect with layer norms had the mean of each row removed before it was rotated, so the
    # reference's rows are compared without their means as well.
    if means < _NO_MEAN * squares:
        product = centred_product
    largest = np.abs(product).max()
    if not np.isfinite(largest) or largest == 0:
        return None
    # Division by the largest entry avoids overflow and does not change U and V.
    left, _, right = np.linalg.svd(product / largest)
    turn: _Matrix = left @ right
    return turn
