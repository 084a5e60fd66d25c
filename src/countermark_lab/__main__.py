"""Run the laboratory's command line by `python -m countermark_lab`, in a clone."""

import sys
from collections.abc import Sequence

from countermark.cli.program import discard_unwritten_output, run_program
from countermark_lab.commands import app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command of the laboratory and exit with its code.

    Args:
        arguments: the words after the program's name; by default the process's own.
    """
    code = run_program(app, "python -m countermark_lab", arguments)
    discard_unwritten_output()
    sys.exit(code)


if __name__ == "__main__":
    main()
