"""`countermark serve` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cli_calls import environment
from rooms import TOKEN


@dataclass(frozen=True)
class Served:
    """A server that listens, and its process."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def served(folder: Path, *more: str) -> Iterator[Served]:
    """A server of a stocked folder, ended with the block however it ends."""
    words = [
        sys.executable, "-m", "countermark", "serve", "--ledger", "claims.db", "--port", "0",
        "--keys", "keys", "--suspects", "suspects", "--state", "state", "--authority", "root.pem",
        *more,
    ]  # fmt: skip
    process = subprocess.Popen(
        words, cwd=folder, env=environment({"COUNTERMARK_TOKEN": TOKEN}), text=True,
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("listening on "):
                yield Served(line.split()[-1], process)
                return
        raise AssertionError("".join(said))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
