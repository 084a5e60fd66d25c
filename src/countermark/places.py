"""Where something is to be written: looked at before anything long begins."""

from __future__ import annotations

import os
from pathlib import Path

from countermark import files
from countermark.errors import ConfigError


def require_free(path: str | Path) -> None:
    """Raise `ConfigError` where something has that name already."""
    if os.path.lexists(path):
        raise ConfigError(_say_taken(path))


def write_new(path: str | Path, content: bytes) -> None:
    """Write a new file, whole or not at all.

    Raises:
        ConfigError: something has that name, from the start or by the end; it is left untouched.
    """
    try:
        with files.creating_file(Path(path)) as temporary:
            temporary.write_bytes(content)
    except FileExistsError:
        raise ConfigError(_say_taken(path)) from None


def _say_taken(path: str | Path) -> str:
    return f"{path} exists: choose another name or move it away"


def require_place(path: str | Path) -> None:
    """See to it that a file or folder can be made there.

    Raises:
        ConfigError: what is above it is no folder, or may not be written to.
    """
    above = next(each for each in Path(path).absolute().parents if each.exists())
    if not above.is_dir():
        raise ConfigError(f"{path}: {above} is no folder: choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: {above} may not be written to: choose another place")
