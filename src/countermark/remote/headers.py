"""Headers for a suspect's door, such as Authorization, out of a file and never shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from countermark.errors import ConfigError

VARIABLE = "COUNTERMARK_HEADERS_FILE"
_LARGEST = 1 << 16  # bytes
_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)"
)
_OURS = {"accept-encoding", "connection", "content-length", "content-type", "host",
         "transfer-encoding"}  # fmt: skip


def secret_headers() -> dict[str, str]:
    """The headers in the file that COUNTERMARK_HEADERS_FILE names; none where it is not set.

    A line is `Name: value`; empty lines and those that begin with # are passed over.

    Raises:
        ConfigError: the file cannot be read, or a line is no header; says which line, never what
            stands in it, nor the variable's value, which could be a header by mistake.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(_read(Path(named)).splitlines(), 1):
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


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no such name"
        raise ConfigError(f"the file that {VARIABLE} names cannot be read: {why}") from None
    if len(content) > _LARGEST:
        raise ConfigError(f"the file that {VARIABLE} names has more than {_LARGEST:,} bytes")
    return content.decode("ascii", errors="replace")
