"""The bundle: a folder that can be judged again without network, suspect or key.

`record.json` holds the reading and its verdict. Beside it lie the claim, the tree head that dates
the claim with an inclusion proof, and the certificates and public keys that the examiner pinned.
With an opened key (`key.json`, `key.safetensors`) the suspect can be read again, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from countermark._internal import files, merkle
from countermark._internal.files import StoredDocument
from countermark.claims.policy import find_earliest_timestamps
from countermark.claims.signed import BundleSignature, Claim, TreeHead
from countermark.claims.signing import (
    compute_key_id,
    encode_pem,
    load_certificates,
    load_public_key,
)
from countermark.claims.statement import format_time, parse_time
from countermark.claims.timestamp import Authority
from countermark.errors import ClaimError, ConfigError, CountermarkError, make_printable
from countermark.report.record import Record, is_recomputed
from countermark.results.verdict import Verdict

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

RECORD, CLAIM, HEAD, PROOF = "record.json", "claim.json", "tree-head.json", "inclusion.json"
SIGNATURE = "signature.json"
KEY = ("key.json", "key.safetensors")
_LARGEST = 4 << 20  # bytes of a record; parsing takes up to a hundred times that in memory
_LARGEST_SIGNED = 1 << 32  # bytes of a file of a signed bundle, which may be an opened key
_LARGEST_PROOF = 1 << 16  # bytes of an inclusion proof; 40 digests are enough for any tree

RECORDED_P = (
    "log10 p by {name} cannot be computed again without suspect and key: it is taken as recorded"
)
COUNT_RECORDED = (
    "that the ledger held so many commitments is as recorded: whoever doubts it needs the ledger"
)
PINNED_HERE = (
    "whose stamps count was chosen by whoever made this report: compare the certificates with your "
    "own"
)
FOLLOWS = (
    "the figures follow from this record; that suspect and key give this reading was not checked"
)
UNSIGNED = (
    "nobody has signed this bundle: whoever made it can have made the reading up; read the suspect "
    "again"
)
SIGNED_BY_NOBODY_PINNED = (
    "this bundle is signed by {signers}, none of whom you pinned: whoever made it can have made "
    "the reading up; pin the signer (--signer PEM), or read the suspect again"
)
SIGNED = (
    "that suspect and key give this reading is the word of the signer {signers}, whom you pinned; "
    "it was not read again"
)


class BundleInclusion(StoredDocument):
    """A proof that the claim is under the tree head.

    Attributes:
        place: the claim's place in the ledger, from 0.
        path: digests from leaf to root, lowest first, in hexadecimal.
    """

    type: Literal["countermark/inclusion/v1"]
    place: int
    path: tuple[str, ...]


@dataclass(frozen=True)
class DatingDocuments:
    """The documents that a bundle of a dated key holds beside its record.

    Attributes:
        claim: the claim about the key.
        authorities: PEM files of the pinned authorities.
        signers: PEM files of the pinned signers' public keys.
        head: the tree head that dates the claim; None if nothing dates it.
        inclusion: the proof that the claim is under the head; None if nothing dates it.
    """

    claim: Claim
    authorities: tuple[Path, ...]
    signers: tuple[Path, ...]
    head: TreeHead | None = None
    inclusion: BundleInclusion | None = None


@dataclass(frozen=True)
class ReplayedBundle:
    """A bundle that was judged again.

    Attributes:
        record: the record as it was read; its verdict follows from it.
        verdict: the verdict, judged again: what follows if the recorded reading is true.
        sha256: SHA-256 of `record.json`.
        checked: the statements that were checked and hold.
        limits: the caveats: what a replay cannot know.
        signers: public keys, in hexadecimal, that signed the bundle.
        is_vouched_for: whether a signer whom the examiner pinned signed the bundle.
        has_key: whether the bundle holds the opened key.
        dated: the documents that date the key; None if the verdict has no claim.
    """

    record: Record
    verdict: Verdict
    sha256: str
    checked: tuple[str, ...]
    limits: tuple[str, ...]
    signers: tuple[str, ...] = ()
    is_vouched_for: bool = False
    has_key: bool = False
    dated: DatingDocuments | None = field(repr=False, default=None)


def make_bundle_files(
    record: Record, dated: DatingDocuments | None, key: Path | None,
    signer: Ed25519PrivateKey | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """Make the files of a bundle, by their names.

    Args:
        record: the record of the verdict.
        dated: the claim and what dates it, if there was a claim.
        key: a key folder whose two files are copied as they are, encrypted or not; None for none.
        signer: signs the digests of all files; None leaves the bundle unsigned.
    """
    made = {RECORD: record.model_dump_json(indent=1).encode() + b"\n"}
    if dated is not None:
        made[CLAIM] = dated.claim.to_bytes()
        if dated.head is not None and dated.inclusion is not None:
            made[HEAD] = dated.head.to_bytes()
            made[PROOF] = dated.inclusion.model_dump_json().encode() + b"\n"
        # Encoded again, not copied: a PEM file may also hold something else, say a private key.
        for n, path in enumerate(dated.authorities):
            made[f"authority-{n}.pem"] = b"".join(map(encode_pem, load_certificates(path)))
        for n, path in enumerate(dated.signers):
            made[f"signer-{n}.pem"] = encode_pem(load_public_key(path))
    if key is not None:
        made |= {name: (key / name).read_bytes() for name in KEY}
    if signer is not None:
        # Signed last, so that the signature covers every other file.
        digests = {name: hashlib.sha256(each).hexdigest() for name, each in made.items()}
        made[SIGNATURE] = BundleSignature.make_unsigned(digests).with_signature(signer).to_bytes()
    return made


def save_bundle(folder: Path, content: Mapping[str, bytes]) -> None:
    """Write a bundle to a new folder, whole or not at all.

    Raises:
        ConfigError: the folder already exists.
    """
    try:
        files.write_folder(folder, content)
    except FileExistsError:
        raise ConfigError(f"{folder} exists: choose another name or move it away") from None


def replay_bundle(folder: Path, pinned: Sequence[str] = ()) -> ReplayedBundle:
    """Judge a bundle again, and check what dates it and who signed it.

    Args:
        folder: the bundle.
        pinned: public keys of the signers whom the examiner trusts to have read the suspect.

    Raises:
        ClaimError: the folder is no bundle, a file was changed or does not follow from the others,
            or none of the pinned keys signed it.
    """
    try:
        content = files.read_regular(folder / RECORD, _LARGEST)
        record = files.parse_document(Record, content)
        verdict = record.judge_again()
        # The names in a record are as hostile as the rest: fail here, not when they are printed.
        verdict.explain()
    except (ValueError, TypeError, KeyError, AttributeError, CountermarkError) as error:
        raise ClaimError(
            f"{folder / RECORD}: {make_printable(str(error), 300)}; expected a bundle as "
            "`countermark report` writes it"
        ) from None
    checked = [f"the verdict follows from the {verdict.bits} {verdict.unit} that were read"]
    signers = _check_signature(folder)
    vouching = sorted(set(signers) & set(pinned))
    if pinned and not vouching:
        raise ClaimError(
            f"{folder} is signed by {', '.join(signers) or 'nobody'}, by none of the pinned keys: "
            "expected a bundle that a pinned signer signed"
        )
    if vouching:
        checked.append(f"every file is as {', '.join(vouching)} signed it")
    # A replay follows from the record; only a signature says that the record was ever read.
    limits = [_explain_basis(signers, vouching)]
    if not is_recomputed(record.result):
        limits.append(RECORDED_P.format(name=record.result.null))
    dated = _load_dating_documents(folder) if verdict.dating is not None else None
    if verdict.dating is not None and dated is not None:
        checked += _check_date(verdict, dated)
        limits += [PINNED_HERE, COUNT_RECORDED] if verdict.dating.committed else [PINNED_HERE]
    return ReplayedBundle(
        record,
        verdict,
        hashlib.sha256(content).hexdigest(),
        tuple(checked),
        tuple(limits),
        signers=signers,
        is_vouched_for=bool(vouching),
        has_key=all((folder / name).exists() for name in KEY),
        dated=dated,
    )


def _explain_basis(signers: Sequence[str], vouching: Sequence[str]) -> str:
    """Say whose word it is that suspect and key give the recorded reading."""
    if vouching:
        return SIGNED.format(signers=", ".join(vouching))
    if signers:
        return SIGNED_BY_NOBODY_PINNED.format(signers=", ".join(signers))
    return UNSIGNED


def _check_signature(folder: Path) -> tuple[str, ...]:
    """Check the signature of a bundle and return its signers; empty without a signature.

    Raises:
        ClaimError: the signature is not valid, or not over exactly these files.
    """
    # A bundle may be unsigned: the caveat UNSIGNED then says so.
    if not (folder / SIGNATURE).exists():
        return ()
    signature = BundleSignature.load(folder / SIGNATURE)
    signature.check_signatures()
    signed, there = signature.statement.file_digests, set()
    # An extra file is refused, too: a replay would read it as if the signer had seen it.
    for path in sorted(folder.iterdir()):
        if path.name == SIGNATURE:
            continue
        try:
            digest = files.digest_regular(path, _LARGEST_SIGNED)
        except ValueError as error:
            raise ClaimError(f"{path}: {error}; expected a file of a bundle") from None
        if signed.get(path.name) != digest:
            raise ClaimError(f"{path} is not as it was signed: expected the file that was signed")
        there.add(path.name)
    if missing := sorted(signed.keys() - there):
        raise ClaimError(f"{folder} lacks {make_printable(missing[0], 100)}, which was signed")
    return signature.signers


def _load_dating_documents(folder: Path) -> DatingDocuments:
    """Load the claim of a bundle and the documents beside it.

    Raises:
        ClaimError: a document that cannot be read.
    """
    claim, head, inclusion = Claim.load(folder / CLAIM), None, None
    if (folder / HEAD).exists():
        head = TreeHead.load(folder / HEAD)
        try:
            inclusion = files.parse_document(
                BundleInclusion, files.read_regular(folder / PROOF, _LARGEST_PROOF)
            )
        except ValueError as error:
            raise ClaimError(f"{folder / PROOF}: {make_printable(str(error), 200)}") from None
    pems = {kind: tuple(sorted(folder.glob(f"{kind}-*.pem"))) for kind in ("authority", "signer")}
    return DatingDocuments(claim, pems["authority"], pems["signer"], head, inclusion)


def _check_date(verdict: Verdict, dated: DatingDocuments) -> list[str]:
    """Check the claim and the tree head that date a verdict; return the statements that hold.

    Raises:
        ClaimError: a statement of the verdict that the documents do not show.
    """
    claim, dating = dated.claim, verdict.dating
    claim.check_signatures()
    if dating is None or claim.digest != dating.claim or claim.commitment != verdict.commitment:
        raise ClaimError("the claim in the bundle is not the one that the verdict is dated by")
    if claim.owner != verdict.owner:
        raise ClaimError("the owner in the claim is not the one that the verdict names")
    checked = [f"the claim {claim.digest} is signed, and about this key"]
    # An undated claim makes no statement about a tree head that could be checked.
    if dating.committed is None:
        return checked
    # The number of commitments depends on whether a signer was pinned, so this must agree.
    pinned = {compute_key_id(load_public_key(each)) for each in dated.signers}
    if (dating.signer == "pinned") != bool(pinned & set(claim.signers)):
        raise ClaimError("the claim's signer is not among the public keys, as the verdict says")
    if dated.head is None or dated.inclusion is None:
        raise ClaimError("the bundle lacks the tree head that dates the claim")
    _require_inclusion(claim, dated.head, dated.inclusion)
    authorities = [Authority.load(each) for each in dated.authorities]
    stamps = find_earliest_timestamps([dated.head], authorities)
    # The verdict names a time and authorities; a timestamp on the tree head has to confirm both.
    by = {format_time(each.stamp.latest_time): each.authority.name for each in stamps}
    if by.get(dating.committed) not in dating.authorities or (
        parse_time(dating.committed) >= parse_time(dating.suspect_date)
    ):
        raise ClaimError("the tree head in the bundle is not stamped as the verdict says")
    if not set(dating.authorities) <= {each.name for each in authorities}:
        raise ClaimError("the verdict names authorities of which the bundle has no certificate")
    # p is multiplied by this number: zero or none would make a dated key free.
    if not dating.commitments:
        raise ClaimError("the verdict is dated and counts no commitment")
    return [*checked, f"it is under a tree head that was stamped by {dating.committed}"]


def _require_inclusion(claim: Claim, head: TreeHead, inclusion: BundleInclusion) -> None:
    """Raise `ClaimError` unless a claim is under a signed tree head."""
    head.check_signatures()
    place, path = inclusion.place, inclusion.path
    if not merkle.is_under(head.root, claim.to_bytes(), place, head.size, path):
        raise ClaimError("the claim in the bundle is not under the tree head beside it")
