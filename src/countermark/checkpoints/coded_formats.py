"""Know tensors that are stored as codes by their names, dtypes and shapes; one function a format.

    find_bitsandbytes   NAME, NAME.absmax, NAME.quant_map, NAME.quant_state.bitsandbytes__nf4 or fp4
    find_small_floats   NAME or NAME_packed (two or more codes a byte), NAME_scale for 16 or 32 codes;
                        NAME_global_scale or NAME_scale_2: MXFP4, MXFP6 and NVFP4
    find_packed         NAME_packed, NAME_scale, NAME_shape, NAME_zero_point: compressed-tensors
    find_expert_blocks  NAME_blocks, NAME_scales: the experts of gpt-oss in MXFP4, transposed
    find_mlx_integers, find_mlx_floats
                        LAYER.weight (32-bit words), LAYER.scales, LAYER.biases: MLX
    find_gptq, find_awq LAYER.qweight, LAYER.qzeros, LAYER.scales, LAYER.g_idx, transposed
    find_torchao_int4   LAYER._weight_qdata, LAYER._weight_scale, LAYER._weight_zero_point
    find_scaled         NAME (int8 or 8-bit floats) with any scale of `_SCALES`, and zero points

Each function takes the name of a stored tensor and returns the name of the weight with the way to
compute its numbers, or None if the tensor has another form. Tensors that no function knows are left
as they are. Which function knows a tensor depends on names, dtypes, shapes and the configuration
only: there is one way to read a tensor, and the numbers that are read cannot choose it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints.bitsandbytes_format import find_bitsandbytes
from countermark.checkpoints.code_source import CodeSource
from countermark.checkpoints.coded_tensor import (
    E2M1,
    CodedTensor,
    Found,
    Grids,
    make_grid,
    unpack_codes,
)
from countermark.checkpoints.dtypes import decode_values, make_float_table
from countermark.checkpoints.transposed_formats import find_awq, find_expert_blocks, find_gptq

_E2M3 = make_float_table(2, 3, 1)
# The numbers of codes that fill a byte each, by dtype.
_NUMBERS = {
    word: decode_values(bytes(range(256)), word).astype(np.float32)
    for word in ("I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
}
_POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of two

# Names of codes and of their scale and zero points; "*" is the same text in all of them. The last
# is the number by which the scale is divided.
_SCALES: tuple[tuple[str, str, str, str, float], ...] = (
    ("*._data", "*", "*._scale", "", 1.0),  # quanto
    ("*._weight_qdata", "*.weight", "*._weight_scale", "*._weight_zero_point", 1.0),  # torchao
    ("*.weight", "*.weight", "*.SCB", "", 127.0),  # bitsandbytes: the row's largest magnitude
    ("*", "*", "*_scale_inv", "", 1.0),  # DeepSeek; the name notwithstanding, a factor
    ("*", "*", "*_scale", "*_zero_point", 1.0),  # compressed-tensors, ModelOpt
    ("*.weight", "*.weight", "*.scale_weight", "", 1.0),  # ComfyUI
    ("*.weight", "*.weight", "*.qscale_weight", "", 1.0),  # Mistral
    ("*.weight", "*.weight", "*.scale", "", 1.0),  # DeepSeek's own code
)


def find_scaled(source: CodeSource, name: str) -> Found:
    """Find int8 codes or 8-bit floats that have a scale for the tensor, each row or each block."""
    word, shape = source.get_word(name), source.get_shape(name)
    if word not in _NUMBERS or not prod(shape) or not shape:
        return None
    for codes, weight, scale, zero, divisor in _SCALES:
        prefix, suffix = codes.split("*")
        base = name.removeprefix(prefix).removesuffix(suffix)
        names = [each.replace("*", base) for each in (weight, scale, zero)]
        if f"{base}{suffix}" != name or not source.has(names[1]):
            continue
        points = names[2] if source.has(names[2]) else ""

        def read_grids(scale: str = names[1], points: str = points, by: float = divisor) -> Grids:
            block = source.get_block()
            return Grids(
                make_grid(source.read_powers(scale) / by, shape, block),
                make_grid(source.read_numbers(points), shape, block) if points else None,
            )

        parts = tuple(filter(None, (name, names[1], points)))
        return names[0], CodedTensor(
            shape, parts, source.make_code_reader(name, 8, shape[-1]), read_grids, _NUMBERS[word]
        )  # fmt: skip
    return None


def find_packed(source: CodeSource, name: str) -> Found:
    """Find codes of compressed-tensors that are packed into 32-bit words, with or without zeros."""
    base, packed = name.removesuffix("_packed"), source.get_shape(name)
    scale, about, zero = (f"{base}_{part}" for part in ("scale", "shape", "zero_point"))
    if base == name or source.get_word(name) != "I32" or source.get_shape(about) != (2,):
        return None
    if not source.has(scale) or len(packed) != 2 or not prod(packed):
        return None
    height, width = (int(each) for each in source.read_numbers(about))
    # No tensor says how many bits a code has: it follows from the widths before and after packing.
    sizes = (b for b in (8, 4, 2, 6, 3, 5, 7, 1) if (height, -(-width * b // 32)) == packed)
    if width < 1 or not (bits := next(sizes, 0)):
        return None
    groups = source.get_shape(scale)[-1:] or (1,)
    has_zero, has_packed_zero = source.has(zero), source.get_word(zero) == "I32"
    # Zero points are packed along the rows.
    if has_packed_zero and source.get_shape(zero) != (-(-height * bits // 32), *groups):
        return None
    order = f"{base}_g_idx"
    parts = tuple(filter(source.has, (name, scale, about, zero, order)))
    middle = 1 << (bits - 1)  # is added to each code and each packed zero point

    def read_grids() -> Grids:
        columns = source.read_group_order(order)
        if has_packed_zero:
            words = np.ascontiguousarray(source.read_matrix(zero).T)
            zeros = unpack_codes(words.view(np.uint8), bits, height).T.astype(np.float64)
        else:
            zeros = middle + (source.read_numbers(zero) if has_zero else np.zeros((1, 1)))
        block = (1, source.get_size("group_size") or 128)
        return Grids(
            make_grid(source.read_numbers(scale), (height, width), block, columns),
            make_grid(zeros, (height, width), block, columns if has_zero else None),
        )

    return base, CodedTensor(
        (height, width),
        parts,
        source.make_code_reader(name, bits, width),
        read_grids,
    )


def find_small_floats(source: CodeSource, name: str) -> Found:
    """Find floats of 4 or 6 bits with a scale for each run of 16 or 32 in a row."""
    base, shape = name.removesuffix("_packed"), source.get_shape(name)
    scale, word = f"{base}_scale", source.get_word(f"{base}_scale")
    if not source.has(scale):  # DeepSeek's own code names the scale so
        scale = f"{base.removesuffix('.weight')}.scale"
        word = source.get_word(scale)
    grid = source.get_shape(scale)
    if source.get_word(name) not in ("U8", "I8") or len(shape) < 2 or not prod(shape):
        return None
    if grid[:-1] != shape[:-1] or word not in (*_POWERS, "F8_E4M3"):
        return None
    run, sizes = (16, ((4, E2M1),)) if word == "F8_E4M3" else (32, ((4, E2M1), (6, _E2M3)))
    width = run * grid[-1]
    fits = (each for each in sizes if width * each[0] == 8 * shape[-1])
    if (found := next(fits, None)) is None:
        return None
    bits, table = found
    divisor, factor = f"{base}_global_scale", f"{base}_scale_2"
    parts = tuple(filter(source.has, (name, scale, divisor, factor)))

    def read_grids() -> Grids:
        scales = source.read_powers(scale)
        # One number for the tensor, or one for each of its matrices.
        if factor in parts:
            scales = scales * _align(source.read_numbers(factor), grid)
        if divisor in parts:
            scales = scales / _align(source.read_numbers(divisor), grid)
        return Grids(make_grid(scales, (*shape[:-1], width)))

    return base, CodedTensor(
        (*shape[:-1], width),
        parts,
        source.make_code_reader(name, bits, width),
        read_grids,
        table,
    )


def _align(values: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return one number, or one for each index of the first axis, ready to scale that shape.

    Raises:
        ValueError: there is another count of numbers.
    """
    if values.size not in (1, shape[0]):
        raise ValueError(f"{values.size} numbers for a tensor of {shape[0]} parts")
    return values.reshape(-1, *(1,) * (len(shape) - 1))


# MLX's forms without biases: bits, codes that share a scale, numbers of the codes, dtype of scales.
_MLX_FLOATS = (
    (4, 32, E2M1, "F8_E8M0"),
    (4, 16, E2M1, "F8_E4M3"),
    (8, 32, _NUMBERS["F8_E4M3"], "F8_E8M0"),
)


def find_mlx_integers(source: CodeSource, name: str) -> Found:
    """Find codes of MLX in 32-bit words, with scales and biases of groups."""
    layer, shape = name.removesuffix(".weight"), source.get_shape(name)
    scales, biases = f"{layer}.scales", f"{layer}.biases"
    grid = source.get_shape(scales)
    if layer == name or source.get_word(name) != "U32" or source.get_shape(biases) != grid:
        return None
    if (filled := _count_group_bits(shape, grid)) is None:
        return None
    bits, group = _choose_mlx_sizes(source, layer, filled)
    if not bits:
        return None
    whole = (*shape[:-1], group * grid[-1])

    def read_grids() -> Grids:
        factors, added = source.read_numbers(scales), source.read_numbers(biases)
        block = (1, group)
        return Grids(make_grid(factors, whole, block), bias=make_grid(added, whole, block))

    return name, CodedTensor(
        whole, (name, scales, biases), source.make_code_reader(name, bits, whole[-1]), read_grids
    )


def find_mlx_floats(source: CodeSource, name: str) -> Found:
    """Find small floats of MLX in 32-bit words, with scales that are floats of a byte."""
    layer, shape = name.removesuffix(".weight"), source.get_shape(name)
    scales = f"{layer}.scales"
    grid = source.get_shape(scales)
    if layer == name or (source.get_word(name), source.get_word(scales)) != ("U32", "U8"):
        return None
    filled = _count_group_bits(shape, grid)
    fits = (each for each in _MLX_FLOATS if each[0] * each[1] == filled)
    if (found := next(fits, None)) is None:
        return None
    bits, group, table, word = found
    whole = (*shape[:-1], group * grid[-1])

    def read_grids() -> Grids:
        values = decode_values(source.read_matrix(scales).tobytes(), word)
        return Grids(make_grid(values.reshape(grid).astype(np.float64), whole, (1, group)))

    reader = source.make_code_reader(name, bits, whole[-1])
    return name, CodedTensor(whole, (name, scales), reader, read_grids, table)


def _count_group_bits(shape: tuple[int, ...], grid: tuple[int, ...]) -> int | None:
    """Return how many bits of 32-bit words share a scale; None if words and scales do not fit."""
    if len(shape) < 2 or not prod(shape) or not prod(grid) or grid[:-1] != shape[:-1]:
        return None
    filled, rest = divmod(32 * shape[-1], grid[-1])
    return None if rest else filled


def _choose_mlx_sizes(source: CodeSource, layer: str, filled: int) -> tuple[int, int]:
    """Return the bits of a code and the codes of a group, whose product is known; (0, 0) if none.

    The configuration says both for the model, and for single layers. Without it groups of 64 are
    taken, which MLX makes unless it is told otherwise.
    """
    stated = [source.get_size(layer, "group_size"), source.get_size("group_size")]
    for group in (*filter(None, stated), 64, 32, 128):
        bits, rest = divmod(filled, group)
        if not rest and 2 <= bits <= 8:
            return bits, group
    return 0, 0


def find_torchao_int4(source: CodeSource, name: str) -> Found:
    """Find 4-bit codes of torchao, whose scales and zero points have a row for each group."""
    layer, shape = name.removesuffix("._weight_qdata"), source.get_shape(name)
    scale, zero = f"{layer}._weight_scale", f"{layer}._weight_zero_point"
    grid = source.get_shape(scale)
    if layer == name or source.get_word(name) not in ("I8", "U8") or len(shape) < 2:
        return None
    whole = (*shape[:-1], 2 * shape[-1])
    if len(grid) != len(shape) or grid[:-2] != shape[:-2] or grid != source.get_shape(zero):
        return None
    # Plain 8-bit codes have a row of scales for each row of codes.
    if not prod(grid) or grid[-1] != shape[-2] or whole[-1] % grid[-2] or grid[:-1] == shape[:-1]:
        return None

    def read_grids() -> Grids:
        scales, zeros = (source.read_numbers(each).swapaxes(-1, -2) for each in (scale, zero))
        # number = code * scale + zero, with codes from -8 to 7.
        return Grids(make_grid(scales, whole), bias=make_grid(zeros, whole))

    signed = np.where(np.arange(16) < 8, np.arange(16), np.arange(16) - 16).astype(np.float32)
    return f"{layer}.weight", CodedTensor(
        whole,
        (name, scale, zero),
        source.make_code_reader(name, 4, whole[-1]),
        read_grids,
        signed,
    )


FORMATS: tuple[Callable[[CodeSource, str], Found], ...] = (
    find_bitsandbytes, find_small_floats, find_packed, find_expert_blocks, find_mlx_integers,
    find_mlx_floats, find_gptq,
    find_awq, find_torchao_int4, find_scaled,
)  # fmt: skip
