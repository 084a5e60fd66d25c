"""The command `dispute`: two owners claim one suspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from countermark.cli.options import (
    ALPHA,
    Alpha,
    AsJson,
    Authorities,
    read_key_passphrase,
    show_result,
)
from countermark.cli.suspect_options import ClaimsCounted, SuspectOptions, open_suspect
from countermark.errors import ConfigError


def dispute(
    suspect: Annotated[Path, typer.Argument(metavar="SUSPECT", help="The model in dispute.")],
    key: Annotated[
        list[Path], typer.Option(metavar="DIR", help="The first party's key, then the second's.")
    ],
    claim: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Their claims, in the same order.")
    ],
    model_file: Annotated[
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
    """Decide between two owners who claim one suspect.

    Some disputes cannot be decided, and the answer says so.
    Reads both keys from the suspect and from both parties' own models: a stolen copy that was
    marked anew has two marks, the owner's model has one. Where a key could have been made
    afterwards, a ledger with timestamps of the authorities that you pin shows whose claim is older.
    A party does not lose if the suspect's neurons are a copy of that party's older claimed model,
    even though its mark is gone. --base excludes the neurons that both parties have from a public
    model.

    Exits 0 for the first party, 1 for the second or neither, 3 when the dispute cannot be decided.

    \b
    Example:
        countermark embed --scheme uchida --model mlp --data digits --layer 2.weight --bits 40 \\
            --start m.safetensors --owner "Beta Ltd." --epochs 3 --out copy.safetensors \\
            --key beta.key
        countermark claim new --key beta.key --model-file copy.safetensors \\
            --owner "Beta Ltd." --out beta.json
        countermark claim sign beta.json --private-key acme.pem
        countermark dispute copy.safetensors \\
            --key acme.key --claim claim.json --model-file m.safetensors \\
            --key beta.key --claim beta.json --model-file copy.safetensors
    """
    from countermark.claims.signed import Claim
    from countermark.claims.timestamp import Authority
    from countermark.keys.key import Key
    from countermark.verification.dispute import (
        ExaminerSettings,
        PartyExhibits,
        audit_ledger_at,
        settle_dispute,
    )

    # Repeated options arrive as separate lists; only their order says what belongs together.
    if not len(key) == len(claim) == len(model_file) == 2:
        raise ConfigError("two parties dispute: give --key, --claim and --model-file twice each")
    # Without --authority no timestamp counts, so age decides nothing.
    believed = [Authority.load(each) for each in authority or []]
    counted = None if ledger is None else audit_ledger_at(ledger)
    shown = [
        PartyExhibits(Key.load(folder, read_key_passphrase(folder)), Claim.load(file), own)
        for folder, file, own in zip(key, claim, model_file, strict=True)
    ]
    # All three models are weight files on disk, so no option of a service applies.
    asking = SuspectOptions()
    found = settle_dispute(
        suspect, shown, lambda file, of: open_suspect(str(file), of, asking),
        ExaminerSettings(alpha, believed, counted, base),
    )  # fmt: skip
    show_result(found.to_json(), as_json, found.explain())
    return found.exit_code
