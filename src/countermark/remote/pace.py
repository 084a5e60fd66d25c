"""When to ask: the deadline for everything, the rate, and pauses that grow."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from countermark.remote.options import RemoteOptions

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds

_drawn = random.SystemRandom()


class Pace:
    """The clock of one endpoint; only the time that is spent asking counts."""

    def __init__(self, options: RemoteOptions) -> None:
        self._remains, self._ends = options.deadline, 0.0
        self._between = 1 / options.rate if options.rate else 0.0
        self._next = time.monotonic()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Seconds in this block count towards the deadline."""
        self._ends = time.monotonic() + self._remains
        try:
            yield
        finally:
            self._remains = self.left()

    def left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self._ends - time.monotonic())

    def turn(self, pause: float) -> bool:
        """Wait for `pause` seconds and for the rate.

        Returns: whether a request may be sent; False, at once, when the wait or the deadline
            leaves no time for it.
        """
        wait = max(pause, self._next - time.monotonic(), 0.0)
        if wait >= self.left():
            return False
        time.sleep(wait)
        self._next = time.monotonic() + self._between
        return True

    def after(self, attempts: int, wait: float | None) -> float:
        """The pause in seconds after so many attempts: exponential, with full jitter.

        A wait that the server asks for replaces it, and holds for all that is asked later.
        """
        if wait is not None:
            self._next = max(self._next, time.monotonic() + wait)
            return 0.0
        return _drawn.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempts - 1)))
