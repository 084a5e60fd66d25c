"""What stops a judging command on its way ends with exit 2: never with a code that is an answer."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import TIMEOUT, Said, call, environment, process

from countermark.errors import SuspectError

ANSWERS = {0, 1, 3}


class PanicException(BaseException):
    """As Rust code under Python raises it: no Exception."""


FAULTS: list[tuple[BaseException, str]] = [
    (RuntimeError("first line\nsecond line"), "internal error, RuntimeError: first line"),
    (RuntimeError(), "internal error, RuntimeError (COUNTERMARK_DEBUG=1"),
    (MemoryError(), "internal error, MemoryError"),
    (RecursionError("too deep"), "internal error, RecursionError"),
    (PanicException("called `Option::unwrap()`"), "internal error, PanicException"),
    (SystemExit(0), "internal error, SystemExit: 0"),
    (SystemExit(1), "internal error, SystemExit: 1"),
    (SystemExit(3), "internal error, SystemExit: 3"),
    (KeyboardInterrupt(), "interrupted"),
    (EOFError(), "internal error, EOFError"),
    (BrokenPipeError(), "standard output is closed"),
    (PermissionError(13, "Permission denied", "m.safetensors"), "m.safetensors: Permission denied"),
    (OSError(28, "No space left on device"), "countermark: No space left on device"),
    (SuspectError("a name\nof two \x1b[31mlines"), "two"),
]


def verify_failing_with(fault: BaseException, made: Path, patch: pytest.MonkeyPatch) -> Said:
    def failing(*_: object, **__: object) -> None:
        raise fault

    patch.setattr("countermark.verification.verify.examine", failing)
    return call("verify", made / "marked.safetensors", "--key", made / "acme.key")


@pytest.mark.parametrize(("fault", "says"), FAULTS, ids=[repr(fault) for fault, _ in FAULTS])
def test_no_fault_is_an_answer(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, says: str
) -> None:
    said = verify_failing_with(fault, made, monkeypatch)
    assert (said.code, said.out) == (2, "")
    assert says in said.why
    assert "\x1b" not in said.why


def test_debugging_shows_where(made: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERMARK_DEBUG", "1")
    said = verify_failing_with(RuntimeError("no"), made, monkeypatch)
    assert said.code == 2
    assert "Traceback" in said.err
    assert "in failing" in said.err


def test_a_command_that_forgets_to_answer_has_not_said_yes(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blank:
        exit_code = None

        def to_json(self) -> dict[str, str]:
            return {}

        def explain(self) -> str:
            return "nothing"

    monkeypatch.setattr("countermark.verification.verify.examine", lambda *_, **__: Blank())
    assert call("verify", made / "marked.safetensors", "--key", made / "acme.key").code == 2


def in_shell(redirected: str, made: Path, suspect: str = "marked.safetensors") -> Said:
    """`verify --json` of a suspect by a shell that puts its streams somewhere else."""
    words = [sys.executable, "-m", "countermark", "verify", suspect, "--key", "acme.key", "--json"]
    return process(["/bin/sh", "-c", f"{shlex.join(words)} {redirected}"], made)


def test_a_process_ends_with_the_code_of_its_answer(made: Path) -> None:
    said = in_shell("", made)
    assert (said.code, said.err) == (0, "")
    assert said.json["outcome"] == "owned"
    assert in_shell("", made, "unmarked.safetensors").code == 1
    assert in_shell("", made, "absent.safetensors").code == 2


@pytest.mark.parametrize(
    ("redirected", "says"),
    [(">&-", "standard output is closed"), ("> /dev/full", "No space left on device")],
)
def test_an_answer_that_cannot_be_written_is_none(made: Path, redirected: str, says: str) -> None:
    said = in_shell(redirected, made)
    assert said.code == 2
    assert says in said.why


def test_a_reader_that_went_away_is_no_answer(made: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = ["verify", "marked.safetensors", "--key", "acme.key"]
    done = subprocess.run(
        [sys.executable, "-m", "countermark", *words],
        check=False,
        cwd=made,
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
    )
    os.close(writing)
    assert done.returncode == 2
    assert "standard output is closed" in Said(2, "", done.stderr).why


@pytest.mark.parametrize("redirected", ["2>&-", "2> /dev/full"])
def test_a_complaint_that_cannot_be_written_is_no_answer(made: Path, redirected: str) -> None:
    assert in_shell(redirected, made, "absent.safetensors").code == 2
    said = in_shell(redirected, made)  # nothing to complain about: the answer stands
    assert said.code == 0
    assert json.loads(said.out)["outcome"] == "owned"
