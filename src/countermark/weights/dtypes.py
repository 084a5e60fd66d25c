"""The dtypes of safetensors as numpy has them, bfloat16 included, which it has not."""

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


def decoded(raw: bytes, dtype: str) -> NDArray[Any]:
    """The values (n,) in bytes of a dtype; bfloat16 as float32, of which it is the upper half."""
    values: NDArray[Any] = np.frombuffer(raw, dtype=DTYPES[dtype])
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values


def encoded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Finite values (n,) as a floating dtype stores them, to the nearest and ties to even.

    Returns: an array of the numpy dtype of that name; `tobytes` of it is what a file holds.
    """
    if dtype != "BF16":
        return values.astype(DTYPES[dtype])
    wide = values.astype(np.float32).view(np.uint32)  # a copy
    odd = wide >> 16
    odd &= 1
    wide += odd
    wide += 0x7FFF
    wide >>= 16
    return wide.astype("<u2")


def rounded(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """The same values as they are read again once a floating dtype has stored them."""
    return decoded(encoded(values, dtype).tobytes(), dtype).astype(np.float64)
