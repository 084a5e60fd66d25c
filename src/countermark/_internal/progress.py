"""One progress bar for every operation that may take long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 2.0  # seconds before a bar appears


@contextmanager
def show_progress(what: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on a terminal's standard error, once two seconds have passed.

    Args:
        what: text beside the bar.
        total: number of steps; None if nobody knows it.

    Yields: a function that takes the number of steps just done.
    """
    from rich.console import Console  # late: a program without a bar need not wait for rich
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    # Standard output is for results, which may be piped into a file or another program.
    bar = Progress(*columns, console=Console(stderr=True))
    task, began = bar.add_task(what, total=total), time.monotonic()

    def advance(steps: float) -> None:
        """Count steps, and start to show the bar once the operation takes long."""
        bar.advance(task, steps)
        # A bar that appears and ends at once would only flicker. In a log file, which is no
        # terminal, a bar would be noise.
        late = time.monotonic() - began > _PATIENCE
        if late and bar.console.is_terminal and not bar.live.is_started:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
