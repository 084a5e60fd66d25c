"""Provenance of a result: library versions, source commit, device, threads and date."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from countermark._version import VERSION


def collect_provenance(seconds: float) -> dict[str, Any]:
    """Return versions, source commit, device, threads and date for a result.

    Args:
        seconds: how long the computation of the result took.
    """
    return {
        "countermark": VERSION,
        "commit": _describe_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
        # Sums in another order round differently: the number of threads can change weights.
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _describe_commit() -> str:
    """Return the commit of the source tree, with -dirty if the package was changed.

    Files beside the package, fresh results above all, change no figure and are not looked at.
    """
    package = Path(__file__).parents[1]
    try:
        commit = _run_git(package, "describe", "--always", "--abbrev=12", "--match=v*")
        changed = _run_git(package, "status", "--porcelain", "--", ".")
    # An installed package has no repository, and a machine may have no git.
    except (OSError, subprocess.CalledProcessError):
        return "no repository"
    return f"{commit}-dirty" if changed else commit


def _run_git(folder: Path, *words: str) -> str:
    """Run git in a folder and return its stripped standard output."""
    said = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603, S607
    return said.stdout.strip()
