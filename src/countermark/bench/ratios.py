"""Ratios of CPU time, paired in one run, each with the limit that it has to keep."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """One measured ratio and the limit it has to keep."""

    what: str
    against: str
    median: float
    least: float
    most: float
    pairs: int
    limit: float

    @property
    def kept(self) -> bool:
        """Whether the median lies within the limit."""
        return self.median <= self.limit


def ratio(what: str, against: str, ratios: list[float], limit: float) -> Ratio:
    """What all pairs say together."""
    median = statistics.median(ratios)
    return Ratio(what, against, median, min(ratios), max(ratios), len(ratios), limit)


def paired(first: Callable[[], float], second: Callable[[], float], pairs: int) -> list[float]:
    """Ratios first / second of seconds, the two in turn, after one warm-up of each."""
    first(), second()
    return [first() / second() for _ in range(pairs)]


def against_torch(what: str, seconds: Callable[[], float], limit: float, pairs: int = 7) -> Ratio:
    """Of seconds, to those of a process that imports torch."""
    ratios = paired(seconds, lambda: command(["-c", "import torch"]), pairs)
    return ratio(what, "python -c 'import torch'", ratios, limit)


def command(arguments: Sequence[str], *, exits: int = 0) -> float:
    """User and system time of one Python process and of those it starts, in seconds.

    Raises:
        RuntimeError: it exits otherwise than expected.
    """
    before = children()
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, *arguments], capture_output=True, check=False
    )
    if done.returncode != exits:
        raise RuntimeError(f"{arguments} exits with {done.returncode}: {done.stderr.decode()}")
    return children() - before


def children() -> float:
    """User and system time of all processes that were waited for, in seconds."""
    times = os.times()
    return times.children_user + times.children_system
