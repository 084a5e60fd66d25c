"""Read a passphrase without a prompt, from the file that COUNTERMARK_PASSPHRASE_FILE names."""

from __future__ import annotations

import os
from pathlib import Path

from countermark.errors import ConfigError

VARIABLE = "COUNTERMARK_PASSPHRASE_FILE"


def read_passphrase_file() -> str | None:
    """Read the passphrase from the file that COUNTERMARK_PASSPHRASE_FILE names.

    Returns: None if the variable is not set.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        # Editors end a file with a line break, which is no part of the passphrase. Spaces are kept.
        passphrase = Path(path).read_text().rstrip("\n")
    except OSError as error:
        raise ConfigError(f"{VARIABLE}={path}: {error.strerror}") from None
    if not passphrase:
        raise ConfigError(f"{VARIABLE}={path} is empty: put a passphrase there")
    return passphrase
