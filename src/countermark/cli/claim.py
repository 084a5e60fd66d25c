"""The `claim` commands: write a claim, sign it, timestamp it, check it under a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countermark._internal.output_paths import require_free_path
from countermark.cli.claim_parts import (
    compute_file_digest,
    describe_claim,
    make_file_signature_checks,
    make_subject_checks,
    make_trust_checks,
    require_mark_in_model,
)
from countermark.cli.options import (
    AsJson,
    Authorities,
    NewFile,
    Signers,
    read_key_passphrase,
    read_new_passphrase,
    read_pem_passphrase,
    show_result,
)
from countermark.errors import ConfigError, make_printable

if TYPE_CHECKING:
    pass


def make_key_pair(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Writes NAME.pem and NAME.pub.")],
    encrypt: Annotated[
        bool,
        typer.Option(
            "--encrypt",
            help="Encrypt NAME.pem: passphrase by prompt or COUNTERMARK_PASSPHRASE_FILE.",
        ),
    ] = False,
    for_files: Annotated[
        bool, typer.Option("--for-files", help="A key on P-256, for `claim sign-model`.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Make an Ed25519 key pair that signs claims or tree heads, in the format of OpenSSL.

    Keep NAME.pem secret. Others pin NAME.pub: publish it where your name is known.

    \b
    Examples:
        countermark claim keygen acme
        countermark claim keygen release --for-files
    """
    from countermark.claims.signing import write_key_pair

    passphrase = read_new_passphrase() if encrypt else None
    identity = write_key_pair(Path(name), passphrase, for_files=for_files)
    show_result({"public_key": identity}, as_json, f"{name}.pem and {name}.pub: {identity}")
    return 0


def write_claim(
    key: Annotated[Path, typer.Option(metavar="DIR", help="The key of the mark.")],
    model_file: Annotated[
        Path, typer.Option(metavar="FILE", help="The marked model, as released.")
    ],
    owner: Annotated[str, typer.Option(metavar="TEXT", help="As in the key.")],
    out: NewFile,
    as_json: AsJson = False,
) -> int:
    """Write a claim: this owner, by this key's commitment, has this model.

    The claim holds the commitment and the digest of the model. It reveals nothing of the key or the
    weights. Make it after the mark is in the model and before anybody else has a copy; then run
    `claim sign`.

    \b
    Example:
        countermark claim new --key acme.key --model-file m.safetensors --owner "ACME Inc." \\
            --out claim.json
    """
    from countermark.claims.signed import Claim
    from countermark.claims.statement import Commitment
    from countermark.keys.key import Key

    loaded = Key.load(key, read_key_passphrase(key))
    if owner != loaded.owner:
        raise ConfigError(
            f"--owner is {make_printable(owner, 80)!r}, the key's owner is "
            f"{make_printable(loaded.owner, 80)!r}: expected the same"
        )
    # The secret of a test key follows from a number, so anybody can derive the key again.
    if loaded.test_key:
        raise ConfigError("this is a test key: anybody can make it again, so it claims nothing")
    digest = compute_file_digest(model_file)
    require_mark_in_model(model_file, loaded)
    commitment = Commitment(kind="C1" if loaded.c1 else "C0", sha256=loaded.commitment)
    claim = Claim.make_unsigned(commitment, owner, digest.root, digest.tensors)
    claim.save(out)
    text = f"{out}: {owner}, commitment {claim.commitment}, model {digest.root}"
    show_result(describe_claim(claim), as_json, make_printable(text))
    return 0


def sign_document(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A claim, or a tree head.")],
    private_key: Annotated[
        Path,
        typer.Option(metavar="PEM", help="Ed25519, from `claim keygen` or OpenSSL."),
    ],
    as_json: AsJson = False,
) -> int:
    """Sign a claim or a tree head, in place. Several may sign; all before the first timestamp.

    \b
    Example:
        countermark claim sign claim.json --private-key acme.pem
    """
    from countermark.claims.signed import load_signed_document
    from countermark.claims.signing import load_private_key

    private = load_private_key(private_key, read_pem_passphrase(private_key))
    document = load_signed_document(file).with_signature(private)
    # A claim collects its signatures in its own file, so the existing file is replaced.
    document.save(file, replace=True)
    about = {"digest": document.digest, "signers": list(document.signers)}
    text = f"{file}: signed by {document.signers[-1]}, digest {document.digest}"
    show_result(about, as_json, text)
    return 0


def timestamp_document(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A signed claim, or tree head.")],
    request: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a request (.tsq) for an authority.")
    ] = None,
    response: Annotated[
        Path | None, typer.Option(metavar="IN", help="Put an authority's response (.tsr) in.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask an authority (RFC 3161 by HTTP).")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Get an RFC 3161 timestamp for a claim or a tree head: by URL, or by files.

    With files, --request writes a request, and --response reads the authority's response. Any
    authority will do: the examiner chooses later which authorities to trust. Two are better than
    one.

    \b
    Example:
        countermark claim timestamp claim.json --request claim.tsq
    """
    from countermark._internal.files import read_regular, write_bytes
    from countermark.claims.signed import load_signed_document
    from countermark.claims.statement import format_time
    from countermark.claims.timestamp import (
        LARGEST_RESPONSE,
        make_request,
        read_response,
        request_timestamp,
    )

    if sum(each is not None for each in (request, response, url)) != 1:
        raise ConfigError("one of --request, --response and --url is needed, and no two")
    document = load_signed_document(file)
    # An authority dates any digest that it gets, so check the signatures before asking.
    document.check_signatures()
    asked = make_request(document)
    if request is not None:
        require_free_path(request)
        write_bytes(request, asked)
        show_result({"request": str(request)}, as_json, f"{request}: a request for {file}")
        return 0
    if url is not None:
        given = request_timestamp(url, asked)
    else:
        try:
            given = read_regular(Path(str(response)), LARGEST_RESPONSE)
        except ValueError as error:
            raise ConfigError(f"{response}: {error}; expected an RFC 3161 response") from None
    # `read` checks that the response is about this document before the document keeps it.
    stamp = read_response(given, document)
    document.with_timestamp(given).save(file, replace=True)
    about = {"time": format_time(stamp.time), "signer": list(map(str, stamp.signer))}
    text = f"{file}: stamped {about['time']} by {stamp.signer[0]}; nobody has to believe that"
    show_result(about, as_json, make_printable(text))
    return 0


def check_claim(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The claim.")],
    signer: Signers = None,
    authority: Authorities = None,
    before: Annotated[
        str | None, typer.Option(metavar="DATE", help="It must be older than this.")
    ] = None,
    model_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="It must be about this model.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="DIR", help="It must be about this key.")
    ] = None,
    model_signature: Annotated[
        Path | None,
        typer.Option(metavar="SIG", help="It must be a signature of that model's file."),
    ] = None,
    model_signer: Annotated[
        Path | None, typer.Option(metavar="PEM", help="A public key that you know: by whom.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check a claim against the signers and authorities that you trust; by default nobody.

    Exits 0 when every check holds, 1 when a check fails, 3 when a check stayed open because you
    named no signer or no authority, 2 when something stopped the answer.

    \b
    Example:
        countermark claim check claim.json --signer acme.pub --key acme.key  # exit 3
    """
    from countermark.claims.decision import PolicyCase
    from countermark.claims.policy import AllOf, IntegrityCheck
    from countermark.claims.signed import Claim

    claim = Claim.load(file)
    of = [
        *make_subject_checks(model_file, key),
        *make_file_signature_checks(model_file, model_signature, model_signer),
    ]
    believed = make_trust_checks(signer or [], authority or [], before)
    decision = AllOf([IntegrityCheck(), *of, *believed]).judge(PolicyCase(claim))
    about = describe_claim(claim)
    lines = [f"claim {claim.digest}", f"  owner       {claim.owner}"]
    lines += [f"  commitment  {claim.commitment}", f"  model       {claim.model_root}"]
    lines += [f"  stamped     {each['time']} by {each['signer']}" for each in about["stamps"]]
    text = "\n".join([*map(make_printable, lines), decision.explain()])
    show_result(about | decision.to_json(), as_json, text)
    return decision.exit_code


def sign_model_file(
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
    from countermark.claims.openssf import sign_model

    # Only the command line may prompt for a passphrase, so the library gets it as an argument.
    sign_model(file, private_key, out, passphrase=read_pem_passphrase(private_key))
    show_result({"signature": str(out)}, as_json, f"{out}: {file} is signed")
    return 0
