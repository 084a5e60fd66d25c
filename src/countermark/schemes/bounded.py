"""In which units a linear mark reads the values of a tensor: bounded, or plain.

    bounded   x_ij = clip(w_ij / (r_i · c_j), −3, 3)     every row and column has mean square 1
    plain     x_ij = w_ij / rms(w)                       as keys of earlier versions are read

A hidden unit that never fires may have any outgoing weights, and a unit that nothing leaves any
incoming ones: read plainly, a few such units of large weights outweigh all others, and the mark is
gone at no cost. Bounded, a row or a column counts as much as any other whatever its scale, so that
units which were rescaled against their consumers are read as before, too. The form was chosen by
the figures of `docs/bounded_readings.md`; r and c are found in turn (Sinkhorn and Knopp 1967). A
null hypothesis about the key's secret holds for any such function of the suspect alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import prod
from typing import final

import numpy as np
from numpy.typing import NDArray

from countermark.weights import Array

BOUND = 3.0
"""The largest absolute value that is read."""

ROUNDS = 3
"""How often rows and columns are normalised in turn."""

LEAST_ENTRIES = 4
"""Lines of fewer entries are not normalised: of one entry nothing but its sign would be left."""

_LARGEST = 1e30  # no weight is as large; the squares of larger ones would overflow
_AT_ONCE = 1 << 20  # values whose squares are summed at a time
_PASSES, _NEAR = 400, 1e-6  # of a spread that is made narrower, until it stays as it is

Values = NDArray[np.float64]


class Scales(ABC):
    """The units of consecutive values of a tensor, counted from the first of them."""

    @abstractmethod
    def between(self, start: int, stop: int) -> Values:
        """Give the unit of each value from `start` to before `stop`; never 0."""

    @abstractmethod
    def bound(self, values: Values) -> Values:
        """Bound values that are given in these units."""

    @final
    def read(self, part: Array, start: int, stop: int) -> Values:
        """Read the values from `start` to before `stop` of a part (n,) in these units."""
        values = part[start:stop].astype(np.float64)
        return self.bound(values / self.between(start, start + len(values)))


@dataclass(frozen=True)
class PlainScale(Scales):
    """One unit for all values, the root of their mean square; what is read has no bound."""

    unit: float

    def between(self, start: int, stop: int) -> Values:
        """Give the one unit."""
        return np.full(stop - start, self.unit)

    def bound(self, values: Values) -> Values:
        """Leave them as they are."""
        return values


@dataclass(frozen=True)
class LineScales(Scales):
    """A unit for each row and each column, whose product is that of a value; values are bounded.

    Attributes:
        rows: (k,) of the rows of the first axis, from the one that holds the first value on.
        columns: (d,) of the columns of the second axis.
        inner: values of each row and column: the product of all further axes.
        offset: place of the first value in its row.
    """

    rows: Values = field(repr=False)
    columns: Values = field(repr=False)
    inner: int
    offset: int

    def between(self, start: int, stop: int) -> Values:
        """Multiply the units of row and column."""
        row = len(self.columns) * self.inner
        first, last = (self.offset + start) // row, -(-(self.offset + stop) // row)
        units = np.outer(self.rows[first:last], np.repeat(self.columns, self.inner)).reshape(-1)
        begin = self.offset + start - first * row
        return units[begin : begin + stop - start]

    def bound(self, values: Values) -> Values:
        """Cut them off at `BOUND`."""
        return np.clip(values, -BOUND, BOUND)


def plain_scale(part: Array) -> PlainScale:
    """Find the one unit of values (n,): 1 where all are 0."""
    return PlainScale(spread_of(part) or 1.0)


def line_scales(part: Array, shape: tuple[int, ...], start: int = 0) -> LineScales:
    """Find the units of rows and columns.

    Args:
        part: (n,) consecutive values of a tensor in C order, finite.
        shape: of the whole tensor; of a vector, and of a part that covers too few rows, the values
            are one row whose columns have no units of their own.
        start: place of the first value in the tensor.
    """
    row = prod(shape[1:])
    if len(shape) < 2 or len(part) < LEAST_ENTRIES * row:
        unit = np.array([bounded_spread(part) or 1.0])
        return LineScales(unit, np.ones(1), max(1, len(part)), 0)
    width, inner, offset = shape[1], prod(shape[2:]), start % row
    count = -(-(offset + len(part)) // row)
    padded = np.zeros(count * row)
    np.clip(part, -_LARGEST, _LARGEST, out=padded[offset : offset + len(part)], casting="unsafe")
    largest = float(np.abs(padded).max()) or 1.0
    padded /= largest  # so that no square is lost
    energy = np.square(padded, out=padded).reshape(count, width, inner).sum(axis=2)  # (k, d)
    entries = _entries((count, width, inner), offset, len(part))  # (k, d)
    by_row, by_column = np.ones(count), np.ones(width)
    for _ in range(ROUNDS):
        by_row = _root_mean(energy @ by_column**-2, entries.sum(axis=1))
        by_column = _root_mean(by_row**-2 @ energy, entries.sum(axis=0))
    return LineScales(by_row * largest, by_column, inner, offset)


def spread_of(part: Array) -> float:
    """The root mean square of finite values; 0 where all are 0."""
    largest = float(np.abs(part).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    squares = 0.0
    for at in range(0, len(part), _AT_ONCE):
        values = part[at : at + _AT_ONCE].astype(np.float64)
        values /= largest  # so that no square overflows
        squares += float(np.dot(values, values))
    return largest * math.sqrt(squares / len(part))


def bounded_spread(part: Array) -> float:
    """The root mean square of values when each counts for two of them at most; 0 where all are 0.

    Up to a quarter of the values may be as large as they like.
    """
    unit = spread_of(part)
    for _ in range(_PASSES):
        narrower = spread_of(np.clip(part, -2 * unit, 2 * unit))
        if narrower > unit * (1 - _NEAR):
            break
        unit = narrower
    return unit


def _entries(sizes: tuple[int, int, int], offset: int, count: int) -> Values:
    """How many values of each row and column (k, d) are there: fewer in rows read in part."""
    rows, width, inner = sizes
    found = np.full((rows, width), float(inner))
    ends = np.arange(1, width + 1) * inner  # of the columns, in a row
    found[0] -= np.clip(offset - (ends - inner), 0, inner)
    found[-1] -= np.clip(ends - (offset + count - (rows - 1) * width * inner), 0, inner)
    return found


def _root_mean(sums: Values, entries: Values) -> Values:
    """The root mean square of lines; of one of zeros, or of too few entries, that over all."""
    usable = (entries >= LEAST_ENTRIES) & (sums > 0)
    over_all = sums.sum() / entries.sum() or 1.0
    return np.sqrt(np.where(usable, sums / np.maximum(1.0, entries), over_all))
