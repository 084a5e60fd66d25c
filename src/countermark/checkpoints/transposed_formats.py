"""Know codes of transposed weights: GPTQ, AWQ and the experts of gpt-oss. See `coded_formats`."""

from __future__ import annotations

from math import prod

import numpy as np

from countermark.checkpoints.code_source import CodeSource
from countermark.checkpoints.coded_tensor import (
    E2M1,
    CodedTensor,
    Codes,
    Found,
    Grids,
    make_grid,
    unpack_codes,
)

# Names of forms of GPTQ that store zero points as they are, not less one.
_PLAIN_ZEROS = ("gptq_v2", "auto_round", "auto_round:gptqmodel")


def find_gptq(source: CodeSource, name: str) -> Found:
    """Find codes of GPTQ: words along the inputs, zero points that are stored less one."""
    layer, shape = name.removesuffix(".qweight"), source.get_shape(name)
    zeros, scales, order = (f"{layer}.{part}" for part in ("qzeros", "scales", "g_idx"))
    grid, packed = source.get_shape(scales), source.get_shape(zeros)
    if layer == name or len(shape) != 2 or len(grid) != 2 or not prod(shape) or not prod(grid):
        return None
    if {source.get_word(name), source.get_word(zeros)} != {"I32"} or len(packed) != 2:
        return None
    words, outputs = shape
    bits, rest = divmod(32 * packed[1], outputs)
    if rest:  # padded words: the configuration says how many bits a code has
        bits = source.get_size("bits")
    if not 1 <= bits <= 8 or grid[1] != outputs or packed != (grid[0], -(-outputs * bits // 32)):
        return None
    inputs = 32 * words // bits
    stated = [source.config.get(each) for each in ("checkpoint_format", "format", "packing_format")]
    offset = 0 if any(each in stated for each in _PLAIN_ZEROS) else 1

    def read_codes(first: int, last: int) -> Codes:
        # The words of a column hold a row of the weight.
        columns = np.ascontiguousarray(source.read_matrix(name)[:, first:last].T)
        return unpack_codes(columns.view(np.uint8), bits, inputs)

    def read_grids() -> Grids:
        found = source.read_group_order(order)
        points = unpack_codes(source.read_rows(zeros, 0, grid[0]), bits, outputs).astype(np.int64)
        points = (points + offset) & ((1 << bits) - 1)
        block = (1, source.get_size("group_size") or 128)
        factors = source.read_numbers(scales).T
        return Grids(
            make_grid(factors, (outputs, inputs), block, found),
            make_grid(points.T.astype(np.float64), (outputs, inputs), block, found),
        )

    parts = tuple(filter(source.has, (name, zeros, scales, order)))
    return f"{layer}.weight", CodedTensor((outputs, inputs), parts, read_codes, read_grids)


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in a word of the codes of eight outputs


def find_awq(source: CodeSource, name: str) -> Found:
    """Find codes of AWQ: 4 bits, words along the outputs, whose codes are interleaved."""
    layer, shape = name.removesuffix(".qweight"), source.get_shape(name)
    zeros, scales = f"{layer}.qzeros", f"{layer}.scales"
    grid = source.get_shape(scales)
    if layer == name or len(shape) != 2 or len(grid) != 2 or not prod(shape) or not prod(grid):
        return None
    if {source.get_word(name), source.get_word(zeros)} != {"I32"}:
        return None
    inputs, words = shape
    if grid[1] != 8 * words or source.get_shape(zeros) != (grid[0], words) or inputs % grid[0]:
        return None
    outputs = 8 * words

    def unpack_columns(name: str, first: int, last: int) -> Codes:
        begin = first // 8
        found = np.ascontiguousarray(source.read_matrix(name)[:, begin : -(-last // 8)])
        codes = unpack_codes(found.view(np.uint8), 4, 8 * found.shape[1])
        straight = codes.reshape(len(codes), -1, 8)[:, :, _AWQ_ORDER].reshape(len(codes), -1)
        return straight[:, first - 8 * begin : last - 8 * begin].T

    def read_grids() -> Grids:
        points = unpack_columns(zeros, 0, outputs).astype(np.float64)
        block = (1, inputs // grid[0])
        return Grids(
            make_grid(source.read_numbers(scales).T, (outputs, inputs), block),
            make_grid(points, (outputs, inputs), block),
        )

    return f"{layer}.weight", CodedTensor(
        (outputs, inputs),
        (name, zeros, scales),
        lambda first, last: unpack_columns(name, first, last),
        read_grids,
    )


def find_expert_blocks(source: CodeSource, name: str) -> Found:
    """Find the experts of gpt-oss in MXFP4; their weights are transposed in each expert."""
    base, shape = name.removesuffix("_blocks"), source.get_shape(name)
    scale = f"{base}_scales"
    if base == name or len(shape) != 4 or not prod(shape) or shape[3] != 16:
        return None
    if (source.get_word(name), source.get_word(scale)) != ("U8", "U8"):
        return None
    if source.get_shape(scale) != shape[:-1]:
        return None
    experts, height, groups = shape[:-1]
    width = 32 * groups

    def read_codes(first: int, last: int) -> Codes:
        # Whole experts are read, because a row of the weight crosses all rows of its expert.
        begin, end = first // width, -(-last // width)
        rows = source.read_rows(name, begin * height * groups, end * height * groups)
        codes = unpack_codes(rows.reshape(-1, groups * 16), 4, width)
        turned = codes.reshape(-1, height, width).swapaxes(1, 2).reshape(-1, height)
        return turned[first - begin * width : last - begin * width]

    def read_grids() -> Grids:
        scales = source.read_powers(scale).swapaxes(1, 2)
        return Grids(make_grid(scales, (experts, width, height), (32, 1)))

    return base, CodedTensor((experts, width, height), (name, scale), read_codes, read_grids, E2M1)
