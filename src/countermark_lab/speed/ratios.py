"""Ratios of CPU time, measured in pairs in one run, each with the limit that it must keep."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """One measured ratio and its limit: the median, smallest and largest of all pairs."""

    what: str
    against: str
    median: float
    least: float
    most: float
    pairs: int
    limit: float

    @property
    def is_within_limit(self) -> bool:
        """True if the median lies within the limit."""
        return self.median <= self.limit


def summarise_ratios(what: str, against: str, ratios: list[float], limit: float) -> Ratio:
    """Summarise the ratios of all pairs in one `Ratio`."""
    median = statistics.median(ratios)
    return Ratio(what, against, median, min(ratios), max(ratios), len(ratios), limit)


def measure_in_turn(
    first: Callable[[], float], second: Callable[[], float], pairs: int
) -> list[float]:
    """Measure the ratios first / second of CPU seconds.

    The two sides run in turn, after one warm-up of each.
    """
    # The first run of each side fills caches and would distort the first ratio.
    first(), second()
    return [first() / second() for _ in range(pairs)]


def measure_against_torch(
    what: str, seconds: Callable[[], float], limit: float, pairs: int = 7
) -> Ratio:
    """Measure the ratio of CPU seconds to those of a process that only imports torch."""
    ratios = measure_in_turn(seconds, lambda: time_command(["-c", "import torch"]), pairs)
    return summarise_ratios(what, "python -c 'import torch'", ratios, limit)


def time_command(arguments: Sequence[str], *, exits: int = 0) -> float:
    """Return user and system time of one Python process and of its children, in seconds.

    Args:
        arguments: arguments of the Python interpreter.
        exits: the expected exit status.

    Raises:
        RuntimeError: the process exits with another status.
    """
    before = read_child_seconds()
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, *arguments], capture_output=True, check=False
    )
    # A command that fails early would look quick.
    if done.returncode != exits:
        raise RuntimeError(f"{arguments} exits with {done.returncode}: {done.stderr.decode()}")
    return read_child_seconds() - before


def read_child_seconds() -> float:
    """Return user and system time of all finished child processes, in seconds."""
    times = os.times()
    return times.children_user + times.children_system
