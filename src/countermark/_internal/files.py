"""Write files whole or not at all, and read JSON out of hostile files.

A file is written beside its place, synced and then renamed. JSON is read so strictly that no other
reader can see a different document in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Model = TypeVar("_Model", bound=BaseModel)
# Counted before parsing, because pydantic would have taken the memory already.
_MOST_PARTS = 1 << 21  # values in a document; pydantic takes a kilobyte for each empty list


class StoredDocument(BaseModel):
    """A stored document: no unknown field, no missing field, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Open a temporary file beside `path` that replaces `path` when the block ends well.

    Yields: the temporary path, for the block to write to. After an exception it is removed and
        `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        sync_to_disk(temporary)
        # Atomic within a directory. Syncing the parent makes the new name survive a power cut.
        temporary.replace(path)
        sync_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def create_file(path: Path) -> Iterator[Path]:
    """Open a temporary file beside `path` that gets this name when the block ends well.

    Yields: the temporary path, for the block to write to; it is removed in any case.

    Raises:
        FileExistsError: the name is taken, from the start or by the end; the existing file or
            folder is left untouched.
    """
    # Looked at before the work as well, so that a taken name costs no computation. `lexists` also
    # sees a link that points nowhere.
    if os.path.lexists(path):
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        sync_to_disk(temporary)
        _take_name(temporary, path)
        sync_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _take_name(temporary: Path, path: Path) -> None:
    """Give a temporary file its final name, if no other file has this name.

    A plain rename would replace a file that another process made in the meantime.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(path) from None
    except OSError:  # no hard links on this file system: look just before the rename
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        temporary.replace(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def write_secret(path: Path, content: bytes) -> None:
    """Write `content` to a new file that only its owner can read (0600), whole or not at all.

    Raises:
        FileExistsError: the name is taken; the existing file or folder is left untouched.
    """
    with create_file(path) as temporary:
        # The mode is set on creation: a later chmod would leave a moment in which others can read.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


@contextmanager
def create_folder(folder: Path) -> Iterator[Path]:
    """Make a temporary folder (0700) beside `folder` that gets this name when the block ends well.

    Yields: the temporary folder, for the block to fill. The block has to sync its files itself.

    Raises:
        FileExistsError: the name is taken; the existing file or folder is left untouched.
    """
    if os.path.lexists(folder):
        raise FileExistsError(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The random part lets two processes write to one place without sharing a temporary name.
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        sync_to_disk(temporary)
        temporary.rename(folder)
        sync_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Create `folder` (0700) with `files` (0600), whole or not at all.

    Raises:
        FileExistsError: the name is taken; the existing file or folder is left untouched.
    """
    with create_folder(folder) as temporary:
        for name, content in files.items():
            descriptor = os.open(temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def read_regular(path: Path, largest: int) -> bytes:
    """Read a regular file of at most `largest` bytes.

    Raises:
        ValueError: the file is missing, not regular or larger. The message says which of these,
            without the file's name.
    """
    with _open_regular(path, largest) as (file, size):
        content = file.read(size + 1)  # not `largest`: Python allocates the whole buffer first
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return content


def digest_regular(path: Path, largest: int) -> str:
    """Compute SHA-256 (hex) of a regular file of at most `largest` bytes, piece by piece.

    Raises:
        ValueError: the file is missing, not regular or larger. The message says which of these,
            without the file's name.
    """
    with _open_regular(path, largest) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _open_regular(path: Path, largest: int) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file of at most `largest` bytes; yield the file and its size.

    Raises:
        ValueError: the file is missing, not regular or larger, or reading fails in the block.
    """
    try:
        status = path.stat()
        # Opening a pipe would wait for ever, and a device has no end.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > largest:
            raise ValueError(f"it has more than {largest:,} bytes")
        with path.open("rb") as file:
            yield file, status.st_size
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None


def parse_document(model: type[_Model], content: bytes) -> _Model:
    """Parse a JSON document strictly into a pydantic model.

    Args:
        model: the model's class.
        content: the document, as UTF-8.

    Raises:
        ValueError: the content is no such document. The message names the first field that is
            unknown, missing or wrong.
    """
    require_few_parts(content)
    # Pydantic's own parser takes the last of two equal names without a word.
    parse_json(content)
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{where}: {first['msg']}") from None


def require_few_parts(content: bytes) -> None:
    """Raise `ValueError` for JSON of so many values that pydantic would need gigabytes for them.

    Args:
        content: the document, before it is parsed.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > _MOST_PARTS:
        raise ValueError(f"it has more than {_MOST_PARTS:,} parts")


def parse_json(content: bytes, *, non_finite: bool = False) -> Any:
    """Parse a UTF-8 JSON document in which no object has a name twice and every number is finite.

    Args:
        content: the document.
        non_finite: accept NaN and infinities, which some servers write.

    Raises:
        ValueError: the content is no such document, or nests too deeply.
    """
    constant = float if non_finite else _refuse_constant
    try:
        # Some readers take the first of two equal names and some the last: a signed document could
        # then mean two things.
        return json.loads(
            content.decode(), object_pairs_hook=_require_unique_names, parse_constant=constant
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _require_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object out of its pairs; raise `ValueError` if two pairs have one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)  # in linear time
        raise ValueError(f"the name {twice!r} stands twice")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    """Raise `ValueError` for NaN or an infinity, which are no JSON."""
    raise ValueError(f"{constant} is no JSON number")


def sync_to_disk(path: Path) -> None:
    """Force a file or directory to disk; skip directories that Windows does not open."""
    with suppress(PermissionError):
        # Windows syncs a file through a descriptor that may write, and opens no directory.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
