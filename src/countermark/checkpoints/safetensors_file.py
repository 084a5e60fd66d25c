"""Read a safetensors file as a suspect: its header first, then single tensors on demand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark._internal.files import parse_json
from countermark.checkpoints.base import IN_PART, Array, OpenFileWeights, TensorInfo
from countermark.checkpoints.dtypes import DTYPES, decode_values
from countermark.errors import SuspectError, make_printable

_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format itself
_MOST_DIMENSIONS, _LARGEST_SIZE = 32, 1 << 63  # of one tensor: numpy's limits
_PIECE = 1 << 22  # bytes that are digested at a time
_METADATA = "__metadata__"


class SafetensorsWeights(OpenFileWeights):
    """A safetensors file, of which only the header and the requested tensors are read.

    Raises:
        SuspectError: the file is truncated, or the header violates the format.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._places = self._read_header()
        except BaseException:
            self.close()
            raise
        self.tensors = {name: info for name, (info, _, _) in self._places.items()}

    def _read_header(self) -> dict[str, tuple[TensorInfo, int, int]]:
        """Read the header: shape and dtype, first byte in the file, and byte count by tensor.

        Raises:
            SuspectError: the header is truncated, too large, or violates the format.
        """
        # The size comes from the open descriptor: the path may lead to another file by now.
        total = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        # 8 bytes of length and a header of "{}" are the least that a file can hold. The length is
        # compared with the file before anything is allocated.
        if total < 10 or length > min(_LARGEST_HEADER, total - 8):
            raise self._make_refusal(f"its header claims {length:,} bytes, the file has {total:,}")
        raw = self._file.read(length)
        self.digests[_METADATA] = hashlib.sha256(raw).hexdigest()
        try:
            header = parse_json(raw)
            header.pop(_METADATA, None)
            places = {
                name: self._parse_entry(name, about, 8 + length) for name, about in header.items()
            }
            _require_full_cover(places, 8 + length, total)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = make_printable(str(error), 200)
            raise self._make_refusal(f"its header is not a list of tensors ({why})") from None
        return places

    def _parse_entry(
        self, name: str, about: dict[str, Any], start: int
    ) -> tuple[TensorInfo, int, int]:
        """Parse the header's entry of one tensor.

        Args:
            name: of the tensor.
            about: the entry, as parsed from JSON.
            start: position of the first byte after the header.

        Raises:
            ValueError: the sizes are no numbers, or do not fit each other.
        """
        # `type(...) is int` below, because JSON's true and false are instances of int in Python.
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
            _is_readable(shape, dtype)
            and prod(shape) * np.dtype(DTYPES[dtype]).itemsize != end - begin
        ):
            raise ValueError(f"{name}: its bytes do not fit its shape {list(shape)}")
        return TensorInfo(shape, dtype), start + begin, end - begin

    def locate_tensor(self, name: str) -> tuple[int, int]:
        """Return the position of the first byte of a tensor in the file, and its byte count."""
        _, offset, size = self._places[name]
        return offset, size

    def read_part(self, name: str, start: int, count: int) -> Array:
        """Read only these bytes of the file.

        Raises:
            SuspectError: the dtype cannot be read, the file ends early, or a value is not finite.
            ValueError: the tensor does not have these values.
        """
        info, _, size = self._places[name]
        if count == prod(info.shape):
            return self.read(name).reshape(-1)
        self._require_readable(name)
        # A part is addressed by value, not by byte: callers know shapes, not dtypes.
        item = np.dtype(DTYPES[info.dtype]).itemsize
        if not 0 <= start <= start + count <= size // item:
            raise ValueError(f"{name} has {size // item} values, not {start} to {start + count}")
        raw = self.read_bytes(name, start * item, count * item)
        return self._check_finite(name, decode_values(raw, info.dtype))  # (count,)

    def read_bytes(self, name: str, start: int, count: int) -> bytes:
        """Read only these bytes of the file.

        Raises:
            SuspectError: the file ends early.
            ValueError: the tensor does not have these bytes.
        """
        _, offset, size = self._places[name]
        if not 0 <= start <= start + count <= size:
            raise ValueError(f"{name} has {size} bytes, not {start} to {start + count}")
        raw = self._read_stored(name, offset + start, count)
        read = name if count == size else f"{name}{IN_PART}"
        self.digests[read] = hashlib.sha256(raw).hexdigest()
        return raw

    def read_parts(self, name: str, starts: Sequence[int], count: int) -> list[Array]:
        """Read only the bytes of these parts."""
        return [self.read_part(name, start, count) for start in starts]

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor and record its digest."""
        info, offset, size = self._places[name]
        self._require_readable(name)
        raw = self._read_stored(name, offset, size)
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        return decode_values(raw, info.dtype).reshape(info.shape)  # the tensor's own shape

    def _read_stored(self, name: str, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on; raise `SuspectError` if the file ends earlier."""
        self._file.seek(offset)
        raw = self._file.read(size)
        if len(raw) != size:
            raise self._make_refusal(f"{name} ends after {len(raw):,} of {size:,} bytes")
        return raw

    def _require_readable(self, name: str) -> None:
        """Raise `SuspectError` if numpy cannot hold a tensor of this dtype or rank."""
        info = self.tensors[name]
        if not _is_readable(info.shape, info.dtype):
            raise SuspectError(
                f"{self.name}: {make_printable(name, 200)} has dtype {make_printable(info.dtype, 20)} and "
                f"{len(info.shape)} dimensions, which cannot be read yet: expected one of "
                f"{', '.join(DTYPES)} and at most {_MOST_DIMENSIONS}; convert the file"
            )

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor of any dtype, as the file stores them."""
        _, offset, size = self._places[name]
        # Pieces bound the memory, and the dtype is not interpreted: a digest must also cover
        # tensors that cannot be read as numbers.
        for start in range(0, size, _PIECE):
            self._file.seek(offset + start)
            piece = self._file.read(min(_PIECE, size - start))
            if len(piece) != min(_PIECE, size - start):
                raise self._make_refusal(f"{name} ends too early")
            yield piece

    def _make_refusal(self, why: str) -> SuspectError:
        """Make the error that refuses this file, with a reason."""
        return SuspectError(
            f"{self.name} is damaged or no safetensors file: {why}; "
            "expected a complete .safetensors file, obtain the suspect again"
        )


def _is_readable(shape: tuple[int, ...], dtype: str) -> bool:
    """Return true if numpy can hold a tensor of this shape and dtype."""
    return dtype in DTYPES and len(shape) <= _MOST_DIMENSIONS


def _require_full_cover(
    places: Mapping[str, tuple[TensorInfo, int, int]], start: int, total: int
) -> None:
    """Raise `ValueError` unless the tensors fill the file, each byte once, as the format demands.

    Args:
        places: TensorInfo, first byte and byte count of each tensor.
        start: position of the first byte after the header.
        total: bytes of the file.
    """
    # The format forbids both: a gap could hide another archive, an overlap is two tensors in one.
    at = start
    for name, (_, offset, size) in sorted(places.items(), key=lambda item: item[1][1:]):
        if offset != at:
            raise ValueError(f"{name}: its bytes overlap with others, or leave a gap")
        at += size
    if at != total:
        raise ValueError(f"its tensors need {at:,} bytes, the file has {total:,}")
