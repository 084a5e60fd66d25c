"""The command `claim sign-model`: sign the file of a released model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from countermark.cli.claim import claim_app
from countermark.cli.options import AsJson, read_pem_passphrase, show_result


@claim_app.command()
def sign_model(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The model, as released.")],
    private_key: Annotated[
        Path,
        typer.Option(metavar="PEM", help="From `claim keygen --for-files`, or on P-384, P-521."),
    ],
    out: Annotated[Path, typer.Option(metavar="SIG", help="To write; must not exist.")],
    as_json: AsJson = False,
) -> int:
    """Sign the model's file itself, by OpenSSF model signing. Publish SIG beside the file.

    A claim is about the tensors; this signature is about the bytes of the file. `claim check` reads
    the signature, and so does every program that knows OpenSSF model signing.

    \b
    Example:
        countermark claim sign-model m.safetensors --private-key release.pem --out m.sig
    """
    from countermark.claims.openssf import sign_model as sign

    # Only the command line may prompt for a passphrase, so the library gets it as an argument.
    sign(file, private_key, out, passphrase=read_pem_passphrase(private_key))
    show_result({"signature": str(out)}, as_json, f"{out}: {file} is signed")
    return 0
