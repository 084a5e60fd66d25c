"""Secret request headers, such as Authorization, read out of a file and never shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from countermark.errors import ConfigError

VARIABLE = "COUNTERMARK_HEADERS_FILE"
_LARGEST = 1 << 16  # bytes
# A token as in RFC 9110, section 5.1, and a value of printable ASCII. A line break inside a value
# would begin a header of its own.
_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)"
)
# Headers that the transport sets. A second value could make server and client disagree about where
# a request ends.
_OURS = {"accept-encoding", "connection", "content-length", "content-type", "host",
         "transfer-encoding"}  # fmt: skip


def read_secret_headers() -> dict[str, str]:
    """Read the headers in the file that COUNTERMARK_HEADERS_FILE names.

    Each line is `Name: value`; empty lines and lines that begin with # are skipped.

    Returns: values by lower-case names; empty if the variable is not set.

    Raises:
        ConfigError: the file cannot be read, or a line is no header. The message has the number of
            the line, but neither its content nor the value of the variable, which a user may have
            set to the header itself by mistake.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(_read_headers_file(Path(named)).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or match[1].lower() in _OURS | found.keys():
            raise ConfigError(
                f"line {number} of the file in {VARIABLE}: expected `Name: value` in ASCII, each "
                f"name once and none of {', '.join(sorted(_OURS))}"
            )
        found[match[1].lower()] = match[2]
    return found


def _read_headers_file(path: Path) -> str:
    """Read the file of headers.

    Raises:
        ConfigError: the file cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no such name"
        raise ConfigError(f"the file that {VARIABLE} names cannot be read: {why}") from None
    if len(content) > _LARGEST:
        raise ConfigError(f"the file that {VARIABLE} names has more than {_LARGEST:,} bytes")
    return content.decode("ascii", errors="replace")
