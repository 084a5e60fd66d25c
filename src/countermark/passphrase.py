"""A passphrase that nobody types: out of the file that COUNTERMARK_PASSPHRASE_FILE names."""

from __future__ import annotations

import os
from pathlib import Path

from countermark.errors import ConfigError

VARIABLE = "COUNTERMARK_PASSPHRASE_FILE"


def passphrase_file() -> str | None:
    """The passphrase in the file that is named for it; None where none is.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        passphrase = Path(path).read_text().rstrip("\n")
    except OSError as error:
        raise ConfigError(f"{VARIABLE}={path}: {error.strerror}") from None
    if not passphrase:
        raise ConfigError(f"{VARIABLE}={path} is empty: put a passphrase there")
    return passphrase
