"""The command about two owners and one suspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from countermark.cli.claim import Authorities
from countermark.cli.options import ALPHA, Alpha, AsJson, passphrase_of, show_result
from countermark.cli.owner import app
from countermark.cli.suspect import Asking, ClaimsCounted, suspect_of
from countermark.errors import ConfigError


@app.command()
def resolve(
    suspect: Annotated[Path, typer.Argument(metavar="SUSPECT", help="The model in dispute.")],
    key: Annotated[
        list[Path], typer.Option(metavar="DIR", help="The first party's key, then the second's.")
    ],
    claim: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Their claims, in the same order.")
    ],
    model: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Their own models, as they claimed them, likewise."),
    ],
    authority: Authorities = None,
    ledger: ClaimsCounted = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A public model that both parties began with."),
    ] = None,
    alpha: Alpha = ALPHA,
    as_json: AsJson = False,
) -> int:
    """Decide between two owners who claim one suspect, or say that it cannot be decided.

    Reads both keys from the suspect and from both parties' own models: a stolen copy that was
    marked anew has two marks, the owner's model has one. Where a key could have been made
    afterwards, a ledger with stamps of the authorities that you pin says whose claim is older.
    Nothing is decided against a party whose older claimed model the suspect is a copy of by its
    neurons, although its mark is gone; --base takes off what both have from a public model.

    Exits 0 for the first party, 1 for the second or neither, 3 when it cannot be told.

    \b
    Example:
        countermark embed --scheme uchida --model mlp --data digits --layer 2.weight --bits 40 \\
            --start m.safetensors --owner "Beta Ltd." --epochs 3 --out copy.safetensors \\
            --key beta.key
        countermark claim new --key beta.key --model copy.safetensors --owner "Beta Ltd." \\
            --out beta.json
        countermark claim sign beta.json --private-key acme.pem
        countermark resolve copy.safetensors \\
            --key acme.key --claim claim.json --model m.safetensors \\
            --key beta.key --claim beta.json --model copy.safetensors
    """
    from countermark.claims.signed import Claim
    from countermark.claims.timestamp import Authority
    from countermark.disputes import Examiner, Shown, audited, settle
    from countermark.key import Key

    if not len(key) == len(claim) == len(model) == 2:
        raise ConfigError("two parties dispute: give --key, --claim and --model twice each")
    believed = [Authority.load(each) for each in authority or []]
    counted = None if ledger is None else audited(ledger)
    shown = [
        Shown(Key.load(folder, passphrase_of(folder)), Claim.load(file), own)
        for folder, file, own in zip(key, claim, model, strict=True)
    ]
    asking = Asking()
    found = settle(
        suspect, shown, lambda file, of: suspect_of(str(file), of, asking),
        Examiner(alpha, believed, counted, base),
    )  # fmt: skip
    show_result(found.to_json(), as_json, found.explain())
    return found.exit_code
