"""Access: the one token, the sessions it opens, and the rate limit of each client address."""

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

from countermark._internal.files import read_regular
from countermark.errors import ConfigError

VARIABLE = "COUNTERMARK_TOKEN"
# Fewest characters of a token, and most bytes of its file.
_LEAST, _MOST_TOKEN = 20, 1 << 10
# Sessions and addresses are bounded, so that many clients cannot fill the memory.
_HOURS, _MOST_SESSIONS, _MOST_ADDRESSES = 12, 1000, 10_000


def remove_token(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of an environment without the token, for child processes."""
    return {name: value for name, value in environment.items() if name != VARIABLE}


def digest_token(token: str) -> bytes:
    """Return the SHA-256 digest of a token, 32 bytes."""
    return hashlib.sha256(token.encode()).digest()


def find_token(file: Path | None, environment: Mapping[str, str]) -> tuple[str, bool]:
    """Return the token from the file, else from the environment, else a new token.

    Args:
        file: a file with the token, or None.
        environment: may hold the token in COUNTERMARK_TOKEN.

    Returns: the token, and whether it is new and must be printed.

    Raises:
        ConfigError: the file cannot be read or other users can read it, or the token is too short.
    """
    if file is not None:
        token, where = _read_token_file(file), str(file)
    elif VARIABLE in environment:
        token, where = environment[VARIABLE], VARIABLE
    else:
        return secrets.token_urlsafe(24), True
    if len(token) < _LEAST or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{where}: a token has {_LEAST} printable ASCII characters or more")
    return token, False


def _read_token_file(file: Path) -> str:
    """Read the token from a file that only its owner may read.

    Raises:
        ConfigError: the file cannot be read, or other users can read it.
    """
    try:
        content = read_regular(file, _MOST_TOKEN)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; expected a file with a token") from None
    # Windows has no such mode bits; there the folder's access list protects the file.
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise ConfigError(f"{file}: others can read the token: chmod 600 it")
    return content.decode("ascii", "replace").strip()


@dataclass(frozen=True)
class Session:
    """A session of a visitor who showed the token.

    Attributes:
        csrf: a secret that every form of the session has to send back.
        ends: the end of the session, in seconds of the monotonic clock.
    """

    csrf: str = field(repr=False)
    ends: float


class SessionStore:
    """The open sessions, kept in memory until the server ends.

    Args:
        token_sha256: the digest of the token that opens a session, 32 bytes.
    """

    def __init__(self, token_sha256: bytes) -> None:
        self._token = token_sha256
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def is_token(self, token: str) -> bool:
        """Return true if this is the server's token."""
        # Comparing digests in constant time reveals neither characters nor length by the time.
        return hmac.compare_digest(digest_token(token), self._token)

    def open_session(self) -> str:
        """Open a session and return its name, the secret in the session's cookie."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            # Drop the oldest session instead of refusing a visitor who has the token.
            while len(self._open) >= _MOST_SESSIONS:
                self._open.popitem(last=False)
            ends = time.monotonic() + 3600 * _HOURS
            self._open[name] = Session(secrets.token_urlsafe(24), ends)
        return name

    def find_session(self, name: str | None) -> Session | None:
        """Return the session with this name, or None if there is no such session or it ended."""
        with self._lock:
            found = self._open.get(name or "")
            if found is not None and found.ends < time.monotonic():
                del self._open[name or ""]
                return None
            return found

    def close_session(self, name: str | None) -> None:
        """End the session with this name, if there is one."""
        with self._lock:
            self._open.pop(name or "", None)


class RateLimiter:
    """A rate limit per client address, as a token bucket.

    Args:
        a_second: the attempts a second that refill the bucket.
        at_once: the size of the bucket.
        clock: returns seconds; replaceable for tests.
    """

    def __init__(
        self, a_second: float, at_once: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._a_second, self._at_once, self._clock = a_second, at_once, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def admit_attempt(self, address: str) -> bool:
        """Return true if the address may make an attempt now, and count the attempt."""
        now = self._clock()
        with self._lock:
            left, then = self._left.pop(address, (float(self._at_once), now))
            # Refill for the time since the last attempt, up to a full bucket.
            left = min(self._at_once, left + (now - then) * self._a_second)
            self._left[address] = (left - 1 if left >= 1 else left, now)
            # The address that was silent longest has the fullest bucket, so forget that one.
            if len(self._left) > _MOST_ADDRESSES:
                self._left.popitem(last=False)
            return left >= 1
