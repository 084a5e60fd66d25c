"""Compute the numbers that codes stand for: number = (code - zero point) * scale + bias.

Scales, zero points and biases are grids: each of their numbers serves a block of a matrix. Codes
are read by rows, so that a part of a tensor costs no more than the rows that it lies in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints.base import Array
from countermark.checkpoints.dtypes import make_float_table

E2M1 = make_float_table(2, 1, 1)
"""The numbers of the 4-bit floats of MXFP4 and NVFP4."""

Codes = NDArray[np.generic]
_AT_ONCE = 1 << 20  # numbers that are computed at a time: bounds the memory
_USUAL_BLOCK = (128, 128)  # as DeepSeek's checkpoints and their followers have them


@dataclass(frozen=True)
class Grid:
    """Numbers of which each serves a block of a matrix (rows, width).

    Attributes:
        values: (a, b) the numbers.
        rows: (rows,) for each row of the matrix, the row of `values` that serves it.
        columns: (width,) the same for each column.
    """

    values: NDArray[np.float64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    def spread(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        """Return the numbers that serve a part of the matrix."""
        # Broadcasting replaces the copies where one number serves whole rows.
        across = self.columns[columns] if self.values.shape[1] > 1 else slice(None)
        return self.values[self.rows[rows]][:, across]


@dataclass(frozen=True)
class RunGrid:
    """Numbers of which each serves a run of values of a matrix, in C order.

    Attributes:
        values: (n,) the numbers.
        run: how many values each of them serves.
        width: of the matrix.
    """

    values: NDArray[np.float64]
    run: int
    width: int

    def spread(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        """Return the numbers that serve a part of the matrix."""
        starts = np.arange(rows.start, rows.stop)[:, None] * self.width
        at = (starts + np.arange(columns.start, columns.stop)) // self.run
        spread: NDArray[np.float64] = self.values[at]
        return spread


@dataclass(frozen=True)
class Grids:
    """The grids of a tensor: scales, and zero points and biases where the format has any."""

    scale: Grid | RunGrid
    zero: Grid | None = None
    bias: Grid | None = None


@dataclass(frozen=True)
class CodedTensor:
    """A tensor that is stored as codes.

    Attributes:
        shape: of the numbers; no axis is empty.
        parts: names of the stored tensors that hold the codes, scales and whatever else is needed.
        read_codes: reads the codes (n, width) of rows, from the first argument up to the second.
        read_grids: reads scales, zero points and biases.
        table: the number of each code; None if the codes are the numbers.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    read_codes: Callable[[int, int], Codes]
    read_grids: Callable[[], Grids]
    table: NDArray[np.float32] | None = None

    def read_part(self, start: int, count: int) -> Array:
        """Compute `count` numbers (count,), in C order from `start` on, from the rows they lie in.

        Raises:
            ValueError: the stored tensors do not fit each other.
        """
        width = self.shape[-1]
        first, last = start // width, -(-(start + count) // width)
        # The caller refuses infinities.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            grids = self.read_grids()  # before the codes: grids that do not fit cost little then
            codes = self.read_codes(first, last)
            found = np.empty(codes.shape, dtype=np.float32)
            for rows, columns in _cut_pieces(*codes.shape):
                part = codes[rows, columns]
                numbers = (part if self.table is None else self.table[part]).astype(np.float64)
                place = slice(first + rows.start, first + rows.stop), columns
                if grids.zero is not None:
                    numbers -= grids.zero.spread(*place)
                numbers *= grids.scale.spread(*place)
                if grids.bias is not None:
                    numbers += grids.bias.spread(*place)
                found[rows, columns] = numbers
        return found.reshape(-1)[start - first * width :][:count]


Found: TypeAlias = tuple[str, CodedTensor] | None
"""The name of a weight and the tensor that it is stored as; None if a tensor holds no codes."""


def _cut_pieces(count: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield parts of a matrix (count, width) that cover it, each of at most `_AT_ONCE` values."""
    # A row alone may exceed the limit, because the shapes are hostile input.
    across = min(width, _AT_ONCE)
    down = _AT_ONCE // across
    for row in range(0, count, down):
        for column in range(0, width, across):
            yield (
                slice(row, min(count, row + down)),
                slice(column, min(width, column + across)),
            )


def unpack_codes(packed: NDArray[np.uint8], bits: int, width: int) -> NDArray[np.uint8]:
    """Unpack the first `width` codes of each row of bytes (rows, n), the lowest bits first.

    Codes of 3, 5, 6 or 7 bits may begin in one byte and end in the next. Little-endian words of any
    size hold their codes in the same order as their bytes do.
    """
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        return codes.reshape(len(packed), packed.shape[1] * 8 // bits)[:, :width]
    # Every `bits` bytes hold 8 codes.
    groups = -(-packed.shape[1] // bits)
    whole = np.zeros((len(packed), groups * bits), dtype=np.uint8)
    whole[:, : packed.shape[1]] = packed
    words = np.zeros((len(packed), groups), dtype=np.uint64)
    for at in range(bits):
        words |= whole[:, at::bits].astype(np.uint64) << np.uint64(8 * at)
    found = np.empty((len(packed), groups, 8), dtype=np.uint8)
    for at in range(8):
        found[:, :, at] = (words >> np.uint64(bits * at)) & np.uint64((1 << bits) - 1)
    return found.reshape(len(packed), groups * 8)[:, :width]


def make_grid(
    values: NDArray[np.float64],
    shape: tuple[int, ...],
    block: tuple[int, int] | None = None,
    columns: NDArray[np.int64] | None = None,
) -> Grid:
    """Make the grid of a tensor of this shape, whose last two axes are the axes of its matrices.

    Args:
        values: one number, one for each index of the first axis, or one for each block.
        shape: of the tensor.
        block: height and width of a block, where the checkpoint states them. Otherwise, or if they
            do not fit, blocks of 128 x 128 are tried, then blocks of equal sizes.
        columns: (width,) the column of `values` that serves each column of the tensor, where
            columns are not in the order of their blocks.

    Raises:
        ValueError: the count of numbers fits neither the rows nor their blocks.
    """
    height, width = (1, *shape)[-2:]
    stack = prod(shape[:-2])
    for down, across in _list_layouts(values.shape, shape):
        # Blocks of columns in another order may be of any sizes.
        if (
            found := _fit_block(height, width, down, across if columns is None else 1, block)
        ) is None:
            continue
        if columns is None:
            columns = np.arange(width) // found[1]
        elif columns.shape != (width,) or columns.min() < 0 or columns.max() >= across:
            raise ValueError(f"columns that are in none of {across} groups")
        rows = np.arange(stack * height)
        # One number for the whole tensor serves every matrix of the stack.
        each = down if values.size > down * across else 0
        places = rows // height * each + rows % height // found[0]
        return Grid(values.reshape(-1, across), places, columns)
    raise ValueError(f"{values.size} numbers for {stack * height} rows of {width}")


def _list_layouts(grid: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the rows and columns that a grid of this shape may have for each matrix of a tensor."""
    stack, size = prod(shape[:-2]), prod(grid)
    if size == 1:
        yield 1, 1
    if len(grid) == len(shape) > 1 and grid[:-2] == shape[:-2]:
        yield grid[-2], grid[-1]
    if grid == shape[:-1]:
        yield shape[-2], 1
    if grid == shape[:-2]:
        yield 1, 1
    # Some libraries store the numbers of all blocks of a matrix in one row or column.
    rows = shape[-2] if len(shape) > 1 else 1
    if size and size % (stack * rows) == 0:
        yield rows, size // (stack * rows)


def _fit_block(
    height: int, width: int, down: int, across: int, block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return height and width of the blocks of a grid (down, across), or None if none fit."""
    for tall, wide in (block, _USUAL_BLOCK) if block else (_USUAL_BLOCK,):
        # The last blocks of a row and of a column may be incomplete.
        if (-(-height // tall), -(-width // wide)) == (down, across):
            return tall, wide
    if not down or not across or height % down or width % across:
        return None
    return height // down, width // across
