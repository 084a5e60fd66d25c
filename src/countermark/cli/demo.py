"""The command `demo`: mark a small network, find the mark, and show that others lack it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")] = Path("demo"),
) -> int:
    """Mark a small network, and show that other models lack the mark.

    The network learns real handwritten digits, and takes a minute.

    \b
    Example:
        countermark demo --out demo
    """
    from countermark.training.demo import run_demo

    run_demo(out)
    return 0
