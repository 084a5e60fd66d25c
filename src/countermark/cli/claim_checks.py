"""The checks of `claim check`, built from its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from countermark.cli.options import read_key_passphrase
from countermark.errors import ConfigError

if TYPE_CHECKING:
    from countermark.claims.policy import Check


def make_subject_checks(model: Path | None, key: Path | None) -> list[Check]:
    """Return the checks that a claim is about a given model and a given key.

    Args:
        model: a weight file, or None to check no model.
        key: a key folder, or None to check no key.
    """
    from countermark.checkpoints import compute_model_digest, open_weights
    from countermark.claims.policy import KeyCheck, ModelCheck
    from countermark.keys.key import Key

    checks: list[Check] = []
    if model is not None:
        with open_weights(model) as weights:
            checks.append(ModelCheck(compute_model_digest(weights)))
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
            "--model-signature, --model-signer and --model go together: signature, by whom, of what"
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
