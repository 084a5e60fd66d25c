"""Convert between the dtypes of safetensors and numpy, including floats that numpy lacks.

These are bfloat16, the 8-bit floats E4M3 and E5M2, and E8M0, which holds powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
    "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_DTYPES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""Dtypes of torch and the words of safetensors for them."""


def get_dtype_word(dtype: str) -> str:
    """Return the word of safetensors for a dtype in the spelling of torch, numpy or safetensors."""
    return TORCH_DTYPES.get(dtype, dtype)


def make_float_table(exponent: int, mantissa: int, bias: int) -> NDArray[np.float32]:
    """Return the numbers of all codes of a small float: a sign bit, then exponent and mantissa.

    Infinities and NaN are not marked as such: formats of few bits have none.
    """
    codes = np.arange(1 << (exponent + mantissa))
    power, fraction = codes >> mantissa, (codes & ((1 << mantissa) - 1)) / (1 << mantissa)
    # An exponent of 0 marks subnormal numbers: no implicit one, and the exponent of its neighbour.
    size = np.exp2(np.maximum(power, 1) - float(bias)) * (fraction + (power > 0))
    return np.concatenate([size, -size]).astype(np.float32)


def _make_tables() -> dict[str, NDArray[np.float32]]:
    """Return the 256 numbers of each 8-bit float."""
    e4m3, e5m2 = make_float_table(4, 3, 7), make_float_table(5, 2, 15)
    # E4M3 has no infinities, and one NaN of each sign; E5M2 has both, as IEEE 754 has them.
    e4m3[[0x7F, 0xFF]] = np.nan
    e5m2[[0x7C, 0xFC]] = np.inf, -np.inf
    e5m2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    # The FNUZ forms have one NaN, in the place of the negative zero.
    tables = {"F8_E4M3FNUZ": make_float_table(4, 3, 8), "F8_E5M2FNUZ": make_float_table(5, 2, 16)}
    for table in tables.values():
        table[0x80] = np.nan
    powers = np.append(np.exp2(np.arange(255) - 127.0), np.nan).astype(np.float32)
    return tables | {"F8_E4M3": e4m3, "F8_E5M2": e5m2, "F8_E8M0": powers}


_TABLES = _make_tables()


def decode_values(raw: bytes, dtype: str) -> NDArray[Any]:
    """Decode the bytes of a dtype to values (n,); bfloat16 and 8-bit floats become float32.

    Args:
        raw: little-endian bytes.
        dtype: a key of `DTYPES`.
    """
    values: NDArray[Any] = np.frombuffer(raw, dtype=DTYPES[dtype])
    # A bfloat16 number is the upper half of a float32 number.
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif dtype in _TABLES:
        values = _TABLES[dtype][values]
    return values


def encode_values(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Encode finite values (n,) as a floating dtype stores them, rounded to nearest, ties to even.

    Returns: an array of the numpy dtype in `DTYPES`; its `tobytes()` is the content of a file.
    """
    if dtype != "BF16":
        return values.astype(DTYPES[dtype])
    # `astype` copies, so the steps below do not change the values of the caller.
    wide = values.astype(np.float32).view(np.uint32)
    # Adding half of the last kept bit, less one, plus that bit itself, rounds ties to even. Every
    # step works in place, because tensors may be large.
    odd = wide >> 16
    odd &= 1
    wide += odd
    wide += 0x7FFF
    wide >>= 16
    return wide.astype("<u2")


def round_to_dtype(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return the values as they are read again after a floating dtype has stored them."""
    return decode_values(encode_values(values, dtype).tobytes(), dtype).astype(np.float64)
