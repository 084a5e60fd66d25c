"""Who may come in: one token, sessions that it opens, and how often an address may ask."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from countermark.errors import ConfigError
from countermark.files import read_regular

VARIABLE = "COUNTERMARK_TOKEN"
_LEAST, _MOST_TOKEN = 20, 1 << 10  # characters of a token, bytes of its file
_HOURS, _MOST_SESSIONS, _MOST_ADDRESSES = 12, 1000, 10_000


def without_token(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes that need no token."""
    return {name: value for name, value in environment.items() if name != VARIABLE}


def token_digest(token: str) -> bytes:
    """SHA-256 of a token, 32 bytes."""
    return hashlib.sha256(token.encode()).digest()


def find_token(file: Path | None, environment: Mapping[str, str]) -> tuple[str, bool]:
    """The token: of the file, else of the environment, else a new one.

    Returns: the token, and whether it is new and must be told.

    Raises:
        ConfigError: a file that others can read or nobody, or a token that is too short.
    """
    if file is not None:
        token, where = _in_file(file), str(file)
    elif VARIABLE in environment:
        token, where = environment[VARIABLE], VARIABLE
    else:
        return secrets.token_urlsafe(24), True
    if len(token) < _LEAST or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{where}: a token has {_LEAST} printable ASCII characters or more")
    return token, False


def _in_file(file: Path) -> str:
    try:
        content = read_regular(file, _MOST_TOKEN)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; expected a file with a token") from None
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise ConfigError(f"{file}: others can read the token: chmod 600 it")
    return content.decode("ascii", "replace").strip()


@dataclass(frozen=True)
class Session:
    """Somebody who showed the token.

    Attributes:
        csrf: what every form of his has to bring back.
        ends: by the monotonic clock.
    """

    csrf: str = field(repr=False)
    ends: float


class Sessions:
    """Those who came in by the token; they are gone when the server ends."""

    def __init__(self, token_sha256: bytes) -> None:
        self._token = token_sha256
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def knows(self, token: str) -> bool:
        """Whether this is the token."""
        return hmac.compare_digest(token_digest(token), self._token)

    def open(self) -> str:
        """A new session; the secret that its cookie bears."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            while len(self._open) >= _MOST_SESSIONS:
                self._open.popitem(last=False)
            ends = time.monotonic() + 3600 * _HOURS
            self._open[name] = Session(secrets.token_urlsafe(24), ends)
        return name

    def of(self, name: str | None) -> Session | None:
        """The session of a cookie; None when there is none or it has ended."""
        with self._lock:
            found = self._open.get(name or "")
            if found is not None and found.ends < time.monotonic():
                del self._open[name or ""]
                return None
            return found

    def close(self, name: str | None) -> None:
        """End a session."""
        with self._lock:
            self._open.pop(name or "", None)


class Pace:
    """How often an address may do something: so often at once, and so often a second after that."""

    def __init__(
        self, a_second: float, at_once: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._a_second, self._at_once, self._clock = a_second, at_once, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, address: str) -> bool:
        """Whether it may, now; if so, it counts."""
        now = self._clock()
        with self._lock:
            left, then = self._left.pop(address, (float(self._at_once), now))
            left = min(self._at_once, left + (now - then) * self._a_second)
            self._left[address] = (left - 1 if left >= 1 else left, now)
            if len(self._left) > _MOST_ADDRESSES:
                self._left.popitem(last=False)
            return left >= 1
