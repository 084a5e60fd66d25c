"""Parse the header of a GGUF file: metadata, then name, shape, type and place of each tensor.

The header is hostile input. Every count and length is compared with the size of the file before
anything is allocated, and values that nobody needs (the words of a tokenizer) are skipped.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

from countermark.checkpoints.base import TensorInfo
from countermark.checkpoints.gguf_blocks import GGUF_TYPES, GgufType

GGUF_MAGIC = b"GGUF"
_LARGEST_HEADER = 256 << 20  # bytes; a tokenizer of half a million words takes 20 MiB
_MOST_TENSORS, _MOST_PAIRS, _MOST_ITEMS = 100_000, 1 << 16, 1 << 22
_LONGEST_NAME, _LONGEST_KEY = 1024, 1 << 16  # bytes; ggml itself allows 64 and 65,535
_MOST_DIMENSIONS, _LARGEST_ALIGNMENT = 4, 1 << 16
_WINDOW = 1 << 20  # bytes that are read at a time

# Metadata types: plain numbers by the format that `struct` unpacks, text and arrays.
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file stores it.

    Attributes:
        shape: slowest axis first, as in torch; the file lists the axes the other way around.
        type: its number type.
        offset: position of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: GgufType
    offset: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return prod(self.shape) // self.type.values * self.type.size

    @property
    def info(self) -> TensorInfo:
        """Shape, and the type as ggml spells it."""
        return TensorInfo(self.shape, self.type.name)


@dataclass
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        architecture: `general.architecture`, empty if missing.
        numbers: whole numbers of the metadata by key.
        tensors: all tensors by the file's own names.
        digest: SHA-256 of the header, in hexadecimal.
    """

    architecture: str = ""
    numbers: dict[str, int] = field(default_factory=dict)
    tensors: Mapping[str, GgufTensor] = field(default_factory=dict)
    digest: str = ""


def parse_header(read: Callable[[int, int], bytes], total: int) -> GgufHeader:
    """Parse the header of a GGUF file.

    Args:
        read: returns so many bytes from a position on, or fewer at the end of the file.
        total: bytes of the file.

    Raises:
        ValueError: the file is truncated, or violates the format.
    """
    cursor = _Cursor(read, total)
    cursor.take(len(GGUF_MAGIC))
    version = cursor.take_number("<I")
    if version not in (2, 3):
        big = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "of big-endian machines" if big in (2, 3) else f"{version}"
        raise ValueError(f"it is GGUF version {what}, and versions 2 and 3 are read")
    tensor_count, pair_count = cursor.take_count(24), cursor.take_count(13)
    if tensor_count > _MOST_TENSORS or pair_count > _MOST_PAIRS:
        raise ValueError(f"it claims {tensor_count:,} tensors and {pair_count:,} metadata values")
    header = GgufHeader()
    for _ in range(pair_count):
        _parse_pair(cursor, header)
    if header.numbers.get("split.count", 1) > 1:
        raise ValueError(
            f"it is one of {header.numbers['split.count']:,} parts of a model, which have to be "
            "merged first (llama-gguf-split --merge)"
        )
    alignment = header.numbers.get("general.alignment", 32)
    if not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}, no small power of two")
    listed = [_parse_tensor(cursor) for _ in range(tensor_count)]
    header.tensors = _place_tensors(listed, cursor.position, alignment, total)
    header.digest = cursor.compute_digest()
    return header


def _parse_pair(cursor: _Cursor, header: GgufHeader) -> None:
    """Parse one key with its value, and note what is needed of it in the header."""
    key, kind = cursor.take_text(_LONGEST_KEY), cursor.take_number("<I")
    if key == "general.architecture" and kind == _TEXT:
        header.architecture = cursor.take_text(_LONGEST_NAME)
    elif kind in _NUMBERS:
        value = cursor.take_number(_NUMBERS[kind])
        if key in header.numbers:
            raise ValueError(f"its metadata name {key!r} twice")
        # Some keys of long names could fill the memory; those that are needed are short.
        if isinstance(value, int) and len(key) < _LONGEST_NAME:
            header.numbers[key] = value
    elif kind == _TEXT:
        cursor.skip(cursor.take_count(1))
    elif kind == _ARRAY:
        _skip_array(cursor)
    else:
        raise ValueError(f"its metadata value {key!r} has the unknown type {kind}")


def _skip_array(cursor: _Cursor) -> None:
    """Skip an array of numbers or of texts."""
    kind = cursor.take_number("<I")
    if kind in _NUMBERS:
        size = struct.calcsize(_NUMBERS[kind])
        cursor.skip(size * cursor.take_count(size))
    elif kind == _TEXT:
        count = cursor.take_count(8)
        cursor.count_items(count)
        for _ in range(count):
            cursor.skip(cursor.take_count(1))
    else:
        raise ValueError(f"its metadata hold an array of the unknown type {kind}")


def _parse_tensor(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """Parse name, shape, type and relative place of one tensor."""
    name, dimensions = cursor.take_text(_LONGEST_NAME), cursor.take_number("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"{name!r} has {dimensions} dimensions")
    shape = tuple(cursor.take_number("<Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.take_number("<I"), cursor.take_number("<Q")
    if number not in GGUF_TYPES:
        raise ValueError(f"{name!r} has the unknown type {number}")
    stored = GgufTensor(shape, GGUF_TYPES[number], offset)
    # A block never reaches over the end of a row.
    if not all(shape) or (shape[-1] if shape else 1) % stored.type.values:
        raise ValueError(f"{name!r} has the shape {list(shape)}, and {stored.type.name} cannot")
    return name, stored


def _place_tensors(
    listed: list[tuple[str, GgufTensor]], end: int, alignment: int, total: int
) -> dict[str, GgufTensor]:
    """Return the tensors with their positions in the file.

    Raises:
        ValueError: a name stands twice, or bytes lie outside the file or belong to two tensors.
    """
    start = -(-end // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    at = start
    for name, each in sorted(listed, key=lambda item: item[1].offset):
        placed = GgufTensor(each.shape, each.type, start + each.offset)
        if name in found:
            raise ValueError(f"it holds {name!r} twice")
        if placed.offset < at or each.offset % alignment:
            raise ValueError(f"the bytes of {name!r} overlap with others or are not aligned")
        at = placed.offset + placed.size
        if at > total:
            raise ValueError(f"{name!r} ends at byte {at:,}, and the file has {total:,}")
        found[name] = placed
    return found


class _Cursor:
    """A position in the header, which moves forwards only."""

    def __init__(self, read: Callable[[int, int], bytes], total: int) -> None:
        self._read, self._total = read, total
        self._end = min(total, _LARGEST_HEADER)
        self._window, self._start, self._at = b"", 0, 0
        self._digest, self._items = hashlib.sha256(), 0

    @property
    def position(self) -> int:
        """Position in the file."""
        return self._start + self._at

    def take(self, count: int) -> bytes:
        """Return the next bytes; raise `ValueError` if the header or the file ends before."""
        if self._at + count > len(self._window):
            self._fill_window(count)
        found = self._window[self._at : self._at + count]
        self._at += count
        return found

    def _fill_window(self, count: int) -> None:
        """Read on until at least `count` bytes lie ahead."""
        self._require_left(count)
        self._digest.update(self._window[: self._at])
        rest = self._window[self._at :]
        self._start, self._at = self.position, 0
        wanted = max(_WINDOW, count - len(rest))
        self._window = rest + self._read(self._start + len(rest), wanted)
        if len(self._window) < count:
            raise ValueError("it was cut while it was read")

    def _require_left(self, count: int) -> None:
        """Raise `ValueError` unless so many bytes are left, of the file and of the largest header."""
        if self.position + count > self._end:
            raise ValueError(
                f"its header ends at byte {self.position + count:,} or later, and the file has "
                f"{self._total:,}"
            )

    def skip(self, count: int) -> None:
        """Move on by so many bytes, which are digested but not kept."""
        self._require_left(count)
        while self._at + count > len(self._window):
            count -= len(self._window) - self._at
            self._at = len(self._window)
            self._fill_window(1)
        self._at += count

    def take_number(self, form: str) -> int:
        """Return the next number, in a format of `struct`."""
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value  # type: ignore[no-any-return]

    def take_count(self, least: int) -> int:
        """Return the next count; raise `ValueError` unless so many items of `least` bytes can follow."""
        count = int.from_bytes(self.take(8), "little")
        self._require_left(count * least)
        return count

    def take_text(self, longest: int) -> str:
        """Return the next text; raise `ValueError` if it is longer than `longest` bytes or no UTF-8."""
        count = self.take_count(1)
        if count > longest:
            raise ValueError(f"a name in it has {count:,} bytes")
        return self.take(count).decode()

    def count_items(self, count: int) -> None:
        """Count texts that are skipped one by one; raise `ValueError` if that would take long."""
        self._items += count
        if self._items > _MOST_ITEMS:
            raise ValueError(f"its metadata hold more than {_MOST_ITEMS:,} texts")

    def compute_digest(self) -> str:
        """Return the SHA-256 of everything before the position, in hexadecimal."""
        self._digest.update(self._window[: self._at])
        self._window, self._start, self._at = self._window[self._at :], self.position, 0
        return self._digest.hexdigest()
