"""The command line: read options, call the library, print the answer, exit with its code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from countermark.cli.app import app as _app
from countermark.cli.program import discard_unwritten_output, run_program


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: the words after the program's name; by default the process's own.
    """
    code = run(arguments)
    discard_unwritten_output()
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: the words after the program's name; by default the process's own.
    """
    return run_program(_app, "countermark", arguments)
