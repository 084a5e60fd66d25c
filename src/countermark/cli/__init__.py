"""The command line: read options, call the library, print the answer, exit with its code.

Modules that need torch are imported inside the commands that need them, so `--help` works without
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from countermark.cli import (  # noqa: F401 - they add commands to `app`
    dispute,
    report,
    sign_model,
    verify,
)
from countermark.cli.attack import attack_app
from countermark.cli.claim import claim_app
from countermark.cli.embed import app
from countermark.cli.identify import identify
from countermark.cli.key import key_app
from countermark.cli.ledger import ledger_app
from countermark.cli.mark_images import mark
from countermark.cli.program import discard_unwritten_output, run_program
from countermark.cli.recipient import recipient_app
from countermark.cli.serve import serve
from countermark.cli.stamp import advise, check, stamp
from countermark.errors import ConfigError

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


@app.command(
    "bench", hidden=True,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)  # fmt: skip
def name_laboratory(context: typer.Context) -> None:
    """Say where the experiments went."""
    raise ConfigError(
        "experiments, tables and figures are no part of the installed package: run them in a clone "
        f"with python -m countermark_lab {' '.join(context.args) or '--help'}"
    )


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
    return run_program(app, "countermark", arguments)
