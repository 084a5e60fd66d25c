"""One progress bar for everything that may take long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 2.0  # seconds before a bar appears


@contextmanager
def progress(what: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal's standard error, once two seconds have passed.

    Args:
        what: said beside the bar.
        total: how far it goes; None when nobody knows.

    Yields: a function that takes the steps just done.
    """
    from rich.console import Console  # not on top: what shows no bar need not wait for rich
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
    bar = Progress(*columns, console=Console(stderr=True))
    task, began = bar.add_task(what, total=total), time.monotonic()

    def advance(steps: float) -> None:
        bar.advance(task, steps)
        late = time.monotonic() - began > _PATIENCE
        if late and bar.console.is_terminal and not bar.live.is_started:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
