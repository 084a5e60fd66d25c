"""Decode the number types of GGUF: plain numbers, and blocks of codes that share scales.

A block holds 32 or 256 values of one row. Its bytes are scales (float16, or small integers that
multiply a float16) and codes of 2 to 8 bits. K types hold a scale for each 16 or 32 values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints.coded_tensor import E2M1
from countermark.checkpoints.dtypes import DTYPES, decode_values

_Bytes: TypeAlias = NDArray[np.uint8]
_Values: TypeAlias = NDArray[np.float32]
_STEP = 1 << 20  # values that are decoded at a time, which bounds the memory of the steps between
_TABLE_4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


@dataclass(frozen=True)
class GgufType:
    """A number type of GGUF.

    Attributes:
        name: as ggml spells it.
        values: number of values in a block, 1 for plain numbers.
        size: bytes of a block.
        decode: decodes blocks uint8 (n, size) to values float32 (n, values); None for plain numbers
            and for types that cannot be read.
    """

    name: str
    values: int
    size: int
    decode: Callable[[_Bytes], _Values] | None = None

    @property
    def is_readable(self) -> bool:
        """True if `decode_raw` can decode this type."""
        return self.decode is not None or self.name in DTYPES

    def decode_raw(self, raw: bytes) -> NDArray[Any]:
        """Decode whole blocks to values (n,): float32, or the type's own plain numbers."""
        if self.decode is None:
            return decode_values(raw, self.name)
        blocks = np.frombuffer(raw, np.uint8).reshape(-1, self.size)
        found = np.empty((len(blocks), self.values), np.float32)
        step = _STEP // self.values
        # Infinite scales are for the caller to refuse.
        with np.errstate(over="ignore", invalid="ignore"):
            for at in range(0, len(blocks), step):
                found[at : at + step] = self.decode(blocks[at : at + step])
        return found.reshape(-1)


def _read_halves(blocks: _Bytes, at: int) -> _Values:
    """Read the float16 number at byte `at` of each block as float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _split_bits(codes: _Bytes, bits: int, group: int) -> _Bytes:
    """Split bytes (n, k) into codes (n, 8 k / bits).

    Of every `group` bytes the lowest bits give the first `group` codes, the next bits the next.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    apart = (codes.reshape(len(codes), -1, 1, group) >> shifts) & np.uint8((1 << bits) - 1)
    return apart.reshape(len(codes), -1)


def _scale_groups(codes: NDArray[Any], scales: _Values) -> _Values:
    """Multiply codes (n, values) by scales (n, groups); a group is a run of neighbouring values."""
    grouped = codes.astype(np.float32).reshape(*scales.shape, -1) * scales[:, :, None]
    return grouped.reshape(codes.shape)


def _read_fifth_bits(blocks: _Bytes, at: int) -> _Bytes:
    """Read the fifth bits of 32 codes out of 4 bytes, as 0 or 16."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _decode_q4_0(blocks: _Bytes) -> _Values:
    return _read_halves(blocks, 0) * (_split_bits(blocks[:, 2:], 4, 16).astype(np.float32) - 8)


def _decode_q4_1(blocks: _Bytes) -> _Values:
    return _read_halves(blocks, 0) * _split_bits(blocks[:, 4:], 4, 16) + _read_halves(blocks, 2)


def _decode_q5_0(blocks: _Bytes) -> _Values:
    codes = _split_bits(blocks[:, 6:], 4, 16) | _read_fifth_bits(blocks, 2)
    return _read_halves(blocks, 0) * (codes.astype(np.float32) - 16)


def _decode_q5_1(blocks: _Bytes) -> _Values:
    codes = _split_bits(blocks[:, 8:], 4, 16) | _read_fifth_bits(blocks, 4)
    return _read_halves(blocks, 0) * codes + _read_halves(blocks, 2)


def _decode_q8_0(blocks: _Bytes) -> _Values:
    return _read_halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _decode_q2_k(blocks: _Bytes) -> _Values:
    scales, codes = blocks[:, :16], _split_bits(blocks[:, 16:80], 2, 32)
    lowest: _Values = _read_halves(blocks, 82) * (scales >> 4)
    return _scale_groups(codes, _read_halves(blocks, 80) * (scales & 15)) - np.repeat(lowest, 16, 1)


def _decode_q3_k(blocks: _Bytes) -> _Values:
    # The third bit of a code is stored inverted: where it is 0, 4 is taken away.
    third = _split_bits(blocks[:, :32], 1, 32).astype(np.int8)
    codes = _split_bits(blocks[:, 32:96], 2, 32).astype(np.int8) + 4 * third - 4
    upper = _split_bits(blocks[:, 104:108], 2, 4) << 4
    scales = (_split_bits(blocks[:, 96:104], 4, 8) | upper).astype(np.float32) - 32
    return _scale_groups(codes, _read_halves(blocks, 108) * scales)


def _read_k_scales(blocks: _Bytes) -> tuple[_Values, _Values]:
    """Read scales and minima (n, 8) of Q4_K and Q5_K: 16 numbers of 6 bits in 12 bytes."""
    first, second, rest = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 48)], axis=1)
    lowest = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 48)], axis=1)
    return _read_halves(blocks, 0) * scales, _read_halves(blocks, 2) * lowest


def _decode_q4_k(blocks: _Bytes) -> _Values:
    scales, lowest = _read_k_scales(blocks)
    return _scale_groups(_split_bits(blocks[:, 16:], 4, 32), scales) - np.repeat(lowest, 32, 1)


def _decode_q5_k(blocks: _Bytes) -> _Values:
    scales, lowest = _read_k_scales(blocks)
    codes = _split_bits(blocks[:, 48:], 4, 32) | (_split_bits(blocks[:, 16:48], 1, 32) << 4)
    return _scale_groups(codes, scales) - np.repeat(lowest, 32, 1)


def _decode_q6_k(blocks: _Bytes) -> _Values:
    codes = _split_bits(blocks[:, :128], 4, 64) | (_split_bits(blocks[:, 128:192], 2, 32) << 4)
    scales = _read_halves(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return _scale_groups(codes.astype(np.float32) - 32, scales)


def _decode_iq4_nl(blocks: _Bytes) -> _Values:
    return _read_halves(blocks, 0) * _TABLE_4[_split_bits(blocks[:, 2:], 4, 16)]


def _decode_iq4_xs(blocks: _Bytes) -> _Values:
    scales = _split_bits(blocks[:, 4:8], 4, 1) | (_split_bits(blocks[:, 2:4], 2, 1) << 4)
    codes = _TABLE_4[_split_bits(blocks[:, 8:], 4, 16)]
    return _scale_groups(codes, _read_halves(blocks, 0) * (scales.astype(np.float32) - 32))


def _decode_mxfp4(blocks: _Bytes) -> _Values:
    scales = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 127)
    return scales * E2M1[_split_bits(blocks[:, 1:], 4, 16)]


GGUF_TYPES: Mapping[int, GgufType] = {
    0: GgufType("F32", 1, 4),
    1: GgufType("F16", 1, 2),
    2: GgufType("Q4_0", 32, 18, _decode_q4_0),
    3: GgufType("Q4_1", 32, 20, _decode_q4_1),
    6: GgufType("Q5_0", 32, 22, _decode_q5_0),
    7: GgufType("Q5_1", 32, 24, _decode_q5_1),
    8: GgufType("Q8_0", 32, 34, _decode_q8_0),
    9: GgufType("Q8_1", 32, 40),
    10: GgufType("Q2_K", 256, 84, _decode_q2_k),
    11: GgufType("Q3_K", 256, 110, _decode_q3_k),
    12: GgufType("Q4_K", 256, 144, _decode_q4_k),
    13: GgufType("Q5_K", 256, 176, _decode_q5_k),
    14: GgufType("Q6_K", 256, 210, _decode_q6_k),
    15: GgufType("Q8_K", 256, 292),
    16: GgufType("IQ2_XXS", 256, 66),
    17: GgufType("IQ2_XS", 256, 74),
    18: GgufType("IQ3_XXS", 256, 98),
    19: GgufType("IQ1_S", 256, 50),
    20: GgufType("IQ4_NL", 32, 18, _decode_iq4_nl),
    21: GgufType("IQ3_S", 256, 110),
    22: GgufType("IQ2_S", 256, 82),
    23: GgufType("IQ4_XS", 256, 136, _decode_iq4_xs),
    24: GgufType("I8", 1, 1),
    25: GgufType("I16", 1, 2),
    26: GgufType("I32", 1, 4),
    27: GgufType("I64", 1, 8),
    28: GgufType("F64", 1, 8),
    29: GgufType("IQ1_M", 256, 56),
    30: GgufType("BF16", 1, 2),
    34: GgufType("TQ1_0", 256, 54),
    35: GgufType("TQ2_0", 256, 66),
    39: GgufType("MXFP4", 32, 17, _decode_mxfp4),
    40: GgufType("NVFP4", 64, 36),
    41: GgufType("Q1_0", 128, 18),
}
"""The number types by their number in the file. Some cannot be read, but all have known sizes."""
