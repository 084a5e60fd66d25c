"""The bundle: a folder that judges itself again, without network, suspect or key.

`record.json` is what was read and judged; beside it lie the claim, the tree head that dates it with
the claim's inclusion proof, and the certificates and public keys that the examiner pinned. With an
opened key (`key.json`, `key.safetensors`) the reading itself can be repeated on the suspect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from countermark import files, merkle
from countermark.claims.policy import earliest
from countermark.claims.signed import BundleSignature, Claim, TreeHead
from countermark.claims.signing import in_pem, key_id, load_certificates, load_public
from countermark.claims.statement import instant, moment
from countermark.claims.timestamp import Authority
from countermark.errors import ClaimError, ConfigError, CountermarkError, printable
from countermark.files import Stored
from countermark.report.record import Record, is_recomputed
from countermark.verdict import Verdict

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

RECORD, CLAIM, HEAD, PROOF = "record.json", "claim.json", "tree-head.json", "inclusion.json"
SIGNATURE = "signature.json"
KEY = ("key.json", "key.safetensors")
_LARGEST = 4 << 20  # bytes of a record; a hostile one takes a hundred times that to parse
_LARGEST_SIGNED = 1 << 32  # of any file of a signed bundle, an opened key among them
_LARGEST_PROOF = 1 << 16  # of an inclusion proof: 40 digests are enough for any tree

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
    "again (--suspect FILE)"
)
SIGNED_BY_NOBODY_PINNED = (
    "this bundle is signed by {signers}, none of whom you pinned: whoever made it can have made "
    "the reading up; pin the signer (--signer PEM), or read the suspect again (--suspect FILE)"
)
SIGNED = (
    "that suspect and key give this reading is the word of the signer {signers}, whom you pinned; "
    "it was not read again"
)


class Inclusion(Stored):
    """That the claim is under the tree head: its place, and digests to the root, lowest first."""

    type: Literal["countermark/inclusion/v1"]
    place: int
    path: tuple[str, ...]


@dataclass(frozen=True)
class Dated:
    """What the bundle of a dated key holds beside its record."""

    claim: Claim
    authorities: tuple[Path, ...]
    signers: tuple[Path, ...]
    head: TreeHead | None = None
    inclusion: Inclusion | None = None


@dataclass(frozen=True)
class Replayed:
    """A bundle that was judged again.

    Attributes:
        record: as it was read; its verdict follows from it.
        verdict: the same, judged anew: what follows if the recorded reading is true.
        sha256: of `record.json`.
        checked: what was found to hold.
        limits: what a replay cannot know.
        signers: who signed the bundle, as names of their public keys.
        is_vouched_for: whether somebody whom the examiner pinned signed it.
        has_key: whether the bundle holds the opened key.
    """

    record: Record
    verdict: Verdict
    sha256: str
    checked: tuple[str, ...]
    limits: tuple[str, ...]
    signers: tuple[str, ...] = ()
    is_vouched_for: bool = False
    has_key: bool = False
    dated: Dated | None = field(repr=False, default=None)


def contents(
    record: Record, dated: Dated | None, key: Path | None,
    signer: Ed25519PrivateKey | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """Make the files of a bundle, by their names.

    Args:
        record: what was judged.
        dated: claim and what dates it, where there was a claim.
        key: a key folder whose files are put in, unencrypted or not, as they are.
        signer: signs the digests of all files; None leaves the bundle unsigned.
    """
    made = {RECORD: record.model_dump_json(indent=1).encode() + b"\n"}
    if dated is not None:
        made[CLAIM] = dated.claim.to_bytes()
        if dated.head is not None and dated.inclusion is not None:
            made[HEAD] = dated.head.to_bytes()
            made[PROOF] = dated.inclusion.model_dump_json().encode() + b"\n"
        # Written anew: a file may hold more than what it was given for, a private key for one.
        for n, path in enumerate(dated.authorities):
            made[f"authority-{n}.pem"] = b"".join(map(in_pem, load_certificates(path)))
        for n, path in enumerate(dated.signers):
            made[f"signer-{n}.pem"] = in_pem(load_public(path))
    if key is not None:
        made |= {name: (key / name).read_bytes() for name in KEY}
    if signer is not None:
        digests = {name: hashlib.sha256(each).hexdigest() for name, each in made.items()}
        made[SIGNATURE] = BundleSignature.new(digests).signed(signer).to_bytes()
    return made


def save(folder: Path, content: Mapping[str, bytes]) -> None:
    """Write a bundle to a new folder, whole or not at all.

    Raises:
        ConfigError: something already has that name.
    """
    try:
        files.write_folder(folder, content)
    except FileExistsError:
        raise ConfigError(f"{folder} exists: choose another name or move it away") from None


def replay(folder: Path, pinned: Sequence[str] = ()) -> Replayed:
    """Judge a bundle again, and check what dates it and who signed it.

    Args:
        folder: the bundle.
        pinned: public keys of whoever is believed to have read what the record says.

    Raises:
        ClaimError: it is no bundle, something in it was changed or does not follow from the rest,
            or none of the pinned keys signed it.
    """
    try:
        content = files.read_regular(folder / RECORD, _LARGEST)
        record = files.parse_as(Record, content)
        verdict = record.judged()
        verdict.explain()  # what it says of the suspect is as hostile as the rest
    except (ValueError, TypeError, KeyError, AttributeError, CountermarkError) as error:
        raise ClaimError(
            f"{folder / RECORD}: {printable(str(error), 300)}; expected a bundle as "
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
    limits = [_basis(signers, vouching)]
    if not is_recomputed(record.result):
        limits.append(RECORDED_P.format(name=record.result.null))
    dated = _dated(folder) if verdict.dating is not None else None
    if verdict.dating is not None and dated is not None:
        checked += _check_date(verdict, dated)
        limits += [PINNED_HERE, COUNT_RECORDED] if verdict.dating.committed else [PINNED_HERE]
    return Replayed(
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


def _basis(signers: Sequence[str], vouching: Sequence[str]) -> str:
    """Say whose word it is that suspect and key give the recorded reading."""
    if vouching:
        return SIGNED.format(signers=", ".join(vouching))
    if signers:
        return SIGNED_BY_NOBODY_PINNED.format(signers=", ".join(signers))
    return UNSIGNED


def _check_signature(folder: Path) -> tuple[str, ...]:
    """Find who signed a bundle; nobody where it has no signature.

    Raises:
        ClaimError: a signature that is not one, or not of these files.
    """
    if not (folder / SIGNATURE).exists():
        return ()
    signature = BundleSignature.load(folder / SIGNATURE)
    signature.check()
    signed, there = signature.statement.digests, set()
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
        raise ClaimError(f"{folder} lacks {printable(missing[0], 100)}, which was signed")
    return signature.signers


def _dated(folder: Path) -> Dated:
    """The claim of a bundle and what lies beside it."""
    claim, head, inclusion = Claim.load(folder / CLAIM), None, None
    if (folder / HEAD).exists():
        head = TreeHead.load(folder / HEAD)
        try:
            inclusion = files.parse_as(
                Inclusion, files.read_regular(folder / PROOF, _LARGEST_PROOF)
            )
        except ValueError as error:
            raise ClaimError(f"{folder / PROOF}: {printable(str(error), 200)}") from None
    pems = {kind: tuple(sorted(folder.glob(f"{kind}-*.pem"))) for kind in ("authority", "signer")}
    return Dated(claim, pems["authority"], pems["signer"], head, inclusion)


def _check_date(verdict: Verdict, dated: Dated) -> list[str]:
    """What holds of a claim and of the head that dates it."""
    claim, dating = dated.claim, verdict.dating
    claim.check()
    if dating is None or claim.digest != dating.claim or claim.commitment != verdict.commitment:
        raise ClaimError("the claim in the bundle is not the one that the verdict is dated by")
    if claim.owner != verdict.owner:
        raise ClaimError("the owner in the claim is not the one that the verdict names")
    checked = [f"the claim {claim.digest} is signed, and about this key"]
    if dating.committed is None:
        return checked
    pinned = {key_id(load_public(each)) for each in dated.signers}
    if (dating.signer == "pinned") != bool(pinned & set(claim.signers)):
        raise ClaimError("the claim's signer is not among the public keys, as the verdict says")
    if dated.head is None or dated.inclusion is None:
        raise ClaimError("the bundle lacks the tree head that dates the claim")
    _require_under(claim, dated.head, dated.inclusion)
    authorities = [Authority.load(each) for each in dated.authorities]
    stamps = earliest([dated.head], authorities)
    by = {instant(each.stamp.latest): each.authority.name for each in stamps}
    if by.get(dating.committed) not in dating.authorities or (
        moment(dating.committed) >= moment(dating.suspect_date)
    ):
        raise ClaimError("the tree head in the bundle is not stamped as the verdict says")
    if not set(dating.authorities) <= {each.name for each in authorities}:
        raise ClaimError("the verdict names authorities of which the bundle has no certificate")
    if not dating.commitments:
        raise ClaimError("the verdict is dated and counts no commitment")
    return [*checked, f"it is under a tree head that was stamped by {dating.committed}"]


def _require_under(claim: Claim, head: TreeHead, inclusion: Inclusion) -> None:
    head.check()
    place, path = inclusion.place, inclusion.path
    if not merkle.is_under(head.root, claim.to_bytes(), place, head.size, path):
        raise ClaimError("the claim in the bundle is not under the tree head beside it")
