"""The library's clock in tests: an hour ahead, so that what was stamped just now lies in its past.

A stamp allows for some seconds after its time. With the real clock every test of a dated key would
have to wait for them to pass.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from countermark.claims import statement

_AHEAD_BY = timedelta(hours=1)
AFTER_STAMPS = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=30)
"""Later than every stamp of a test run, and past by the library's clock."""
AFTER_STAMPS_TEXT = statement.format_time(AFTER_STAMPS)
NEXT_YEAR = f"{datetime.now(UTC).year + 1}-12-31"
BEFORE_STAMPS = datetime.now(UTC) - timedelta(days=1)


def put_clock_ahead() -> None:
    """Let the library take it for an hour later than it is."""
    statement.current_time = _an_hour_ahead


def _an_hour_ahead() -> datetime:
    return datetime.now(UTC) + _AHEAD_BY


def wait_for_stamps() -> str:
    """Wait until all stamps so far lie in the past by the real clock; return that moment."""
    time.sleep(2.5)  # an accuracy of one second, and one for the fraction
    return statement.format_time(datetime.now(UTC).replace(microsecond=0))
