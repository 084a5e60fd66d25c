"""Damage to files of every kind, drawn by a seed."""

from __future__ import annotations

import io
import random
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
_HOSTILE_NUMBERS = (
    b"0", b"-1", b"1", b"2147483648", b"4294967296", b"9223372036854775807",
    b"18446744073709551616", b"1e400", b"-1e400", b"0.5", b"1" * 400, b"NaN", b"null",
)  # fmt: skip
_HOSTILE_INTEGERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
_ZIP_RECORDS = re.compile(b"PK(?:\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)")
_LONGEST_HEADER = 1 << 16

Mutation = Callable[[bytes, bytes, random.Random], bytes]
"""From a valid file and another valid one of its kind to a damaged one."""


def flip_bits(content: bytes, _: bytes, drawn: random.Random) -> bytes:
    """Turn some bits."""
    changed = bytearray(content)
    for _unused in range(drawn.choice((1, 1, 2, 8))):
        changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def insert_bytes(content: bytes, _: bytes, drawn: random.Random) -> bytes:
    """Put in random bytes."""
    at = drawn.randrange(len(content) + 1)
    return content[:at] + drawn.randbytes(drawn.choice((1, 2, 8, 64))) + content[at:]


def delete_bytes(content: bytes, _: bytes, drawn: random.Random) -> bytes:
    """Cut out bytes."""
    at = drawn.randrange(len(content))
    return content[:at] + content[at + drawn.choice((1, 2, 8, 64)) :]


def truncate(content: bytes, _: bytes, drawn: random.Random) -> bytes:
    """Cut off the end."""
    return content[: drawn.randrange(len(content))]


def copy_block(content: bytes, _: bytes, drawn: random.Random) -> bytes:
    """Copy a block over another place, or put it in there."""
    size = drawn.choice((1, 4, 16, 64, 256))
    start, at = drawn.randrange(len(content)), drawn.randrange(len(content))
    block = content[start : start + size]
    return content[:at] + block + content[at + drawn.choice((0, len(block))) :]


def zero_range(content: bytes, _: bytes, drawn: random.Random) -> bytes:
    """Overwrite a range with zeros."""
    at = drawn.randrange(len(content))
    end = min(len(content), at + drawn.choice((1, 4, 16, 64, 1024)))
    return content[:at] + bytes(end - at) + content[end:]


def splice(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """The beginning of one valid file and the end of another."""
    at = drawn.randrange(len(content))
    return content[:at] + other[drawn.choice((at, drawn.randrange(len(other)))) :]


def edit_number(content: bytes, _: bytes, drawn: random.Random) -> bytes:
    """Overwrite a number: one in digits, or some bytes of a binary one."""
    found = list(_NUMBER.finditer(content[:_LONGEST_HEADER]))
    if found and drawn.random() < 0.7:
        match = drawn.choice(found)
        return content[: match.start()] + drawn.choice(_HOSTILE_NUMBERS) + content[match.end() :]
    return _with_integer(content, drawn.randrange(len(content)), drawn)


def edit_zip(content: bytes, _: bytes, drawn: random.Random) -> bytes:
    """Overwrite a field of a record of a zip directory; in no zip file, some bytes of the start."""
    records = [match.start() for match in _ZIP_RECORDS.finditer(content)]
    at = drawn.choice(records) + 4 if records else 0
    return _with_integer(content, min(len(content) - 1, at + drawn.randrange(44)), drawn)


def _with_integer(content: bytes, at: int, drawn: random.Random) -> bytes:
    size = drawn.choice((1, 2, 4, 8))
    value = drawn.choice(_HOSTILE_INTEGERS) & ((1 << 8 * size) - 1)
    changed = content[:at] + value.to_bytes(size, drawn.choice(("little", "big")))
    return changed + content[at + size :]


MUTATIONS: Mapping[str, Mutation] = {
    "bits": flip_bits, "insert": insert_bytes, "delete": delete_bytes, "truncate": truncate,
    "copy": copy_block, "zeros": zero_range, "splice": splice, "number": edit_number,
    "zip": edit_zip,
}  # fmt: skip


def with_checksums(content: bytes) -> bytes:
    """A zip file whose entries have the checksums that they say, as far as it still is one.

    Else a reader of zip files would refuse nearly all damage before anybody parses an entry.
    """
    changed = bytearray(content)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
        at = content.index(b"PK\x01\x02")
        for entry in entries:
            local = entry.header_offset
            lengths = content[local + 26 : local + 30]
            begin = local + 30 + int.from_bytes(lengths[:2], "little")
            begin += int.from_bytes(lengths[2:], "little")
            found = zlib.crc32(content[begin : begin + entry.file_size]).to_bytes(4, "little")
            changed[local + 14 : local + 18] = found
            changed[at + 16 : at + 20] = found
            at = content.index(b"PK\x01\x02", at + 46) if entry is not entries[-1] else at
    except Exception:
        return content
    return bytes(changed) if len(changed) == len(content) else content
