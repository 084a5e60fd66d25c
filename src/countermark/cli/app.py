"""All commands of the program, under the headings that `--help` shows them under.

Modules that need torch are imported inside the commands that need them, so `--help` works without
torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from countermark._version import VERSION
from countermark.cli.advise import advise
from countermark.cli.attack import list_attacks, run_attack
from countermark.cli.check import check
from countermark.cli.claim import (
    check_claim,
    make_key_pair,
    sign_document,
    sign_model_file,
    timestamp_document,
    write_claim,
)
from countermark.cli.demo import demo
from countermark.cli.dispute import dispute
from countermark.cli.embed import embed
from countermark.cli.identify import identify
from countermark.cli.key import check_disclosure, open_key_triggers, show_key
from countermark.cli.ledger import (
    add_claims,
    check_growth,
    create_ledger,
    export_tree_head,
    find_claims,
    verify_ledger,
)
from countermark.cli.mark_images import mark_images
from countermark.cli.program import Command, add_commands, make_group
from countermark.cli.recipient import make_recipient_key, stamp_recipient_copy, trace_recipients
from countermark.cli.report import report
from countermark.cli.schemes import schemes
from countermark.cli.serve import serve
from countermark.cli.stamp import stamp
from countermark.cli.verify import verify
from countermark.errors import ConfigError

COMMANDS: dict[str, dict[str, Command]] = {
    "Mark": {
        "embed": embed,
        "stamp": stamp,
        "advise": advise,
        "mark-images": mark_images,
        "recipient": make_group(
            "Mark a copy for each recipient, and trace a copy.",
            {
                "new": make_recipient_key,
                "stamp": stamp_recipient_copy,
                "trace": trace_recipients,
            },
        ),
    },
    "Verify": {
        "verify": verify,
        "identify": identify,
        "check": check,
        "key": make_group(
            "Show a key, and open triggers to others.",
            {"show": show_key, "open": open_key_triggers, "check-opening": check_disclosure},
        ),
    },
    "Evidence": {
        "dispute": dispute,
        "report": report,
        "serve": serve,
        "claim": make_group(
            "Claim a marked model, with a date.",
            {
                "keygen": make_key_pair,
                "new": write_claim,
                "sign": sign_document,
                "timestamp": timestamp_document,
                "check": check_claim,
                "sign-model": sign_model_file,
            },
        ),
        "ledger": make_group(
            "Keep claims in a ledger that only grows.",
            {
                "init": create_ledger,
                "add": add_claims,
                "find": find_claims,
                "verify": verify_ledger,
                "export": export_tree_head,
                "grown": check_growth,
            },
        ),
    },
    "Study": {
        "demo": demo,
        "schemes": schemes,
        "attack": make_group(
            "Do to a model what a thief would.", {"list": list_attacks, "run": run_attack}
        ),
    },
}
"""The heading, the name and the function of every command."""


def _print_version(value: bool) -> None:
    """Print the version and exit, if `--version` was given."""
    if value:
        typer.echo(f"countermark {VERSION}")
        raise typer.Exit


def _accept_global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def _name_laboratory(context: typer.Context) -> None:
    """Refuse the old command `bench`: experiments are run by `python -m countermark_lab` now."""
    raise ConfigError(
        "experiments, tables and figures are no part of the installed package: run them in a clone "
        f"with python -m countermark_lab {' '.join(context.args) or '--help'}"
    )


app = make_group(
    "Prove that a neural network is yours.\n\nEvery command takes -h, with an example.",
    completion=True,
)
app.callback()(_accept_global_options)
for _heading, _commands in COMMANDS.items():
    add_commands(app, _commands, _heading)
# The one command that is not in the help: it is only there for those who remember it.
app.command(
    "bench",
    hidden=True,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(_name_laboratory)
