"""Calls of the command line for its tests: inside this process, or as a process of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from countermark.cli.app import app
from countermark.cli.program import run_program
from countermark_lab.commands import app as lab_app

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds a process
LAB = "python -m countermark_lab"


@dataclass(frozen=True)
class Said:
    """What a call ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def notes(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("note: ")]

    @property
    def why(self) -> str:
        """The one line beside the notes that says what stopped the call."""
        (line,) = (each for each in self.err.splitlines() if each not in self.notes)
        assert line.startswith(("countermark: ", f"{LAB}: "))
        return line


def call(*arguments: str | Path) -> Said:
    """Run a command in this process. Our own warnings become notes; others are errors."""
    return _call(app, "countermark", arguments)


def call_lab(*arguments: str | Path) -> Said:
    """Run a command of the laboratory in this process."""
    return _call(lab_app, LAB, arguments)


def _call(program: typer.Typer, name: str, arguments: Sequence[str | Path]) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=UserWarning, module="countermark")
        code = run_program(program, name, [str(each) for each in arguments])
    return Said(code, out.getvalue(), err.getvalue())


def environment(changed: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with one thread, and with the source tree and the tests to import from."""
    paths = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return {**os.environ, **fixed, **(changed or {})}


def python(code: str, *arguments: str | Path, folder: Path, paths: Sequence[Path] = ()) -> Said:
    """Run Python code in a process of its own, without a terminal."""
    found = "import sys\n" + "".join(f"sys.path.append({str(each)!r})\n" for each in paths)
    return process([sys.executable, "-c", found + code, *map(str, arguments)], folder)


def process(words: list[str], folder: Path) -> Said:
    """Run a command in a process of its own, without a terminal."""
    done = subprocess.run(
        words,
        check=False,
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        start_new_session=True,
    )
    return Said(done.returncode, done.stdout, done.stderr)


def embed(**changed: str | list[str] | None) -> list[str]:
    """The arguments of an `embed` that takes a second, with some changed, added or (None) left out.

    A list repeats its option; an empty string stands for a flag.
    """
    usual: dict[str, str | list[str] | None] = {
        "scheme": "uchida",
        "model": "mlp",
        "data": "digits",
        "layer": "2.weight",
        "bits": "256",
        "owner": "ACME Inc.",
        "epochs": "1",
        "out": "new.safetensors",
        "key": "new.key",
    }
    arguments = ["embed"]
    for name, value in (usual | changed).items():
        option = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                arguments += [option, each] if each else [option]
    return arguments


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the digest of its content where it is a file."""
    return {
        str(path.relative_to(folder)): digest(path) if path.is_file() else "a folder"
        for path in sorted(folder.rglob("*"))
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(
    arguments: list[str], says: str, folder: Path, *, caller: Callable[..., Said] = call
) -> Said:
    """A call that must end with exit 2 and a line that says this, and change nothing here."""
    before = listing(folder)
    said = caller(*arguments)
    assert (said.code, said.out) == (2, ""), said
    assert says in said.why, said.err
    assert listing(folder) == before
    return said
