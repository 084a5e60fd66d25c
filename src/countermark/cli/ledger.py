"""The `ledger` commands: make a ledger, add claims, find and prove claims, check everything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from countermark._internal.output_paths import require_free_path
from countermark.cli.claim_parts import compute_file_digest, describe_entry
from countermark.cli.options import (
    AsJson,
    Authorities,
    LedgerUrl,
    NewFile,
    read_pem_passphrase,
    show_result,
)
from countermark.errors import ConfigError, make_printable


def create_ledger(
    ledger: Annotated[
        str, typer.Argument(metavar="URL", help="A file, or postgresql://USER@HOST/NAME.")
    ],
    operator: Annotated[
        Path, typer.Option(metavar="PEM", help="The public key that will sign its tree heads.")
    ],
    as_json: AsJson = False,
) -> int:
    """Make a new ledger. Put a database password into ~/.pgpass, never into the URL.

    \b
    Example:
        countermark ledger init claims.db --operator acme.pub
    """
    from countermark.claims.ledger import Ledger
    from countermark.claims.signing import compute_key_id, load_public_key

    with Ledger.create(ledger, compute_key_id(load_public_key(operator))) as made:
        about = {"ledger": made.name, "identity": made.identity, "operator": made.operator}
    show_result(about, as_json, f"{about['ledger']}: ledger {about['identity']}")
    return 0


def add_claims(
    file: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Signed claims, or stamped tree heads.")
    ],
    ledger: LedgerUrl,
    as_json: AsJson = False,
) -> int:
    """Add claims. A claim that is printed is on disk. A claim added twice keeps its place.

    A tree head that was exported, signed and timestamped is kept beside the claims. Its timestamp
    later dates the claims before it.

    \b
    Example:
        countermark ledger add claim.json --ledger claims.db
    """
    from countermark.claims.ledger import Ledger
    from countermark.claims.signed import load_signed_document

    # Read every file before the ledger is opened, so that a bad file adds nothing.
    documents = [load_signed_document(each) for each in file]
    with Ledger(ledger) as opened:
        places = [opened.add(each) for each in documents]
    rows = [
        {"file": str(path), "digest": document.digest, document.kind: place}
        for path, document, place in zip(file, documents, places, strict=True)
    ]
    lines = [
        f"{path}: {'claim' if document.kind == 'claim' else 'tree head over'} {place}"
        for path, document, place in zip(file, documents, places, strict=True)
    ]
    show_result({"ledger": opened.name, "added": rows}, as_json, "\n".join(lines))
    return 0


def find_claims(
    ledger: LedgerUrl,
    digest: Annotated[str | None, typer.Option(metavar="HEX", help="Of the claim.")] = None,
    commitment: Annotated[str | None, typer.Option(metavar="HEX", help="Of the key.")] = None,
    model_file: Annotated[
        str | None, typer.Option(metavar="FILE|HEX", help="The model, or its digest.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the claims there; must not exist.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Find claims, each with the proof that it is under today's root. Exits 1 if there is none.

    \b
    Example:
        countermark ledger find --ledger claims.db --model-file m.safetensors
    """
    from countermark._internal.files import write_folder
    from countermark.claims.ledger import Ledger

    # A shortened digest would silently find nothing, so only whole digests are taken.
    for name, given in (("--digest", digest), ("--commitment", commitment)):
        if given is not None and not re.fullmatch("[0-9a-f]{64}", given):
            raise ConfigError(f"{name} is {given!r}: expected 64 digits 0 to 9, a to f")
    wanted = {
        "digest": digest,
        "commitment": commitment,
        "model": model_file and _parse_model(model_file),
    }
    with Ledger(ledger) as opened:
        entries = opened.find(**{name: value for name, value in wanted.items() if value})
        found = [(entry, opened.prove(entry.place)) for entry in entries]
    if out is not None and found:
        require_free_path(out)
        named = {f"claim-{entry.place}.json": entry.claim.to_bytes() for entry, _ in found}
        write_folder(out, named)
    lines = [
        f"claim {entry.place}: {entry.claim.owner}, commitment {entry.claim.commitment}, "
        f"digest {entry.claim.digest}"
        for entry, _ in found
    ]
    about = {"ledger": opened.name, "found": [describe_entry(*each) for each in found]}
    show_result(about, as_json, "\n".join(map(make_printable, lines or ["no such claim"])))
    return 0 if found else 1


def verify_ledger(
    ledger: LedgerUrl,
    since: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="An older tree head, that was exported and kept elsewhere."
        ),
    ] = None,
    authority: Authorities = None,
    as_json: AsJson = False,
) -> int:
    """Check every claim and the tree, and compare the ledger with a tree head that you kept.

    Exits 0 when nothing before that tree head was changed, 1 when something was changed, 3 without
    a tree head: then it is only known that the ledger agrees with itself.

    \b
    Example:
        countermark ledger verify --ledger claims.db  # exit 3
    """
    from countermark.claims.audit import audit_ledger
    from countermark.claims.ledger import Ledger
    from countermark.claims.signed import TreeHead
    from countermark.claims.timestamp import Authority

    # Whoever can write to the database can rebuild the whole tree. Only a head from outside, best
    # with a timestamp, shows that.
    kept = TreeHead.load(since) if since else None
    believed = [Authority.load(each) for each in authority or []]
    with Ledger(ledger) as opened:
        found = audit_ledger(opened, kept, believed)
    lines = [f"{found.outcome.upper()}: {found.size} claims, root {found.root}"]
    lines += [f"  fault       {each}" for each in found.faults]
    if kept is not None:
        lines.append(f"  checkpoint  {kept.digest} over {kept.size} claims")
    for each in found.stamps:
        said = each.to_json()
        lines.append(f"  stamped     {said['time']} by {said['authority']}")
    lines += [f"  limit       {each}" for each in found.caveats]
    about = {"ledger": opened.name} | found.to_json()
    show_result(about, as_json, "\n".join(map(make_printable, lines)))
    return found.exit_code


def export_tree_head(
    ledger: LedgerUrl,
    out: NewFile,
    private_key: Annotated[
        Path, typer.Option(metavar="PEM", help="Of the ledger's operator; signs the tree head.")
    ],
    since: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An older tree head: prove that this one only adds."),
    ] = None,
    proof: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write that proof; with --since.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write today's signed tree head, to timestamp (`claim timestamp`), to add, to keep elsewhere.

    \b
    Example:
        countermark ledger export --ledger claims.db --out head.json --private-key acme.pem
    """
    from countermark.claims.growth import ConsistencyProof
    from countermark.claims.ledger import Ledger
    from countermark.claims.signed import TreeHead
    from countermark.claims.signing import compute_key_id, load_private_key

    if proof is not None and (since is None or proof.exists()):
        raise ConfigError("--proof writes a new file, which proves something --since an older head")
    private = load_private_key(private_key, read_pem_passphrase(private_key))
    older = TreeHead.load(since) if since else None
    with Ledger(ledger) as opened:
        # A head by any other key would be refused by everybody who pinned the operator.
        if compute_key_id(private.public_key()) != opened.operator:
            raise ConfigError(
                f"{private_key} is not the key of {opened.name}, which is {opened.operator}"
            )
        head = opened.make_head().with_signature(private)
        # The proof is for the size of this head: claims may be added meanwhile.
        path = opened.prove_growth(older, head.size) if older else None
    head.save(out)
    if proof is not None and path is not None:
        ConsistencyProof(type="countermark/growth/v1", path=tuple(path)).save(proof)
    about = {"digest": head.digest, "size": head.size, "root": head.root, "consistency": path}
    text = f"{out}: {head.size} claims, root {head.root}"
    if older and path is not None:
        lines = [f"only adds to the {older.size} before: {len(path)} digests prove it", *path]
        text = "\n  ".join([text, *lines])
    show_result(about, as_json, text)
    return 0


def check_growth(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The tree head that you kept.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="A later one.")],
    proof: Annotated[
        Path,
        typer.Option(metavar="FILE", help="What `ledger export --since OLD --proof FILE` wrote."),
    ],
    operator: Annotated[
        Path, typer.Option(metavar="PEM", help="The public key of the ledger's operator.")
    ],
    as_json: AsJson = False,
) -> int:
    """Check, without the ledger, that a later tree head only adds claims to one that was kept.

    Exits 0 when the proof shows it, 1 when the proof does not.

    \b
    Example:
        countermark ledger export --ledger claims.db --out later.json --private-key acme.pem \\
            --since head.json --proof proof.json
        countermark ledger grown head.json later.json --proof proof.json --operator acme.pub
    """
    from countermark.claims.growth import ConsistencyProof, find_growth_fault
    from countermark.claims.signed import TreeHead
    from countermark.claims.signing import compute_key_id, load_public_key

    kept, later = TreeHead.load(old), TreeHead.load(new)
    why = find_growth_fault(
        kept, later, ConsistencyProof.load(proof), compute_key_id(load_public_key(operator))
    )
    about = {"old": kept.size, "new": later.size, "only_adds": why is None, "why": why}
    more = later.size - kept.size
    said = why or f"{later.size} claims: the {kept.size} of the old head, and {more} more"
    show_result(about, as_json, make_printable(said))
    return 0 if why is None else 1


def _parse_model(model: str) -> str:
    """Return a model's digest, from a digest in hexadecimal or a weight file."""
    # A file with a name of 64 characters is read as a file.
    is_digest = len(model) == 64 and not Path(model).exists()
    return model if is_digest else compute_file_digest(model).root
