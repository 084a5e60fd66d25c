"""What stands beside every figure: by what it was computed, where and when."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from countermark._version import VERSION


def provenance(seconds: float) -> dict[str, Any]:
    """Versions, source, device, threads and date, and how many seconds something took here."""
    return {
        "countermark": VERSION,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """The commit of the source tree this runs from, with -dirty where the package was changed.

    Files beside it, fresh results above all, change no figure.
    """
    package = Path(__file__).parents[1]
    try:
        commit = _git(package, "describe", "--always", "--abbrev=12", "--match=v*")
        changed = _git(package, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return "no repository"
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *words: str) -> str:
    said = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603, S607
    return said.stdout.strip()
