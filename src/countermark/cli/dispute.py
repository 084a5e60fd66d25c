"""The command about two owners and one suspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countermark.cli.claim import Authorities
from countermark.cli.options import AsJson, passphrase_of, show_result
from countermark.cli.owner import app
from countermark.cli.suspect import Asking, suspect_of
from countermark.errors import ConfigError

if TYPE_CHECKING:
    from countermark.claims.audit import Audit
    from countermark.claims.dispute import Party, Place, Side
    from countermark.verdict import Terms, Verdict

_READINGS = 6  # two keys in three models


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
    ledger: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where claims are counted: p is multiplied by them."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(metavar="P", help="Threshold for the chance of a false accusation.")
    ] = 1e-6,
    as_json: AsJson = False,
) -> int:
    """Decide between two owners who claim one suspect, or say that it cannot be decided.

    Reads both keys from the suspect and from both parties' own models: a stolen copy that was
    marked anew has two marks, the owner's model has one. Where a key could have been made
    afterwards, a ledger with stamps of the authorities that you pin says whose claim is older.

    Exits 0 for the first party, 1 for the second or neither, 3 when it cannot be told.

    \b
    Example:
        countermark embed --scheme uchida --model mlp --data digits --layer 2.weight --bits 128 \\
            --start m.safetensors --owner "Beta Ltd." --epochs 3 --out copy.safetensors \\
            --key beta.key
        countermark claim new --key beta.key --model copy.safetensors --owner "Beta Ltd." \\
            --out beta.json
        countermark claim sign beta.json --private-key acme.pem
        countermark resolve copy.safetensors \\
            --key acme.key --claim claim.json --model m.safetensors \\
            --key beta.key --claim beta.json --model copy.safetensors
    """
    from countermark.claims.dispute import resolve as decide
    from countermark.claims.timestamp import Authority
    from countermark.verdict import Terms

    if not len(key) == len(claim) == len(model) == 2:
        raise ConfigError("two parties dispute: give --key, --claim and --model twice each")
    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha is {alpha}: expected a probability between 0 and 1")
    believed = [Authority.load(each) for each in authority or []]
    audited = None if ledger is None else _audited(ledger)
    terms = Terms(alpha / (_READINGS * (audited.count() if audited else 1)), assume_dated=True)
    parties, readings = _read(suspect, (key, claim, model), terms)
    found = decide(parties, readings, believed, audited)
    show_result(found.to_json(), as_json, found.explain())
    return found.exit_code


def _audited(url: str) -> Audit:
    from countermark.claims.audit import audit
    from countermark.claims.ledger import Ledger

    with Ledger(url) as opened:
        return audit(opened)


def _read(
    suspect: Path, shown: tuple[list[Path], list[Path], list[Path]], terms: Terms
) -> tuple[tuple[Party, Party], dict[tuple[Side, Place], Verdict]]:
    """The parties by their keys, claims and models, and both keys read from all three models."""
    from countermark.claims.dispute import PLACES, SIDES, Party
    from countermark.claims.signed import Claim
    from countermark.examine import examine
    from countermark.key import Key
    from countermark.weights import model_digest, open_weights

    keys, claims, models = shown
    loaded = [Key.load(each, passphrase_of(each)) for each in keys]
    parties = []
    for key, claim, model in zip(loaded, claims, models, strict=True):
        with open_weights(model) as weights:
            parties.append(Party(Claim.load(claim), key.commitment, model_digest(weights)))
    readings: dict[tuple[Side, Place], Verdict] = {}
    for side, key in zip(SIDES, loaded, strict=True):
        for place, file in zip(PLACES, (suspect, *models), strict=True):
            asking = Asking({}, None, {}, None, replay=False)
            with suspect_of(str(file), key, asking) as found:
                readings[side, place] = examine(found, key, terms)
    return (parties[0], parties[1]), readings
