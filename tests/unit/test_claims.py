"""Claims: what they say, who signed them, and what is refused of a file that anybody may write."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keys import mutated, one_line

from authority import some_claim, write_keys
from countermark.claims import signing
from countermark.claims.signed import Claim, TreeHead, load_signed_document
from countermark.claims.statement import Commitment, format_time, parse_day_or_time
from countermark.errors import ClaimError, ConfigError, CountermarkError

OWNER, MALLORY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
CLAIM = some_claim(OWNER)


def payload_of(claim: Claim) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(claim.envelope.payload))
    return found


def with_payload(claim: Claim, text: bytes) -> bytes:
    """The file of a claim with another statement under its signatures."""
    document = json.loads(claim.to_bytes())
    document["envelope"]["payload"] = base64.b64encode(text).decode()
    return rfc8785.dumps(document)


def test_a_claim_is_an_in_toto_statement_in_a_dsse_envelope() -> None:
    """Checked with nothing of ours: the specifications word by word."""
    document = json.loads(CLAIM.to_bytes())
    envelope = document["envelope"]
    text = base64.b64decode(envelope["payload"])
    kind = b"application/vnd.in-toto+json"
    signed = b"DSSEv1 28 " + kind + b" " + str(len(text)).encode() + b" " + text
    (signature,) = envelope["signatures"]
    OWNER.public_key().verify(base64.b64decode(signature["sig"]), signed)
    assert signature["keyid"] == OWNER.public_key().public_bytes_raw().hex()
    assert envelope["payloadType"] == kind.decode()
    said = json.loads(text)
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["subject"] == [{"name": "model", "digest": {"merkleSha256": "cd" * 32}}]
    assert said["predicateType"] == "countermark:claim/v1"
    assert set(said["predicate"]) == {
        "commitment", "owner", "date", "tensors", "nonce", "version"
    }  # fmt: skip
    assert CLAIM.digest == hashlib.sha256(rfc8785.dumps(envelope)).hexdigest()


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    CLAIM.save(tmp_path / "c.json")
    assert Claim.load(tmp_path / "c.json") == load_signed_document(tmp_path / "c.json") == CLAIM
    with pytest.raises(ConfigError, match="exists: choose another name"):
        CLAIM.save(tmp_path / "c.json")
    head = TreeHead.make_unsigned("ab" * 32, 0, "cd" * 32).with_signature(OWNER)
    head.save(tmp_path / "h.json")
    assert load_signed_document(tmp_path / "h.json") == head
    with pytest.raises(ClaimError, match="type: Input should be 'countermark/claim/v1'"):
        Claim.load(tmp_path / "h.json")


def test_two_claims_of_the_same_are_two() -> None:
    assert some_claim(OWNER, commitment="ab" * 32).digest != (
        some_claim(OWNER, commitment="ab" * 32).digest
    )


# --- signatures


def refused(claim: Claim, says: str) -> None:
    with pytest.raises(ClaimError) as caught:
        claim.check_signatures()
    assert says in one_line(caught.value)


def test_signatures_are_over_this_claim_and_no_other() -> None:
    CLAIM.check_signatures()
    some_claim(OWNER, MALLORY).check_signatures()
    refused(some_claim(), "nobody signed this claim")
    other = some_claim(OWNER)
    replayed = other.envelope.model_copy(update={"signatures": CLAIM.envelope.signatures})
    refused(other.model_copy(update={"envelope": replayed}), "belongs to another one")
    twice = CLAIM.envelope.model_copy(update={"signatures": CLAIM.envelope.signatures * 2})
    refused(CLAIM.model_copy(update={"envelope": twice}), "one key signed this claim twice")
    stolen = (
        some_claim(MALLORY)
        .envelope.signatures[0]
        .model_copy(update={"keyid": OWNER.public_key().public_bytes_raw().hex()})
    )
    refused(
        other.model_copy(
            update={"envelope": other.envelope.model_copy(update={"signatures": (stolen,)})}
        ),
        "is not over this claim",
    )


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("predicate", "owner"), "Mallory"),
        (("predicate", "date"), "2001-01-01T00:00:00Z"),
        (("predicate", "commitment", "sha256"), "00" * 32),
        (("predicate", "tensors"), 5),
        (("subject", 0, "digest", "merkleSha256"), "00" * 32),
    ],
)
def test_a_changed_statement_is_not_what_was_signed(path: tuple[Any, ...], to: Any) -> None:
    said = payload_of(CLAIM)
    inner = said
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    refused(Claim.from_bytes(with_payload(CLAIM, rfc8785.dumps(said))), "it was changed after")


def test_nobody_signs_twice_or_behind_a_stamp() -> None:
    with pytest.raises(ConfigError, match="signed this claim already"):
        CLAIM.with_signature(OWNER)
    with pytest.raises(ConfigError, match="sign first"):
        CLAIM.with_timestamp(b"x").with_signature(MALLORY)


# --- files that anybody may write


BAD: list[tuple[tuple[Any, ...], Any, str]] = [
    (("type",), "countermark/claim/v2", "type: "),
    (("colour",), 1, "colour: Extra inputs"),
    (("envelope", "payloadType"), "text/plain", "envelope.payloadType"),
    (("envelope", "payload"), "AB==", "bits behind its end"),
    (("envelope", "payload"), "*", "base64"),
    (("envelope", "payload"), "A" * (1 << 17 | 4), "envelope.payload"),
    (("envelope", "signatures"), [{}], "envelope.signatures.0.keyid"),
    (("envelope", "signatures", 0, "keyid"), "AB" * 32, "envelope.signatures.0.keyid"),
    (("envelope", "signatures", 0, "keyid"), "ab" * 32 + "\n", "envelope.signatures.0.keyid"),
    (("envelope", "signatures", 0, "colour"), 1, "colour"),
    (("timestamps",), ["!"], "base64"),
    (("timestamps",), [""] * 17, "timestamps"),
    (("timestamps",), None, "timestamps"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "to", "says"), BAD, ids=range(len(BAD)))
def test_a_field_that_is_wrong_is_named(path: tuple[Any, ...], to: Any, says: str) -> None:
    document = json.loads(CLAIM.to_bytes())
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    unreadable(rfc8785.dumps(document), says)


def unreadable(content: bytes, says: str) -> None:
    with pytest.raises(ClaimError) as caught:
        Claim.from_bytes(content)
    assert says in one_line(caught.value)


SAID: list[tuple[tuple[Any, ...], Any, str]] = [
    (("predicate", "colour"), 1, "predicate.colour"),
    (("predicate", "owner"), "", "predicate.owner"),
    (("predicate", "owner"), "x" * 1001, "predicate.owner"),
    (("predicate", "date"), "2026-02-30T00:00:00Z", "day is out of range"),
    (("predicate", "date"), "2026-01-01", "predicate.date"),
    (("predicate", "tensors"), 0, "predicate.tensors"),
    (("predicate", "commitment", "kind"), "C2", "predicate.commitment.kind"),
    (("subject",), [], "subject"),
    (("subject", 0, "name"), "another", "subject.0.name"),
    (("_type",), "https://in-toto.io/Statement/v0.1", "_type"),
    (("predicateType",), "countermark:claim/v2", "predicateType"),
]


@pytest.mark.parametrize(("path", "to", "says"), SAID, ids=range(len(SAID)))
def test_a_statement_that_is_wrong_is_named(path: tuple[Any, ...], to: Any, says: str) -> None:
    said = payload_of(CLAIM)
    inner = said
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    unreadable(with_payload(CLAIM, rfc8785.dumps(said)), says)


def test_a_document_has_one_spelling() -> None:
    said = payload_of(CLAIM)
    unreadable(with_payload(CLAIM, json.dumps(said).encode()), "not in canonical JSON")
    unreadable(json.dumps(json.loads(CLAIM.to_bytes())).encode(), "not in canonical JSON")
    unreadable(CLAIM.to_bytes().replace(b'"type"', b'"type":"x","type"', 1), "stands twice")
    for content in (b"", b"null", b"[" * 100_000, b"\xff", b'{"type": NaN}'):
        unreadable(content, "expected a file of type countermark/claim/v1")


def test_damage_is_refused_or_changes_nothing() -> None:
    drawn, content = random.Random(5), CLAIM.to_bytes()  # noqa: S311
    for changes in range(500):
        damaged = mutated(content, drawn, 1 + changes % 5)
        try:
            found = Claim.from_bytes(damaged)
            found.check_signatures()
        except CountermarkError as error:
            one_line(error)
        else:
            assert found.statement == CLAIM.statement


def test_what_cannot_be_claimed_is_one_line() -> None:
    for owner, root in (
        ("", "cd" * 32),
        ("x" * 1001, "cd" * 32),
        ("a", "no"),
        ("\ud800", "c" * 64),
    ):
        with pytest.raises(ConfigError) as caught:
            Claim.make_unsigned(Commitment(kind="C0", sha256="ab" * 32), owner, root, 1)
        assert "nothing like this can be claimed" in one_line(caught.value)


# --- keys and dates


def test_key_files(tmp_path: Path) -> None:
    name = signing.write_key_pair(tmp_path / "acme")
    assert (tmp_path / "acme.pem").stat().st_mode & 0o777 == 0o600
    private = signing.load_private_key(tmp_path / "acme.pem")
    assert signing.compute_key_id(private.public_key()) == name
    assert signing.compute_key_id(signing.load_public_key(tmp_path / "acme.pub")) == name
    with pytest.raises(ConfigError, match="never overwritten"):
        signing.write_key_pair(tmp_path / "acme")
    signing.write_key_pair(tmp_path / "sealed", "correct horse")
    assert signing.is_encrypted(tmp_path / "sealed.pem")
    signing.load_private_key(tmp_path / "sealed.pem", "correct horse")
    for path, passphrase in (
        ("sealed.pem", None), ("sealed.pem", "wrong"), ("acme.pub", None), ("absent", None),
        (".", None),
    ):  # fmt: skip
        with pytest.raises(ClaimError) as caught:
            signing.load_private_key(tmp_path / path, passphrase)
        assert "correct horse" not in one_line(caught.value)
    (tmp_path / "rsa.pub").write_text(
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    )
    for path in ("rsa.pub", "acme.pem", "absent"):
        with pytest.raises(ClaimError):
            signing.load_public_key(tmp_path / path)
        with pytest.raises(ClaimError):
            signing.load_certificates(tmp_path / path)


def test_keys_of_openssl_are_read(tmp_path: Path) -> None:
    private = write_keys(tmp_path, "owner")
    assert signing.load_private_key(tmp_path / "owner.pem").private_bytes_raw() == (
        private.private_bytes_raw()
    )


def test_days_begin_in_utc_and_times_have_a_zone() -> None:
    assert format_time(parse_day_or_time("2026-05-31", "--x")) == "2026-05-31T00:00:00Z"
    assert (
        format_time(parse_day_or_time("2026-05-31T01:00:00+02:00", "--x")) == "2026-05-30T23:00:00Z"
    )
    assert format_time(parse_day_or_time("2026-05-31T01:00:00Z", "--x")) == "2026-05-31T01:00:00Z"
    for text in (
        "2026-05-31T01:00:00",
        "31.5.2026",
        "2026-13-01",
        "",
        "9" * 500,
        "0001-01-01T00:00+05:00",
    ):
        with pytest.raises(ConfigError) as caught:
            parse_day_or_time(text, "--x")
        assert "expected a day such as 2026-05-31" in one_line(caught.value)
