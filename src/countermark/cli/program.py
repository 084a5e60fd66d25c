"""Run a tree of commands: parse the words, call the command, turn every outcome into an exit code.

A judging command exits 0 for yes, 1 for no and 3 if it cannot tell. Exit code 2 means that
something stopped the answer, an uncaught exception included.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeAlias

import typer
from typer.completion import shell_complete
from typer.core import TyperGroup

from countermark.errors import CountermarkError, make_printable, suggest_nearest

# The exit code when there is no answer; 0, 1 and 3 are answers.
STOPPED = 2

# A function whose parameters are the options, or a group of commands.
Command: TypeAlias = Callable[..., int] | typer.Typer


class PlainGroup(TyperGroup):
    """A group of commands that lists them under headings, and suggests the nearest of them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the first paragraph of each command's help, under the heading of its panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        names = self._list_visible_commands(ctx)
        # All names are padded alike, so that the texts of all panels begin in one column.
        width = max(map(len, names), default=0)
        for name in names:
            command = self.commands[name]
            heading = getattr(command, "rich_help_panel", None) or "Commands"
            text = " ".join((command.help or "").partition("\n\n")[0].split())
            panels.setdefault(heading, []).append((name.ljust(width), text))
        for heading, rows in panels.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the first word names."""
        # A word that begins with a dash is an option, which click itself knows or refuses.
        if args[0] not in self.commands and not args[0].startswith("-"):
            near = suggest_nearest(args[0], self._list_visible_commands(ctx))
            ctx.fail(f"there is no command {args[0]!r}: {near}")
        return super().resolve_command(ctx, args)

    def _list_visible_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands that are not hidden, in the order of the table."""
        return [name for name in self.list_commands(ctx) if not self.commands[name].hidden]


def make_group(
    about: str, commands: Mapping[str, Command] | None = None, *, completion: bool = False
) -> typer.Typer:
    """Make a group of commands, or a whole program.

    Args:
        about: what `--help` says of the group.
        commands: the commands by name.
        completion: whether the program can complete its words in a shell.
    """
    # Rich markup is off so that brackets in help texts print as they are, and exceptions are left
    # to `run_program`, which prints one line and chooses the exit code.
    group = typer.Typer(
        cls=PlainGroup,
        help=about,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=completion,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    add_commands(group, commands or {})
    return group


def add_commands(
    group: typer.Typer, commands: Mapping[str, Command], heading: str | None = None
) -> None:
    """Add commands to a group.

    Args:
        group: the group or program.
        commands: the commands by name.
        heading: the heading that `--help` lists them under.
    """
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            group.add_typer(command, name=name, rich_help_panel=heading)
        else:
            group.command(name, rich_help_panel=heading)(command)


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
    # What else it does is to answer a shell that asks, in this variable, how a line may go on.
    tree, variable = _build_command_tree(app), f"_{program}_COMPLETE".upper()
    if asked := os.environ.get(variable):
        return STOPPED if shell_complete(tree, {}, program, variable, asked) else 0
    try:
        try:
            context = tree.make_context(program, list(arguments))
        # The options about completion end the process themselves. No command has run by then: in
        # one, 0 and 1 would be mistaken for answers.
        except SystemExit as done:
            return STOPPED if done.code else 0
        with context:
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
