"""Convert between the dtypes of safetensors and numpy, including bfloat16, which numpy lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


def decode_values(raw: bytes, dtype: str) -> NDArray[Any]:
    """Decode the bytes of a dtype to values (n,); bfloat16 becomes float32.

    Args:
        raw: little-endian bytes.
        dtype: a key of `DTYPES`.
    """
    values: NDArray[Any] = np.frombuffer(raw, dtype=DTYPES[dtype])
    # A bfloat16 number is the upper half of a float32 number.
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
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
