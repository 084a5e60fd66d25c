"""Processes that have the library loaded already, so that no command of a test waits for torch.

A server of `multiprocessing` loads it once for each worker and forks it for every command. Secrets
are drawn from a text, other random numbers from the seed of the run as well: a mark that one secret
in a hundred would not train fails always or never, and not for somebody who changed something else.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from draws import draw_from, name_draw

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "countermark.cli",
        "countermark.training.embed_classifier",
        "countermark.training.build_embedding",
        "countermark.verification.verify",
        "matplotlib.figure",
        "scipy.stats",
        "torch._dynamo",  # torch's first optimizer imports it, for two seconds
    ]
)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, None where it had to be killed, and what it printed."""

    code: int | None
    said: str


@dataclass(frozen=True)
class Loaded:
    """A process that was started; `wait` for its end."""

    process: BaseProcess
    output: Path

    def wait(self, timeout: float) -> Ended:
        """Wait for its end for so many seconds, then kill it."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        return Ended(code, self.output.read_text(encoding="utf-8"))


def run_loaded(
    task: Callable[..., Any], *given: Any,
    folder: Path, timeout: float, drawn_from: str, env: Mapping[str, str] | None = None,
) -> Ended:  # fmt: skip
    """Call `task(*given)` in a process of its own that has the library loaded.

    Args:
        task: a function of a module, whose exit is that of the process.
        folder: where it works.
        timeout: seconds until it is killed.
        drawn_from: what all its secrets are drawn from, one after another.
        env: variables to set beside those of this process.
    """
    with start_loaded(task, *given, folder=folder, drawn_from=drawn_from, env=env) as started:
        return started.wait(timeout)


@contextmanager
def start_loaded(
    task: Callable[..., Any], *given: Any,
    folder: Path, drawn_from: str, env: Mapping[str, str] | None = None,
) -> Iterator[Loaded]:  # fmt: skip
    """Start what `run_loaded` runs; it has ended, or is killed, when the block ends."""
    changed = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        **(env or {}),
    }
    handle, said = tempfile.mkstemp()
    os.close(handle)
    about = (str(folder), said, drawn_from, changed)
    child = _FORKS.Process(target=_settled, args=(task, given, *about))
    started = Loaded(child, Path(said))
    child.start()
    try:
        yield started
    finally:
        started.wait(0)
        started.output.unlink()


def _settled(
    task: Callable[..., Any], given: tuple[Any, ...],
    folder: str, said: str, drawn_from: str, env: dict[str, str],
) -> None:  # fmt: skip
    """Become the process that the test wants, and do its task."""
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(
        None, env.get("PYTHONPATH", "").split(os.pathsep)
    )  # as Python itself does
    os.chdir(folder)
    output, nothing = os.open(said, os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((output, 1), (output, 2), (nothing, 0)):
        os.dup2(source, target)
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - the process' own
        for fd, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    draw_from(name_draw(drawn_from), secrets=drawn_from)
    try:
        task(*given)
    finally:
        sys.stdout.flush()
