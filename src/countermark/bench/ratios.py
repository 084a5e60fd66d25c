"""Ratios of CPU time, paired in one run, each with the limit that it has to keep."""

from __future__ import annotations

import statistics
from collections.abc import Callable
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
