"""Run a tree of commands: parse the words, call the command, turn every outcome into an exit code.

A judging command exits 0 for yes, 1 for no and 3 if it cannot tell. Exit code 2 means that
something stopped the answer, an uncaught exception included.
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

from countermark.errors import CountermarkError, make_printable

# The exit code when there is no answer; 0, 1 and 3 are answers.
STOPPED = 2


def run_program(app: typer.Typer, program: str, arguments: Sequence[str] | None) -> int:
    """Run a program and return its exit code.

    Args:
        app: the commands of the program.
        program: its name, for messages.
        arguments: the words after the program's name; by default the process's own.
    """
    _print_warnings_as_notes()
    try:
        # Standard output was closed before Python started. Refuse now: the first file that is
        # opened would get its descriptor.
        if sys.stdout is None:
            raise BrokenPipeError
        code = _invoke_command(app, program, sys.argv[1:] if arguments is None else arguments)
        # Flush here, where a failed write can still change the exit code.
        sys.stdout.flush()
    # Catch every exception: Python's own exit code 1 would be mistaken for the answer "no".
    except BaseException as error:
        # Standard error may be closed as well.
        with suppress(OSError):
            if os.environ.get("COUNTERMARK_DEBUG"):
                traceback.print_exc()
            typer.echo(_describe_error(error, program), err=True)
        return STOPPED
    return code


def _invoke_command(app: typer.Typer, program: str, arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    # Typer's own `main` is avoided: it turns Ctrl-C and a closed pipe into exit codes of its own.
    try:
        with _build_command_tree(app).make_context(program, list(arguments)) as context:
            return int(context.command.invoke(context))
    except typer.Exit as done:
        return done.exit_code


@cache
def _build_command_tree(app: typer.Typer) -> Any:
    """Return the tree of all commands, built once per process."""
    return typer.main.get_command(app)


def _describe_error(error: BaseException, program: str) -> str:
    """Return one line that says why there is no answer.

    A command group that was called without a command gets its whole help text instead.
    """
    # A usage error. Typer brings its own copy of click, so know the error by its method.
    if hasattr(error, "format_message"):
        said, context = str(error.format_message()), getattr(error, "ctx", None)
        # Only the help text of a group has several lines.
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
    return f"{program}: {make_printable(why)}"


def discard_unwritten_output() -> None:
    """Point streams that cannot be written to at the null device.

    Python flushes both streams again on its way out. A failure there would print a traceback and
    replace the exit code.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_warnings_as_notes() -> None:
    """Print each warning of the library as one line, without its place in the source."""

    def print_note(message: Warning | str, *_: object, **__: object) -> None:
        typer.echo(f"note: {make_printable(str(message))}", err=True)

    warnings.showwarning = print_note
