"""Read a GGUF file of llama.cpp as a suspect: its header first, then single tensors on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints.base import IN_PART, Array, OpenFileWeights, TensorInfo
from countermark.checkpoints.gguf_blocks import GGUF_TYPES, GgufType
from countermark.checkpoints.gguf_header import parse_header
from countermark.checkpoints.gguf_names import GgufForm, map_names
from countermark.errors import SuspectError, make_printable

_PIECE = 1 << 22  # bytes that are digested at a time


class GgufWeights(OpenFileWeights):
    """A GGUF file, of which only the header and the requested tensors are read.

    Tensors have the names that transformers gives them, as far as the architecture is known, and
    quantised tensors are read as the numbers that their blocks stand for.

    Raises:
        SuspectError: the file is truncated, violates the format, or is one part of several.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            header = parse_header(self._read_at, self._file.seek(0, 2))
            self._stored, self._forms = header.tensors, map_names(header)
        except (ValueError, OSError) as error:
            self.close()
            raise self._make_refusal(make_printable(str(error), 300)) from None
        self.digests["__metadata__"] = header.digest
        self.tensors = {
            name: TensorInfo(
                form.shape, "F32" if form.is_changed else self._stored[form.source].type.name
            )
            for name, form in self._forms.items()
        }

    def _read_at(self, offset: int, size: int) -> bytes:
        """Read bytes of the file, fewer at its end: everything that is read comes through here."""
        self._file.seek(offset)
        return self._file.read(size)

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor and record its digest."""
        form = self._forms[name]
        kind = self._require_readable(name)
        raw = b"".join(self._read_stored(name))
        values = kind.decode_raw(raw).reshape(form.shape[::-1] if form.turned else form.shape)
        if form.is_changed:
            numbers = values.astype(np.float32) - np.float32(form.shift)
            values = np.ascontiguousarray(numbers.T if form.turned else numbers)
            raw = values.tobytes()
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        return values

    def read_part(self, name: str, start: int, count: int) -> Array:
        """Read only the blocks that hold these values.

        Raises:
            SuspectError: the type cannot be read, the file ends early, or a value is not finite.
            ValueError: the tensor does not have these values.
        """
        form = self._forms[name]
        size = prod(form.shape)
        if not 0 <= start <= start + count <= size:
            raise ValueError(f"{name} has {size} values, not {start} to {start + count}")
        # Neighbours in another order lie far apart in the file.
        if count == size or form.heads or form.is_changed:
            return super().read_part(name, start, count)
        kind = self._require_readable(name)
        first, last = start // kind.values, -(-(start + count) // kind.values)
        offset, _ = self._locate(form)
        raw = self._read_bytes(name, offset + first * kind.size, (last - first) * kind.size)
        self.digests[f"{name}{IN_PART}"] = hashlib.sha256(raw).hexdigest()
        values = kind.decode_raw(raw)[start - first * kind.values :][:count]
        return self._check_finite(name, values)  # (count,)

    def read_parts(self, name: str, starts: Sequence[int], count: int) -> list[Array]:
        """Read only the blocks that hold these parts, where neighbours lie side by side."""
        form = self._forms[name]
        if form.heads or form.is_changed:
            return super().read_parts(name, starts, count)
        return [self.read_part(name, start, count) for start in starts]

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor: as stored, rows in order, or numbers that are computed."""
        if self._forms[name].is_changed:
            yield self._load(name).tobytes()
        else:
            yield from self._read_stored(name)

    def _read_stored(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor of any type as the file stores them, rows in order."""
        form = self._forms[name]
        offset, size = self._locate(form)
        if form.heads:
            # The rows are taken apart in one piece: the largest such tensors are square.
            rows = np.frombuffer(self._read_bytes(name, offset, size), np.uint8)
            yield _sort_pairs(rows.reshape(form.shape[0], -1), form.heads).tobytes()
            return
        for start in range(0, size, _PIECE):
            yield self._read_bytes(name, offset + start, min(_PIECE, size - start))

    def _locate(self, form: GgufForm) -> tuple[int, int]:
        """Return the position of the first byte of a form in the file, and its byte count."""
        stored = self._stored[form.source]
        if form.expert is None:
            return stored.offset, stored.size
        size = stored.size // stored.shape[0]
        return stored.offset + form.expert * size, size

    def _read_bytes(self, name: str, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on; raise `SuspectError` if the file ends earlier."""
        raw = self._read_at(offset, size)
        if len(raw) != size:
            raise self._make_refusal(f"{name} ends after {len(raw):,} of {size:,} bytes")
        return raw

    def _require_readable(self, name: str) -> GgufType:
        """Return the type of a tensor; raise `SuspectError` if it cannot be decoded."""
        kind = self._stored[self._forms[name].source].type
        if not kind.is_readable:
            known = ", ".join(each.name for each in GGUF_TYPES.values() if each.is_readable)
            raise SuspectError(
                f"{self.name}: {make_printable(name, 200)} has the GGUF type {kind.name}, which "
                f"cannot be read yet: expected one of {known}; convert the file, for example by "
                "llama-quantize to F16"
            )
        return kind

    def _make_refusal(self, why: str) -> SuspectError:
        """Make the error that refuses this file, with a reason."""
        return SuspectError(
            f"{self.name} is damaged or no GGUF file that can be read: {why}; expected a complete "
            ".gguf file, obtain the suspect again"
        )


def _sort_pairs(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Put the rows of each head in order, which are stored as 0, n/2, 1, n/2 + 1 and so on.

    Args:
        rows: one row of bytes for each output (rows, bytes).
        heads: number of heads, each of an even number of rows.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
