"""Decide when to send a request: overall deadline, rate limit, and growing pauses."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from countermark.predictors.remote.options import RemoteOptions

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds

_drawn = random.SystemRandom()


class RequestPacer:
    """The clock of one endpoint; only the time that is spent asking counts.

    Args:
        options: deadline in seconds and rate in requests a second.
    """

    def __init__(self, options: RemoteOptions) -> None:
        self._remains, self._ends = options.deadline, 0.0
        self._between = 1 / options.rate if options.rate else 0.0
        self._next = time.monotonic()

    @contextmanager
    def count_time(self) -> Iterator[None]:
        """Count the seconds in this block towards the deadline."""
        self._ends = time.monotonic() + self._remains
        try:
            yield
        finally:
            self._remains = self.compute_time_left()

    def compute_time_left(self) -> float:
        """Return the seconds until the deadline, at least 0."""
        return max(0.0, self._ends - time.monotonic())

    def wait_for_turn(self, pause: float) -> bool:
        """Wait for `pause` seconds and for the rate limit.

        Returns: true if a request may be sent; false, without waiting, if the wait would outlast
            the deadline.
        """
        wait = max(pause, self._next - time.monotonic(), 0.0)
        if wait >= self.compute_time_left():
            return False
        time.sleep(wait)
        self._next = time.monotonic() + self._between
        return True

    def compute_pause(self, attempts: int, wait: float | None) -> float:
        """Return the pause in seconds after `attempts` attempts: exponential, with full jitter.

        If the server asked for a wait, that wait replaces the pause and delays all later requests.

        Args:
            attempts: attempts so far for this request, at least 1.
            wait: seconds that the server asked for, if any.
        """
        if wait is not None:
            # Busy servers ask every client to wait, so later batches wait as well.
            self._next = max(self._next, time.monotonic() + wait)
            return 0.0
        # Full jitter: a uniform draw keeps clients that failed together from coming back together.
        return _drawn.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempts - 1)))
