"""Locate the uncompressed entries of a zip file, as torch writes it, as ranges of bytes.

Two zip readers can find two different archives in one file. So nothing may stand behind, inside or
beside the one directory at the end of the file: then the archive that is read here is the archive
that torch reads.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import IO

_END, _LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_LARGEST_DIRECTORY = 1 << 24  # bytes; each entry takes ten times its bytes of memory
_UNSAID = (1 << 32) - 1  # placeholder for a number that only the 64-bit record holds
_ENCRYPTED = 1  # flag of an entry
ZIP_ERRORS = (
    zipfile.BadZipFile, struct.error, OSError, ValueError, RuntimeError, EOFError, OverflowError,
)  # fmt: skip
"""Errors that `zipfile` raises on damaged archives, encrypted entries and unknown versions."""


class FilePart(io.RawIOBase):
    """A range of bytes of an open file, as a file of its own; no read leaves the range.

    Args:
        file: the open file, which may be shared.
        start: position of the first byte.
        size: number of bytes.
    """

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, start, size, 0

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes; all that are left if it is negative."""
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        # A hostile size is cut before any memory is allocated for it.
        found = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position of the range and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a position before the first byte")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Return the current position in the range."""
        return self._at

    def seekable(self) -> bool:
        """Return true."""
        return True

    def readable(self) -> bool:
        """Return true."""
        return True


class StoredArchive:
    """The entries of a zip archive that lies in a range of an open file.

    Args:
        file: the open file, which may be shared.
        start: position of the archive's first byte.
        size: number of the archive's bytes.

    Attributes:
        names: names of all entries.

    Raises:
        ValueError: the directory is damaged or ambiguous.
    """

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        part = FilePart(file, start, size)
        try:
            require_directory_at_end(part, size)
            with zipfile.ZipFile(part) as archive:
                entries = archive.infolist()
        except ZIP_ERRORS as error:
            raise ValueError(f"its zip directory cannot be read ({error})") from None
        if not entries:
            raise ValueError("its zip directory is empty")
        # torch compares entry names without regard to case.
        self._entries = {entry.filename.lower(): entry for entry in entries}
        if len(self._entries) != len(entries):
            raise ValueError("two of its entries have one name")
        self.names = [entry.filename for entry in entries]

    @property
    def folder(self) -> str:
        """The folder that holds all entries of an archive as torch writes it."""
        return self.names[0].partition("/")[0]

    def has_entry(self, name: str) -> bool:
        """Return true if there is an entry of this name, in whatever case."""
        return name.lower() in self._entries

    def locate(self, name: str) -> tuple[int, int]:
        """Return the position of an entry's first byte in the file, and its byte count.

        Raises:
            ValueError: there is no such entry, or it is compressed, encrypted or reaches beyond
                the archive.
        """
        if (entry := self._entries.get(name.lower())) is None:
            raise ValueError(f"it has no entry {name}")
        # Compressed entries could expand far beyond the size of the file.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise ValueError(f"its entry {name} is compressed, which torch.save never does")
        header = FilePart(self._file, self._start, self._size)
        header.seek(entry.header_offset)
        raw = header.read(30)
        if len(raw) != 30 or raw[:4] != b"PK\x03\x04":
            raise ValueError(f"its entry {name} cannot be read")
        # The local header has a name and an extra field (padding) of its own lengths.
        begin = entry.header_offset + 30 + sum(struct.unpack("<2H", raw[26:]))
        if begin + entry.file_size > self._size:
            raise ValueError(f"its entry {name} claims {entry.file_size:,} bytes")
        return self._start + begin, entry.file_size

    def read_entry(self, name: str, most: int) -> bytes:
        """Read an entry of at most `most` bytes.

        Raises:
            ValueError: as in `locate`, or the entry is larger.
        """
        start, size = self.locate(name)
        if size > most:
            raise ValueError(f"{name} has {size:,} bytes")
        return FilePart(self._file, start, size).read()


def require_directory_at_end(file: IO[bytes] | FilePart, size: int) -> None:
    """Raise `ValueError` unless a file ends with one zip directory and its end record.

    A 64-bit end record, which `torch.save` writes as well, must agree with the 32-bit record.
    """
    # 98 bytes: a 64-bit end record (56), its locator (20) and the 32-bit end record (22).
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    signature, _, _, _, _, length, offset, comment = struct.unpack("<4s4H2LH", tail[-22:])
    ends = size - 22
    if tail[-42:-38] == _LOCATOR:  # torch.save writes the 64-bit end record as well
        ends = size - 98
        (at,) = struct.unpack("<Q", tail[-34:-26])
        wide = struct.unpack("<2Q", tail[40:56])
        # The 32-bit record may hold all ones in place of a number that needs 64 bits.
        same = all(a in (b, _UNSAID) for a, b in zip((length, offset), wide, strict=True))
        if at != ends or tail[:4] != _END64 or not same:
            raise ValueError("its two end records do not agree")
        length, offset = wide
    if signature != _END or comment or length + offset != ends:
        raise ValueError("it does not end with one zip directory")
    if length > _LARGEST_DIRECTORY:
        raise ValueError(f"it has {length:,} bytes")
