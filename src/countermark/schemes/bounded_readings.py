"""Scales in which a linear mark reads the values of a tensor: bounded, or plain.

    bounded   x_ij = clip(w_ij / (r_i · c_j), −3, 3)     every row and column has mean square 1
    plain     x_ij = w_ij / rms(w)                       as keys of earlier versions are read

A hidden unit that never fires may have any outgoing weights, and a hidden unit without effect may
have any incoming weights. In a plain reading, a few of these units with large weights outweigh all
other units, and a thief removes the mark at no cost. In a bounded reading, every row and column
counts the same whatever its scale is. Hidden units that were rescaled against their consumers are
therefore read as before, too. The form was chosen by the figures of `docs/bounded_readings.md`.
The scales r and c are computed in turn (Sinkhorn and Knopp 1967). A null hypothesis about the
secret of the key holds for any function of the suspect alone, and so for this one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import prod
from typing import final

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints import Array

BOUND = 3.0
"""The largest absolute value that is read."""

ROUNDS = 3
"""How often rows and columns are normalised in turn."""

LEAST_ENTRIES = 4
"""Lines of fewer entries are not normalised: of one entry nothing but its sign would be left."""

_LARGEST = 1e30  # no real weight is as large; the squares of larger weights would overflow
_AT_ONCE = 1 << 20  # values whose squares are summed at a time
_PASSES, _NEAR = 400, 1e-6  # most passes of `compute_bounded_spread`; relative change that ends it

Values = NDArray[np.float64]


class Scales(ABC):
    """The scales of consecutive values of a tensor, counted from the first of these values."""

    @abstractmethod
    def expand_scales(self, start: int, stop: int) -> Values:
        """Return the scale of each value from `start` to before `stop`; no scale is 0."""

    @abstractmethod
    def apply_bound(self, values: Values) -> Values:
        """Bound values that are already divided by their scales."""

    @final
    def read(self, part: Array, start: int, stop: int) -> Values:
        """Read the values from `start` to before `stop` of a part (n,) in these scales."""
        values = part[start:stop].astype(np.float64)
        return self.apply_bound(values / self.expand_scales(start, start + len(values)))


@dataclass(frozen=True)
class PlainScale(Scales):
    """One scale for all values, the root of their mean square; values have no bound."""

    unit: float

    def expand_scales(self, start: int, stop: int) -> Values:
        """Return the one scale, repeated for each value."""
        return np.full(stop - start, self.unit)

    def apply_bound(self, values: Values) -> Values:
        """Return the values unchanged."""
        return values


@dataclass(frozen=True)
class LineScales(Scales):
    """A scale for each row and each column; a value is divided by both and then bounded.

    Attributes:
        rows: (k,) scales of the rows of the first axis, from the row of the first value on.
        columns: (d,) scales of the columns of the second axis.
        inner: how many values one row and one column share: the product of all further axes.
        offset: place of the first value in its row.
    """

    rows: Values = field(repr=False)
    columns: Values = field(repr=False)
    inner: int
    offset: int

    def expand_scales(self, start: int, stop: int) -> Values:
        """Return the product of the row's and the column's scale for each value."""
        row = len(self.columns) * self.inner
        # Whole rows are expanded: from the row of `start` to the row of the last value, rounded up.
        first, last = (self.offset + start) // row, -(-(self.offset + stop) // row)
        units = np.outer(self.rows[first:last], np.repeat(self.columns, self.inner)).reshape(-1)
        begin = self.offset + start - first * row
        return units[begin : begin + stop - start]

    def apply_bound(self, values: Values) -> Values:
        """Clip values to ±`BOUND`."""
        return np.clip(values, -BOUND, BOUND)


def compute_plain_scale(part: Array) -> PlainScale:
    """Compute the one scale of values (n,); it is 1 where all values are 0."""
    return PlainScale(compute_spread(part) or 1.0)


def compute_line_scales(part: Array, shape: tuple[int, ...], start: int = 0) -> LineScales:
    """Compute the scales of rows and columns.

    Args:
        part: (n,) consecutive values of a tensor in C order, finite.
        shape: of the whole tensor. A vector, and a part with fewer than `LEAST_ENTRIES` whole rows,
            is read as one row whose columns have no scales of their own.
        start: place of the first value in the tensor.
    """
    row = prod(shape[1:])
    if len(shape) < 2 or len(part) < LEAST_ENTRIES * row:
        # With no columns to divide by, a plain root mean square would let a few large values shrink
        # all others; hence the bounded spread.
        unit = np.array([compute_bounded_spread(part) or 1.0])
        return LineScales(unit, np.ones(1), max(1, len(part)), 0)
    width, inner, offset = shape[1], prod(shape[2:]), start % row
    # A part may begin and end within a row. Zeros fill its first and last row; `entries` counts
    # only values that are there.
    count = -(-(offset + len(part)) // row)
    padded = np.zeros(count * row)
    np.clip(part, -_LARGEST, _LARGEST, out=padded[offset : offset + len(part)], casting="unsafe")
    largest = float(np.abs(padded).max()) or 1.0
    padded /= largest  # so that the squares of small weights do not underflow
    energy = np.square(padded, out=padded).reshape(count, width, inner).sum(axis=2)  # (k, d)
    entries = _count_entries((count, width, inner), offset, len(part))  # (k, d)
    by_row, by_column = np.ones(count), np.ones(width)
    # Sinkhorn and Knopp: normalise rows under the current columns, then columns under those rows.
    for _ in range(ROUNDS):
        by_row = _compute_line_spreads(energy @ by_column**-2, entries.sum(axis=1))
        by_column = _compute_line_spreads(by_row**-2 @ energy, entries.sum(axis=0))
    return LineScales(by_row * largest, by_column, inner, offset)


def compute_spread(part: Array) -> float:
    """Compute the root mean square of finite values (n,); it is 0 where all values are 0."""
    largest = float(np.abs(part).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    squares = 0.0
    for at in range(0, len(part), _AT_ONCE):
        values = part[at : at + _AT_ONCE].astype(np.float64)
        values /= largest  # so that no square overflows
        squares += float(np.dot(values, values))
    return largest * math.sqrt(squares / len(part))


def compute_bounded_spread(part: Array) -> float:
    """Compute the root mean square of values when each value is clipped to twice that spread.

    The spread is 0 where all values are 0. Up to a quarter of the values may be arbitrarily large:
    a clipped value counts four times the mean square.
    """
    unit = compute_spread(part)
    # Each pass clips at twice the last spread, which can only make the spread smaller. The loop
    # ends where the spread no longer changes, after _PASSES at the latest.
    for _ in range(_PASSES):
        narrower = compute_spread(np.clip(part, -2 * unit, 2 * unit))
        if narrower > unit * (1 - _NEAR):
            break
        unit = narrower
    return unit


def _count_entries(sizes: tuple[int, int, int], offset: int, count: int) -> Values:
    """Count the values of each row and column (k, d) in a part that may begin and end within a row.

    Args:
        sizes: k rows, d columns, and how many values one row and one column share.
        offset: place of the first value in the first row.
        count: how many values the part has.
    """
    rows, width, inner = sizes
    found = np.full((rows, width), float(inner))
    ends = np.arange(1, width + 1) * inner  # where each column ends in a row
    found[0] -= np.clip(offset - (ends - inner), 0, inner)
    found[-1] -= np.clip(ends - (offset + count - (rows - 1) * width * inner), 0, inner)
    return found


def _compute_line_spreads(sums: Values, entries: Values) -> Values:
    """Compute the root mean square of lines from their sums of squares and counts of entries.

    A line of zeros, or of fewer than `LEAST_ENTRIES` entries, gets the value over all lines.
    """
    # A scale must never be 0, and one value divided by its own size leaves nothing but a sign.
    usable = (entries >= LEAST_ENTRIES) & (sums > 0)
    over_all = sums.sum() / entries.sum() or 1.0
    return np.sqrt(np.where(usable, sums / np.maximum(1.0, entries), over_all))
