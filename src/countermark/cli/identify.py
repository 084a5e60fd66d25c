"""The command `identify`, for holders of many keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countermark.cli.options import (
    ALPHA,
    AsJson,
    WeightSuspect,
    read_shared_passphrase,
    require_probability,
    show_result,
)
from countermark.errors import make_printable

if TYPE_CHECKING:
    from countermark.verification.identify import Identification


def identify(
    suspect: WeightSuspect,
    keys: Annotated[
        Path, typer.Option(metavar="DIR", help="A folder of key folders, all of which are tried.")
    ],
    alpha: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="Threshold for the chance that any key is found falsely.",
            callback=require_probability,
        ),
    ] = ALPHA,
    assume_dated: Annotated[
        bool,
        typer.Option(
            "--assume-dated", help="You state that the keys are older than the suspect; recorded."
        ),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Find those of many keys whose marks are in a suspect.

    Each chance is corrected for the number of keys tried.
    Keys that read bits from weights by a linear rule are tried. Other keys are counted, with the
    reason. Encrypted keys need one passphrase for all, in COUNTERMARK_PASSPHRASE_FILE.

    Exits 0 when a mark is present, 1 when no mark was found, 3 when there is no verdict or some
    keys could not be tried, 2 when something stopped the answer.

    \b
    Example:
        countermark identify stamped.safetensors --keys .
        countermark identify other.safetensors --keys stamp.key  # exit 1
    """
    from countermark.results.verdict import VerificationOptions
    from countermark.verification.identify import identify as identified
    from countermark.verification.identify import list_key_folders

    # One shared passphrase and no prompt: a folder may hold thousands of keys.
    done = identified(
        suspect,
        list_key_folders(keys),
        VerificationOptions(alpha, assume_dated),
        passphrase=read_shared_passphrase(),
    )
    show_result(done.to_json(), as_json, "\n".join(map(make_printable, _format_answer(done))))
    return done.exit_code


def _format_answer(done: Identification) -> list[str]:
    """Return the answer as lines of text."""
    from countermark.results.test_result import describe_corrections

    lines = [f"{done.suspect}: {done.tried} keys tried, {len(done.found)} found"]
    for folder, verdict in done.found.items():
        head = f"{folder}: {verdict.outcome.upper().replace('_', ' ')}: {verdict.reason}"
        said = f"{verdict.matched} of {verdict.bits} bits, log10 p {verdict.log10_p:.2f}"
        lines += [f"{head} (owner {verdict.owner}, {said})"]
        if verdict.result is not None:
            lines += [f"  p is {describe_corrections(verdict.result.corrections)}"]
    if not done.found and done.best is not None:
        lines.append(f"the best of them has log10 p {done.best:.2f}, corrected for all")
    # Keys that were not tried are always listed: "not found" says nothing about them.
    lines += [f"not tried: {count}, {why}" for why, count in done.problems.items()]
    return lines
