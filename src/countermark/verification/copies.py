"""Compare the neurons of a suspect with those of another model, to find copies without a mark.

A thief can remove a mark from a copy: noise in the free weights of dead units drowns it. The other
neurons are still those of the copied model, and networks that were trained separately do not share
neurons.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from countermark.alignment import Reference, realign_suspect
from countermark.checkpoints import Array, Suspect, Weights, open_weights
from countermark.errors import AlignmentError, ConfigError

# In the same places, a copy needs both: enough units that are alike, and a small chance.
LEAST_SHARE = 0.15  # of the units that are compared
LARGEST_LOG10_P = -9.0
_NEAR = 0.7  # cosine; noise of one standard deviation of the weights leaves as much
_NEAR_CHANGES = 0.4  # with a base: changes are small, and little noise drowns them
_NEAR_ALIGNED, _LEAST_WIDTH_ALIGNED = 0.8, 64  # best of 10,000 random directions: below 0.6
# A few huge weights would decide the cosine of a whole unit.
_CLIP = 4.0  # median absolute values, beyond which a weight counts no more
_MOST_TENSORS, _MOST_UNITS, _MOST_VALUES = 64, 256, 1 << 20  # that are compared
_MOST_ALIGNED = 1 << 26  # values of all tensors, to be aligned
_LEAST_UNITS, _LEAST_WIDTH = 4, 8
# Tables of positions are often computed, and then equal in models trained separately.
_COMPUTED = re.compile(r"position|pos_|wpe|(^|[._])pe($|[._])|relative|rotary|mask", re.IGNORECASE)


@dataclass(frozen=True)
class CopyComparison:
    """How many units of a suspect are the same as those of a model.

    Attributes:
        alike: units that are near to the model's unit in the same place, and nearer to it than to
            every other unit.
        compared: units that were compared.
        log10_p: bounds the chance of as many such units in one tensor, for a model whose hidden
            units stand in an order of their own. 0 if no unit is alike, and after alignment, where
            no chance is known.
        aligned: true if the units were first put into the model's order.
    """

    alike: int = 0
    compared: int = 0
    log10_p: float = 0.0
    aligned: bool = False

    @property
    def is_copy(self) -> bool:
        """Return true if the suspect is a copy of the model, changed or not."""
        enough = self.alike >= max(1.0, LEAST_SHARE * self.compared)
        return enough and (self.aligned or self.log10_p <= LARGEST_LOG10_P)

    def __str__(self) -> str:
        found = f"{self.alike} of {self.compared} neurons that were compared are the same"
        if self.aligned:
            return f"{found} once they are put into its order"
        if self.is_copy:
            found += ", as in fewer than one of a billion models that were trained apart"
        return found


def compare_units(suspect: Suspect, model: Suspect, base: Suspect | None = None) -> CopyComparison:
    """Compare a suspect's units with a model's, in the same places, then after alignment.

    A unit is a row or a column of a tensor; of each tensor the axis with more units in common
    counts. If the model has nothing to do with the suspect, its hidden units could as well stand in
    any other order: the chance that k of them stand where the suspect has its nearest unit is below
    1/k!.

    Args:
        suspect: the model in dispute.
        model: the model that the suspect may be a copy of.
        base: the model that both may have begun with. It is subtracted from both, so that their
            changes are compared; there is no alignment then.

    Raises:
        SuspectError: one of the models cannot be read.
    """
    with open_weights(suspect) as one, open_weights(model) as other:
        if base is None:
            found = _compare_in_place(one, other, None)
            aligned = None if found.is_copy else _compare_aligned(one, model)
            return aligned if aligned is not None and aligned.is_copy else found
        with open_weights(base) as begun:
            return _compare_in_place(one, other, begun)


def _compare_in_place(suspect: Weights, model: Weights, base: Weights | None) -> CopyComparison:
    """Compare units of tensors that have one name and one shape in all models."""
    shared = [
        name for name, info in model.tensors.items()
        if len(info.shape) > 1 and not _COMPUTED.search(name) and all(
            name in each.tensors and each.tensors[name].shape == info.shape
            for each in (suspect, base or model)
        )
    ]  # fmt: skip
    # The largest tensors first: they hold the most units, and only so many are compared.
    shared.sort(key=lambda name: -math.prod(model.tensors[name].shape))
    pairs = []
    for name in shared[:_MOST_TENSORS]:
        one, other = _read_rows(suspect, name), _read_rows(model, name)
        if base is not None:
            begun = _read_rows(base, name)
            one, other = one - begun, other - begun
        if not np.array_equal(other, np.rint(other)):  # whole numbers are indices, not weights
            pairs.append((one, other))
    near = _NEAR if base is None else _NEAR_CHANGES
    alike = compared = most = tests = 0
    for one, other in pairs:
        counts = [count for axis in (0, 1) if (count := _count_alike(one, other, axis, near))[1]]
        # Every axis of every tensor is one more chance for a lucky match (union bound).
        tests += len(counts)
        if counts:
            best = max(counts, key=lambda each: each[0] / each[1])
            alike, compared = alike + best[0], compared + best[1]
            most = max(most, *(count[0] for count in counts))
    # The first inequality of Bonferroni: k given units stand right with a chance of (n-k)!/n!.
    log10_p = math.log10(max(1, tests)) - math.lgamma(most + 1) / math.log(10)
    return CopyComparison(alike, compared, min(0.0, log10_p))


def _compare_aligned(suspect: Weights, model: Suspect) -> CopyComparison | None:
    """Compare units after putting the suspect's units into the model's order.

    Returns: None if the models are too large to align, or cannot be aligned.
    """
    with open_weights(model) as own:
        sizes = {name: info.shape for name, info in own.tensors.items() if len(info.shape) > 1}
    if not sizes or sum(math.prod(shape) for shape in sizes.values()) > _MOST_ALIGNED:
        return None
    try:
        # All tensors count as unmarked: the mark plays no part in this comparison.
        found = realign_suspect(
            suspect, Reference.from_source(model), sizes, unmarked=sizes, partial=True
        )
    except (AlignmentError, ConfigError):
        return None
    alike = compared = 0
    for name, tensor in found.tensors.items():
        one, other = (each.reshape(len(each), -1) for each in (tensor, found.reference[name]))
        # Alignment matched units by similarity: among units of few values some are always near.
        if one.shape == other.shape and one.shape[1] >= _LEAST_WIDTH_ALIGNED:
            count = _count_alike(one[:, :, None], other[:, :, None], 0, _NEAR_ALIGNED)
            alike, compared = alike + count[0], compared + count[1]
    return CopyComparison(alike, compared, aligned=True)


def _read_rows(weights: Weights, name: str) -> Array:
    """Read the first rows of a tensor, as (rows, columns, values of both), as far as compared."""
    shape = weights.tensors[name].shape
    width = math.prod(shape[1:])
    rows = min(shape[0], _MOST_VALUES // max(1, width))
    if not rows:  # one row has more values than are read: no unit is whole
        return np.zeros((0, 0, 0), np.float32)
    return weights.read_part(name, 0, rows * width).reshape(rows, shape[1], -1)


def _count_alike(one: Array, other: Array, axis: int, near: float) -> tuple[int, int]:
    """Count the units along an axis that are near to their own counterpart alone.

    Args:
        one: tensor of the suspect, as (rows, columns, values of both).
        other: tensor of the model, of the same shape.
        axis: 0 for rows, 1 for columns.
        near: least cosine of two units that are alike.

    Returns: units that are alike, and units that were compared; (0, 0) for too few to tell.
    """
    if not one.size:
        return 0, 0
    units = one.shape[axis]
    chosen = np.unique(np.linspace(0, units - 1, min(units, _MOST_UNITS)).astype(np.int64))
    rows = [_make_unit_rows(each, axis, chosen) for each in (one, other)]
    there = rows[0].any(axis=1) & rows[1].any(axis=1)  # a unit of zeros says nothing
    if there.sum() < _LEAST_UNITS or rows[0].shape[1] < _LEAST_WIDTH:
        return 0, 0
    cosines = rows[0][there] @ rows[1][there].T  # (n, n)
    own = cosines.diagonal().copy()
    # What remains are the cosines to all other units, which must be smaller than to its own.
    np.fill_diagonal(cosines, -1)
    return int(((own >= near) & (own > cosines.max(axis=1))).sum()), int(there.sum())


def _make_unit_rows(values: Array, axis: int, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the chosen units as rows of length 1 (n, values), with large weights cut off."""
    sizes = np.abs(values)
    bound = _CLIP * float(np.median(sizes[sizes > 0])) if sizes.any() else 1.0
    rows = np.moveaxis(values, axis, 0)[chosen].reshape(len(chosen), -1).astype(np.float64)
    rows = rows.clip(-bound, bound)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(lengths > 0, lengths, 1.0)
    return rows
