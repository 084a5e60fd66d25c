"""The command for holders of many keys: identify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countermark.cli.options import (
    ALPHA,
    AsJson,
    WeightSuspect,
    probability,
    shared_passphrase,
    show_result,
)
from countermark.errors import printable

if TYPE_CHECKING:
    from countermark.identify import Identified


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
            callback=probability,
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
    """Say which of many keys finds its mark in a suspect, corrected for all that were tried.

    Keys that read bits from weights by a linear rule are tried; others are counted, with the
    reason. Encrypted keys need one passphrase for all, in COUNTERMARK_PASSPHRASE_FILE.

    Exits 0 when a mark is present, 1 when none was found, 3 when nothing can be said or some keys
    could not be tried, 2 when something stopped the answer.

    \b
    Example:
        countermark identify stamped.safetensors --keys .
        countermark identify other.safetensors --keys stamp.key  # exit 1
    """
    from countermark.identify import identify as identified
    from countermark.identify import keys_in
    from countermark.verdict import Terms

    done = identified(
        suspect, keys_in(keys), Terms(alpha, assume_dated), passphrase=shared_passphrase()
    )
    show_result(done.to_json(), as_json, "\n".join(map(printable, _told(done))))
    return done.exit_code


def _told(done: Identified) -> list[str]:
    """Say the answer for people, as lines."""
    from countermark.test_result import in_words

    lines = [f"{done.suspect}: {done.tried} keys tried, {len(done.found)} found"]
    for folder, verdict in done.found.items():
        head = f"{folder}: {verdict.outcome.upper().replace('_', ' ')}: {verdict.reason}"
        said = f"{verdict.matched} of {verdict.bits} bits, log10 p {verdict.log10_p:.2f}"
        lines += [f"{head} (owner {verdict.owner}, {said})"]
        if verdict.result is not None:
            lines += [f"  p is {in_words(verdict.result.corrections)}"]
    if not done.found and done.best is not None:
        lines.append(f"the best of them has log10 p {done.best:.2f}, corrected for all")
    lines += [f"not tried: {count}, {why}" for why, count in done.problems.items()]
    return lines
