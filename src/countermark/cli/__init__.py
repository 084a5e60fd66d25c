"""The command line: reads options, calls the library, prints, and exits by the answer.

Judging commands exit 0 yes, 1 no, 3 cannot tell; 2 is anything that stopped the answer, an uncaught
exception included. What needs torch is imported inside the command that needs it.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import typer

from countermark.cli import (  # noqa: F401 - they add commands to `app`
    dispute,
    released,
    report,
    verify,
)
from countermark.cli.claim import claim_app
from countermark.cli.finished import advise, check, stamp
from countermark.cli.identify import identify
from countermark.cli.key import key_app
from countermark.cli.laboratory import bench_app
from countermark.cli.ledger import ledger_app
from countermark.cli.outputs import mark
from countermark.cli.owner import app
from countermark.cli.recipient import recipient_app
from countermark.cli.serve import serve
from countermark.cli.thief import attack_app
from countermark.errors import CountermarkError, printable

app.command()(mark)
app.command()(advise)
app.command()(stamp)
app.command()(check)
app.command()(identify)
app.command()(serve)
app.add_typer(key_app, name="key")
app.add_typer(recipient_app, name="recipient")
app.add_typer(claim_app, name="claim")
app.add_typer(ledger_app, name="ledger")
app.add_typer(attack_app, name="attack")
app.add_typer(bench_app, name="bench")

STOPPED = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: instead of those of the process, for tests.
    """
    code = run(arguments)
    _drop_unwritten()
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code instead of exiting."""
    _warnings_as_notes()
    try:
        if sys.stdout is None:
            raise BrokenPipeError  # now, before the first file that is opened takes its place
        code = _invoke(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BaseException as error:  # the exit code must never be mistaken for an answer
        with suppress(OSError):  # standard error may be closed as well
            if os.environ.get("COUNTERMARK_DEBUG"):
                traceback.print_exc()
            typer.echo(_last_words(error), err=True)
        return STOPPED
    return code


def _invoke(arguments: Sequence[str]) -> int:
    """Run one command; typer's own `main` turns Ctrl-C and a closed pipe into codes of its own."""
    try:
        with _command().make_context("countermark", list(arguments)) as context:
            return int(context.command.invoke(context))
    except typer.Exit as done:
        return done.exit_code


@cache
def _command() -> Any:
    return typer.main.get_command(app)


def _last_words(error: BaseException) -> str:
    """One line on what stopped the answer; the whole help where a group misses its command."""
    if hasattr(error, "format_message"):  # a usage error, in typer's words
        said, context = str(error.format_message()), getattr(error, "ctx", None)
        if "\n" in said:
            return said
        why = f"{said} ({context.command_path} --help)" if context else said
    elif isinstance(error, CountermarkError):
        why = str(error)
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        why = "interrupted"
    elif isinstance(error, BrokenPipeError):
        why = "standard output is closed: the answer has nowhere to go"
    elif isinstance(error, OSError) and error.strerror:
        why = ": ".join(filter(None, [error.filename and str(error.filename), error.strerror]))
    else:
        what = ": ".join(filter(None, [type(error).__name__, str(error).partition("\n")[0]]))
        why = f"internal error, {what} (COUNTERMARK_DEBUG=1 shows where)"
    return f"countermark: {printable(why)}"


def _drop_unwritten() -> None:
    """Keep Python from flushing again, on its way out, what could not be written."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _warnings_as_notes() -> None:
    """Warnings of the library as one line each, without the place in its source."""

    def note(message: Warning | str, *_: object, **__: object) -> None:
        typer.echo(f"note: {printable(str(message))}", err=True)

    warnings.showwarning = note
