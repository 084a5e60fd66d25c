"""The least shift that gives each bit its margin in spite of the rounding of stored values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from countermark._internal.progress import show_progress
from countermark.checkpoints import Weights
from countermark.checkpoints.dtypes import round_to_dtype
from countermark.errors import MarkNotTakenError
from countermark.keys.key import Key
from countermark.keys.messages import Bits
from countermark.schemes.stamp.scheme import CarrierStream, Stamp

_PIECE = 1 << 20  # values that are shifted at a time: bounds the memory
# The first 4 passes correct shifts up and down; later passes only raise them, so that the search
# ends. After 24 passes a bit counts as unreachable.
_EITHER_WAY, _MOST_PASSES = 4, 24
_NEAR, _STEP = 0.03, 2.0  # tolerance, relative to the missing reading; largest correction

Shifts = NDArray[np.float64]
"""For each bit (T,), the shift of its values along their signs, in spreads."""


@dataclass(frozen=True)
class Piece:
    """Some consecutive values of a tensor, before and after the shift.

    Attributes:
        name: name of the tensor.
        start: position of the first value, in C order.
        before, after: (n,) the values as read; `after` is rounded to the tensor's dtype.
        towards: (T,) contribution of `after` to the reading of each bit.
    """

    name: str
    start: int
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    towards: NDArray[np.float64]


def shift_values(weights: Weights, scheme: Stamp, key: Key, shifts: Shifts) -> Iterator[Piece]:
    """Yield all values that a key reads, shifted, in pieces.

    The checkpoint is read once, a tensor at a time.
    """
    # Carriers are drawn in the order of key.tensors: a reader takes them in the same order.
    carriers, places = CarrierStream(key), scheme.draw_places(key.tensors, key.material)
    moves = shifts.any()
    for name in key.tensors:
        place, dtype = places[name], weights.tensors[name].dtype
        part = weights.read_part(name, place.start, len(place))
        scales = scheme.compute_scales(part, key.tensors[name], place.start)
        for start in range(0, len(part), _PIECE):
            before = part[start : start + _PIECE].astype(np.float64)
            bits, signs = carriers.take_carriers(len(before))
            after, units = before, scales.expand_scales(start, start + len(before))
            if moves and part.any():  # a tensor of zeros stays as it is
                after = round_to_dtype(before + units * shifts[bits] * signs, dtype)
            signed = signs * scales.apply_bound(after / units)
            towards = np.bincount(bits, weights=signed, minlength=scheme.bits).astype(np.float64)
            yield Piece(name, place.start + start, before, after, towards)


def solve_shifts(weights: Weights, scheme: Stamp, key: Key, bits: Bits) -> Shifts:
    """Return the shift (T,) that gives each bit its margin; 0 if a bit has its margin already.

    The first guess is exact for values that are not rounded. For rounded values each pass measures
    the gain of a shift and corrects the shift. For rounded values, too, the values nearest to an
    equal shift are the least change with the same gain.

    Args:
        weights: the open checkpoint.
        scheme: the configuration.
        key: the key that shall read the bits.
        bits: (T,) the bits to read.

    Raises:
        MarkNotTakenError: no shift gives some bit its margin.
    """
    signed = 2.0 * bits - 1.0
    served = _count_served(scheme, key)
    with show_progress("margins", None) as advance:
        bare = _compute_readings(weights, scheme, key, np.zeros(scheme.bits))
        # The margin is in standard deviations of a reading: √n for a sum over n values of spread 1.
        lacking = np.maximum(0.0, scheme.margin * np.sqrt(served) - signed * bare)
        sizes = lacking / np.maximum(1, served)
        for turn in range(_MOST_PASSES):
            gained = signed * (_compute_readings(weights, scheme, key, signed * sizes) - bare)
            advance(1)
            off = gained < lacking * (1 - _NEAR)
            if turn < _EITHER_WAY:
                off |= gained > lacking * (1 + _NEAR)
            off &= lacking > 0
            if not off.any():
                return signed * sizes
            # Both bounds keep a single correction between a half and a double.
            ratio = lacking[off] / np.maximum(gained[off], lacking[off] / _STEP)
            sizes[off] *= np.maximum(ratio, 1 / _STEP)
    raise MarkNotTakenError(
        f"{int(off.sum())} of {scheme.bits} bits do not reach a margin of {scheme.margin:g} "
        "however far their weights move: expected tensors that are not all zeros; take other layers"
    )


def _compute_readings(
    weights: Weights, scheme: Stamp, key: Key, shifts: Shifts
) -> NDArray[np.float64]:
    """Return the readings y (T,) of all bits after the shifts."""
    total = np.zeros(scheme.bits)
    for piece in shift_values(weights, scheme, key, shifts):
        total += piece.towards
    return total


def _count_served(scheme: Stamp, key: Key) -> NDArray[np.int64]:
    """Return the number of values that serve each bit (T,)."""
    carriers, left = CarrierStream(key), scheme.capacity(key.tensors, None)
    served = np.zeros(scheme.bits, dtype=np.int64)
    while left:
        bits, _ = carriers.take_carriers(min(left, _PIECE))
        served += np.bincount(bits, minlength=scheme.bits)
        left -= len(bits)
    return served
