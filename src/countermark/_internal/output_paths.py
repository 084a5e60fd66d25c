"""Check the paths of results before a long computation begins, and write new files there."""

from __future__ import annotations

import os
from pathlib import Path

from countermark.errors import ConfigError


def require_free_path(path: str | Path) -> None:
    """Raise `ConfigError` if a file or folder has this name already."""
    if os.path.lexists(path):
        raise ConfigError(_describe_taken_path(path))


def write_new_file(path: str | Path, content: bytes) -> None:
    """Write a new file, whole or not at all; refuse a name that is taken.

    Raises:
        ConfigError: the name is taken, from the start or by the end; the existing file or folder is
            left untouched.
    """
    # Imported here because it loads pydantic, and every `--help` loads this module.
    from countermark._internal import files

    try:
        # Checked again here: the name may have been taken while the result was computed.
        with files.create_file(Path(path)) as temporary:
            temporary.write_bytes(content)
    except FileExistsError:
        raise ConfigError(_describe_taken_path(path)) from None


def _describe_taken_path(path: str | Path) -> str:
    """Return the message for a name that is taken."""
    return f"{path} exists: choose another name or move it away"


def require_writable_place(path: str | Path) -> None:
    """Check that a file or folder can be made at a path.

    Raises:
        ConfigError: the nearest existing parent is no folder, or may not be written to.
    """
    # Missing parents are made later, so the nearest existing one decides.
    above = next(each for each in Path(path).absolute().parents if each.exists())
    if not above.is_dir():
        raise ConfigError(f"{path}: {above} is no folder: choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: {above} may not be written to: choose another place")
