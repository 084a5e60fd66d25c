"""A safetensors file as a suspect, read by its header and by tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.errors import SuspectError, printable
from countermark.files import parse_json
from countermark.weights.base import TensorInfo, Weights

_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format itself
_MOST_DIMENSIONS, _LARGEST_SIZE = 32, 1 << 63  # of one tensor: numpy's limits
_PIECE = 1 << 22  # bytes that are digested at a time
_METADATA = "__metadata__"
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1",
}  # fmt: skip


class SafetensorsWeights(Weights):
    """A safetensors file. Only its header and the tensors that are asked for are read.

    Raises:
        SuspectError: truncated, or the header is not what the format allows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._file = path.open("rb")
        try:
            self._places = self._header()
        except BaseException:
            self.close()
            raise
        self.tensors = {name: info for name, (info, _, _) in self._places.items()}

    def _header(self) -> dict[str, tuple[TensorInfo, int, int]]:
        total = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if total < 10 or length > min(_LARGEST_HEADER, total - 8):
            raise self._damaged(f"its header claims {length:,} bytes, the file has {total:,}")
        raw = self._file.read(length)
        self.digests[_METADATA] = hashlib.sha256(raw).hexdigest()
        try:
            header = parse_json(raw)
            header.pop(_METADATA, None)
            places = {name: self._place(name, about, 8 + length) for name, about in header.items()}
            _require_cover(places, 8 + length, total)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = printable(str(error), 200)
            raise self._damaged(f"its header is not a list of tensors ({why})") from None
        return places

    def _place(self, name: str, about: dict[str, Any], start: int) -> tuple[TensorInfo, int, int]:
        shape = tuple(about["shape"])
        begin, end = about["data_offsets"]
        if not all(
            type(each) is int and 0 <= each < _LARGEST_SIZE for each in (*shape, begin, end)
        ):
            raise ValueError(f"{name}: a size that is no number")
        dtype = str(about["dtype"])
        if begin > end:
            raise ValueError(f"{name}: its bytes end before they begin")
        if (
            _readable(shape, dtype)
            and prod(shape) * np.dtype(_DTYPES[dtype]).itemsize != end - begin
        ):
            raise ValueError(f"{name}: its bytes do not fit its shape {list(shape)}")
        return TensorInfo(shape, dtype), start + begin, end - begin

    def _load(self, name: str) -> NDArray[Any]:
        info, offset, size = self._places[name]
        if not _readable(info.shape, info.dtype):
            raise SuspectError(
                f"{self.name}: {printable(name, 200)} has dtype {printable(info.dtype, 20)} and "
                f"{len(info.shape)} dimensions, which cannot be read yet: expected one of "
                f"{', '.join(_DTYPES)} and at most {_MOST_DIMENSIONS}; convert the file"
            )
        self._file.seek(offset)
        raw = self._file.read(size)
        if len(raw) != size:
            raise self._damaged(f"{name} ends after {len(raw):,} of {size:,} bytes")
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        values = np.frombuffer(raw, dtype=_DTYPES[info.dtype])
        if info.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(info.shape)  # the tensor's own shape

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor of any dtype, as the file has them."""
        _, offset, size = self._places[name]
        for start in range(0, size, _PIECE):
            self._file.seek(offset + start)
            piece = self._file.read(min(_PIECE, size - start))
            if len(piece) != min(_PIECE, size - start):
                raise self._damaged(f"{name} ends too early")
            yield piece

    def file_digest(self) -> str:
        """SHA-256 of the whole file, in hexadecimal."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _damaged(self, why: str) -> SuspectError:
        return SuspectError(
            f"{self.name} is damaged or no safetensors file: {why}; "
            "expected a complete .safetensors file, obtain the suspect again"
        )


def _readable(shape: tuple[int, ...], dtype: str) -> bool:
    return dtype in _DTYPES and len(shape) <= _MOST_DIMENSIONS


def _require_cover(
    places: Mapping[str, tuple[TensorInfo, int, int]], start: int, total: int
) -> None:
    """The tensors' bytes must fill the file from `start` on, each byte once, as the format says."""
    at = start
    for name, (_, offset, size) in sorted(places.items(), key=lambda item: item[1][1:]):
        if offset != at:
            raise ValueError(f"{name}: its bytes overlap with others, or leave a gap")
        at += size
    if at != total:
        raise ValueError(f"its tensors need {at:,} bytes, the file has {total:,}")
