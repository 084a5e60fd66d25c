"""What `claim` and `ledger` share: checks of a claim, digests of models, claims as JSON."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.cli.options import read_key_passphrase
from countermark.errors import ClaimError, ConfigError, SuspectError

if TYPE_CHECKING:
    from countermark.checkpoints import ModelDigest
    from countermark.claims.ledger import InclusionProof, LedgerEntry
    from countermark.claims.policy import Check
    from countermark.claims.signed import Claim
    from countermark.keys.key import Key


def compute_file_digest(model: str | Path) -> ModelDigest:
    """Return the digest of the tensors in a weight file or a folder of shards."""
    from countermark.checkpoints import compute_model_digest, open_weights

    with open_weights(model) as weights:
        return compute_model_digest(weights)


def make_subject_checks(model: Path | None, key: Path | None) -> list[Check]:
    """Make the checks that a claim is about a given model and a given key.

    Args:
        model: a weight file, or None to check no model.
        key: a key folder, or None to check no key.
    """
    from countermark.claims.policy import KeyCheck, ModelCheck
    from countermark.keys.key import Key

    checks: list[Check] = []
    if model is not None:
        checks.append(ModelCheck(compute_file_digest(model)))
    if key is not None:
        checks.append(KeyCheck(Key.load(key, read_key_passphrase(key)).commitment))
    return checks


def make_file_signature_checks(
    model: Path | None, signature: Path | None, signer: Path | None
) -> list[Check]:
    """Return the check that the model's file is signed, or no check if no signature is given.

    Args:
        model: the signed file.
        signature: a signature file in the form of OpenSSF model signing.
        signer: a PEM file with the signer's public key.

    Raises:
        ConfigError: some of the three are given and others are missing.
    """
    from countermark.claims.openssf import ModelSignedBy

    if signature is None and signer is None:
        return []
    if model is None or signature is None or signer is None:
        # A signature without a pinned signer would prove nothing: any key can sign a file.
        raise ConfigError(
            "--model-signature, --model-signer and --model-file go together: signature, by whom, of "
            "what"
        )
    return [ModelSignedBy(model, signature, signer)]


def make_trust_checks(
    signers: list[Path], authorities: list[Path], before: str | None
) -> list[Check]:
    """Return the checks that pinned keys signed the claim, and pinned authorities dated it.

    Args:
        signers: PEM files of public keys that the examiner trusts.
        authorities: PEM files of timestamping authorities that the examiner trusts.
        before: a date or a moment before which the claim must have been timestamped.

    Raises:
        ConfigError: authorities without a date, or a date without authorities.
    """
    from countermark.claims.policy import CommittedBefore, OpenCheck, SignedBy
    from countermark.claims.signing import compute_key_id, load_public_key
    from countermark.claims.statement import parse_day_or_time
    from countermark.claims.timestamp import Authority

    if bool(authorities) != (before is not None):
        raise ConfigError("--authority and --before go together: whom you believe, and the date")
    # Nobody is trusted by default. A check without a trusted party stays undecided (exit 3), so
    # that a forgotten option never passes as a check that holds.
    signed: Check = OpenCheck("signed by", "who signs with these keys is unknown: give --signer")
    if signers:
        signed = SignedBy([compute_key_id(load_public_key(each)) for each in signers])
    dated: Check = OpenCheck("committed before", "nobody to believe: give --authority and --before")
    if before is not None:
        pinned = [Authority.load(each) for each in authorities]
        dated = CommittedBefore(parse_day_or_time(before, "--before"), pinned)
    return [signed, dated]


def require_mark_in_model(model: Path, key: Key) -> None:
    """Check that a key that reads weights finds its mark in the model.

    A claim cannot be corrected after it is timestamped, so a wrong model is refused here.

    Raises:
        SuspectError: the mark is not in the model.
    """
    from countermark.results.verdict import VerificationOptions
    from countermark.schemes import load_scheme
    from countermark.schemes.weights import WeightScheme
    from countermark.verification.verify import examine

    # A key with a reader of its own runs the owner's code, and triggers and outputs need more than
    # a weight file. Only `verify` reads these keys.
    if load_scheme(key).reader_code is not None or not isinstance(load_scheme(key), WeightScheme):
        warnings.warn(
            "whether the mark is in the model was not looked at: `verify` it", stacklevel=2
        )
        return
    # The key counts as dated here, because dating the key is what the claim is for.
    verdict = examine(model, key, VerificationOptions(assume_dated=True))
    if verdict.outcome == "not_proven":
        raise SuspectError(
            f"{model}: the mark of this key is not in it: expected the marked model as it was saved"
        )
    if not verdict.owned:
        warnings.warn(f"this mark proves nothing by itself: {verdict.reason}", stacklevel=2)


def describe_claim(claim: Claim) -> dict[str, Any]:
    """Return the content of a claim as JSON values, with every timestamp that can be read."""
    from countermark.claims.statement import format_time
    from countermark.claims.timestamp import read_response

    stamps = []
    for response in claim.timestamp_responses:
        # A timestamp of another document is left out here: the check reports it as a finding.
        with suppress(ClaimError):
            stamp = read_response(response, claim)
            stamps.append({"time": format_time(stamp.time), "signer": stamp.signer[0]})
    said = claim.statement.predicate
    return {
        "claim": claim.digest, "owner": said.owner, "commitment": said.commitment.sha256,
        "kind": said.commitment.kind, "model": claim.model_root, "tensors": said.tensors,
        "date": said.date, "signers": list(claim.signers), "stamps": stamps,
    }  # fmt: skip


def describe_entry(entry: LedgerEntry, proof: InclusionProof) -> dict[str, object]:
    """Return a claim and its inclusion proof as JSON values."""
    claim = entry.claim
    return {
        "place": entry.place, "digest": claim.digest, "owner": claim.owner,
        "commitment": claim.commitment, "model": claim.model_root,
        "signers": list(claim.signers), "size": proof.size, "root": proof.root,
        "path": list(proof.path),
    }  # fmt: skip
