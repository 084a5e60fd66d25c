"""The least shift that gives each bit its margin, found across the rounding of stored values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from countermark.errors import MarkNotTakenError
from countermark.key import Key
from countermark.message import Bits
from countermark.progress import progress
from countermark.schemes.stamp import Carriers, Stamp
from countermark.weights import Weights
from countermark.weights.dtypes import rounded

_PIECE = 1 << 20  # values that are shifted at a time
_EITHER_WAY, _MOST_PASSES = 4, 24
_NEAR, _STEP = 0.03, 2.0  # of what a bit lacks: how near is near enough; the largest correction

Shifts = NDArray[np.float64]
"""For each bit (T,), by how many spreads its values are moved along their signs."""


@dataclass(frozen=True)
class Piece:
    """Some consecutive values of a tensor, before and after.

    Attributes:
        name: of the tensor.
        start: of the first value, in C order.
        before, after: (n,) as they are read; `after` is rounded to the tensor's dtype.
        towards: (T,) what `after` adds to the reading of each bit.
    """

    name: str
    start: int
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    towards: NDArray[np.float64]


def shifted(weights: Weights, scheme: Stamp, key: Key, shifts: Shifts) -> Iterator[Piece]:
    """All values that a key reads, moved: the checkpoint is read once, a tensor at a time."""
    carriers, places = Carriers(key), scheme.places(key.tensors, key.material)
    moves = shifts.any()
    for name in key.tensors:
        place, dtype = places[name], weights.tensors[name].dtype
        part = weights.read_part(name, place.start, len(place))
        scales = scheme.scales(part, key.tensors[name], place.start)
        for start in range(0, len(part), _PIECE):
            before = part[start : start + _PIECE].astype(np.float64)
            bits, signs = carriers.take(len(before))
            after, units = before, scales.between(start, start + len(before))
            if moves and part.any():  # a tensor of zeros stays as it is
                after = rounded(before + units * shifts[bits] * signs, dtype)
            signed = signs * scales.bound(after / units)
            towards = np.bincount(bits, weights=signed, minlength=scheme.bits).astype(np.float64)
            yield Piece(name, place.start + start, before, after, towards)


def solve(weights: Weights, scheme: Stamp, key: Key, bits: Bits) -> Shifts:
    """The shift of each bit (T,) that shall be read, 0 where it has its margin already.

    The first guess is exact for values that are not rounded. Where they are, what a shift gains is
    measured and the shift corrected: on rounded values, too, the nearest to an equal shift of all
    is the least change that gains as much.

    Raises:
        MarkNotTakenError: no shift gives some bit its margin.
    """
    signed = 2.0 * bits - 1.0
    served = _served(scheme, key)
    with progress("margins", None) as advance:
        bare = _reading(weights, scheme, key, np.zeros(scheme.bits))
        lacking = np.maximum(0.0, scheme.margin * np.sqrt(served) - signed * bare)
        sizes = lacking / np.maximum(1, served)
        for turn in range(_MOST_PASSES):
            gained = signed * (_reading(weights, scheme, key, signed * sizes) - bare)
            advance(1)
            off = gained < lacking * (1 - _NEAR)
            if turn < _EITHER_WAY:
                off |= gained > lacking * (1 + _NEAR)
            off &= lacking > 0
            if not off.any():
                return signed * sizes
            ratio = lacking[off] / np.maximum(gained[off], lacking[off] / _STEP)
            sizes[off] *= np.maximum(ratio, 1 / _STEP)
    raise MarkNotTakenError(
        f"{int(off.sum())} of {scheme.bits} bits do not reach a margin of {scheme.margin:g} "
        "however far their weights move: expected tensors that are not all zeros; take other layers"
    )


def _reading(weights: Weights, scheme: Stamp, key: Key, shifts: Shifts) -> NDArray[np.float64]:
    total = np.zeros(scheme.bits)
    for piece in shifted(weights, scheme, key, shifts):
        total += piece.towards
    return total


def _served(scheme: Stamp, key: Key) -> NDArray[np.int64]:
    """How many values serve each bit (T,)."""
    carriers, left = Carriers(key), scheme.capacity(key.tensors, None)
    served = np.zeros(scheme.bits, dtype=np.int64)
    while left:
        bits, _ = carriers.take(min(left, _PIECE))
        served += np.bincount(bits, minlength=scheme.bits)
        left -= len(bits)
    return served
