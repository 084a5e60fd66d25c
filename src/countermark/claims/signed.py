"""Signed documents on disk: a statement in a DSSE envelope, signatures, and timestamps over both.

    PAE       = "DSSEv1" SP len(type) SP type SP len(body) SP body          the signed bytes
    envelope  = canonical JSON {"payload", "payloadType", "signatures"}     the timestamped bytes
    digest    = SHA-256(envelope)                                           the name of a document

A timestamp covers the signatures as well: somebody who signs the same statement later has another
envelope, and no timestamp. A signature names its public key; whose key that is, a policy decides.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Self, cast

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from countermark._internal import files
from countermark._internal.files import Hex32, StoredDocument
from countermark._internal.output_paths import write_new_file
from countermark.claims import signing
from countermark.claims.statement import (
    BundleStatement,
    ClaimStatement,
    Commitment,
    HeadStatement,
    make_bundle_text,
    make_claim_text,
    make_format_error,
    make_head_text,
    parse_statement,
)
from countermark.errors import ClaimError, ConfigError

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
LARGEST = 1 << 20  # bytes of a file, which may come from anybody
_MOST = 16  # signatures, and also timestamps
_STAMP = 1 << 17  # base64 digits of a timestamp
Base64 = Annotated[str, Field(max_length=_STAMP)]


class Signature(StoredDocument):
    """One signature of an envelope.

    Attributes:
        keyid: the public key, 32 bytes in hexadecimal.
        sig: the signature in base64.
    """

    keyid: Hex32
    sig: Base64


class Envelope(StoredDocument):
    """A DSSE envelope (version 1) without additional fields.

    Attributes:
        payload: the statement's text in base64.
        payloadType: the media type of in-toto Statements.
        signatures: at most 16 signatures.
    """

    payload: Base64
    payloadType: Literal["application/vnd.in-toto+json"]  # noqa: N815 - DSSE's spelling
    signatures: Annotated[tuple[Signature, ...], Field(max_length=_MOST)]


class _SignedDocument(StoredDocument):
    """The base of claims, tree heads and bundle signatures.

    Attributes:
        what: name of the document in messages.
        kind: name of the document in its type string.
        words: class of the statement.
        envelope: the statement and its signatures.
        timestamps: RFC 3161 responses over the envelope, in base64.
    """

    what: ClassVar[str]
    kind: ClassVar[str]
    words: ClassVar[type[ClaimStatement] | type[HeadStatement] | type[BundleStatement]]

    envelope: Envelope
    timestamps: Annotated[tuple[Base64, ...], Field(max_length=_MOST)]

    @cached_property
    def parsed_statement(self) -> ClaimStatement | HeadStatement | BundleStatement:
        """The statement, parsed from its text."""
        return parse_statement(self.words, self.payload)

    @cached_property
    def payload(self) -> bytes:
        """The statement's text."""
        return _decode_base64(self.envelope.payload)

    @cached_property
    def envelope_bytes(self) -> bytes:
        """The bytes that timestamps are over: the envelope as canonical JSON."""
        return rfc8785.dumps(self.envelope.model_dump())

    @property
    def digest(self) -> str:
        """SHA-256 of the envelope, in hexadecimal: the document's name."""
        return hashlib.sha256(self.envelope_bytes).hexdigest()

    @property
    def signers(self) -> tuple[str, ...]:
        """The public keys of the signatures, in hexadecimal; `check_signatures` verifies the signatures."""
        return tuple(each.keyid for each in self.envelope.signatures)

    @property
    def timestamp_responses(self) -> tuple[bytes, ...]:
        """The timestamps: RFC 3161 responses in DER."""
        return tuple(_decode_base64(each) for each in self.timestamps)

    def check_signatures(self) -> None:
        """Verify every signature.

        Raises:
            ClaimError: there is no signature, one key signed twice, or a signature is not by its
                key over this statement.
        """
        if not self.signers:
            raise ClaimError(f"nobody signed this {self.what}: expected it from `claim sign`")
        # k of n signers must be k keys: one key that signs twice counts once.
        if len(set(self.signers)) < len(self.signers):
            raise ClaimError(f"one key signed this {self.what} twice: expected each once")
        message = _encode_pae(self.payload)
        # All signatures must hold, not only k of them: a document with a false signature was
        # changed by somebody.
        for each in self.envelope.signatures:
            if not signing.is_valid_signature(each.keyid, _decode_base64(each.sig), message):
                raise ClaimError(
                    f"the signature of {each.keyid} is not over this {self.what}: it was changed "
                    "after it was signed, or the signature belongs to another one"
                )

    def with_signature(self, private: Ed25519PrivateKey) -> Self:
        """Return a copy with one more signature.

        Raises:
            ConfigError: this key has already signed, or there are timestamps, which would not cover
                the new signature.
        """
        keyid = signing.compute_key_id(private.public_key())
        if keyid in self.signers:
            raise ConfigError(f"{keyid} signed this {self.what} already: expected another key")
        if self.timestamps:
            raise ConfigError(
                f"this {self.what} is stamped, and a stamp is over the signatures: sign first"
            )
        made = Signature(keyid=keyid, sig=_encode_base64(private.sign(_encode_pae(self.payload))))
        signatures = (*self.envelope.signatures, made)
        envelope = self.envelope.model_copy(update={"signatures": signatures})
        # Validated again, so that a copy obeys the same bounds as a document that was read.
        return type(self).model_validate(self.model_dump() | {"envelope": envelope.model_dump()})

    def with_timestamp(self, response: bytes) -> Self:
        """Return a copy with one more timestamp, which `timestamp.read_response` has verified before.

        Args:
            response: an RFC 3161 response in DER.
        """
        # Timestamps lie outside the envelope: one more changes neither digest nor signatures.
        stamps = (*self.timestamps, _encode_base64(response))
        return type(self).model_validate(self.model_dump() | {"timestamps": stamps})

    def with_timestamps_of(self, other: Self) -> Self:
        """Return a copy that also has the timestamps of another copy of this document.

        Raises:
            ClaimError: these are more timestamps than a document may have.
        """
        # A dict keeps the order and drops timestamps that both copies have.
        stamps = tuple(dict.fromkeys((*self.timestamps, *other.timestamps)))
        if len(stamps) > _MOST:
            raise ClaimError(f"this {self.what} has {len(stamps)} stamps: expected at most {_MOST}")
        return type(self).model_validate(self.model_dump() | {"timestamps": stamps})

    def to_bytes(self) -> bytes:
        """Return the file's content: canonical JSON (RFC 8785) and a line end."""
        return rfc8785.dumps(self.model_dump()) + b"\n"

    def save(self, path: str | Path, *, replace: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            ConfigError: the file exists and `replace` is false.
        """
        if replace:
            files.write_bytes(Path(path), self.to_bytes())
        else:
            write_new_file(path, self.to_bytes())

    @classmethod
    def from_bytes(cls, content: bytes, where: str = "it") -> Self:
        """Parse a document that anybody may have written; `check_signatures` verifies its signatures.

        Args:
            content: the file's content.
            where: name of the file in messages.

        Raises:
            ClaimError: the content is another document or version, or has a field that is unknown,
                missing or wrong; the message says which.
        """
        try:
            found = files.parse_document(cls, content)
            # The digest is over a canonical form: a file in another spelling would have the same
            # digest, and another leaf hash in a ledger.
            if found.to_bytes().rstrip(b"\n") != content.rstrip(b"\n"):
                raise ValueError("it is not in canonical JSON (RFC 8785)")
            found.require_readable()
        except ValueError as error:
            expected = f"a file of type countermark/{cls.kind}/v1"
            raise make_format_error(expected, where, str(error)) from None
        return found

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file; see `from_bytes`."""
        try:
            content = files.read_regular(Path(path), LARGEST)
        except ValueError as error:
            raise make_format_error(
                f"a file of type countermark/{cls.kind}/v1", str(path), str(error)
            ) from None
        return cls.from_bytes(content, str(path))

    def require_readable(self) -> None:
        """Raise `ValueError` unless the statement and every base64 field can be read."""
        # Read everything now, so that a damaged document fails when it is loaded, not later.
        _ = self.parsed_statement
        for each in (*self.timestamps, *(each.sig for each in self.envelope.signatures)):
            _decode_base64(each)


class Claim(_SignedDocument):
    """A claim: the owner of this key commitment has this model.

    Attributes:
        envelope: the statement and its signatures.
        timestamps: RFC 3161 responses over the envelope, in base64.
    """

    what: ClassVar[str] = "claim"
    kind: ClassVar[str] = "claim"
    words: ClassVar[type[ClaimStatement]] = ClaimStatement

    type: Literal["countermark/claim/v1"]

    @classmethod
    def make_unsigned(cls, commitment: Commitment, owner: str, root: str, tensors: int) -> Self:
        """Make an unsigned claim with the current date.

        Args:
            commitment: the key's commitment.
            owner: the claimant's name.
            root: the digest of the model, in hexadecimal.
            tensors: the number of tensors that the digest covers.

        Raises:
            ConfigError: an owner or a digest that a claim cannot hold.
        """
        text = make_claim_text(commitment, owner, root, tensors)
        return cls(
            type="countermark/claim/v1", envelope=_make_unsigned_envelope(text), timestamps=()
        )

    @property
    def statement(self) -> ClaimStatement:
        """The statement of the claim."""
        return cast(ClaimStatement, self.parsed_statement)

    @property
    def commitment(self) -> str:
        """The key's commitment, in hexadecimal."""
        return self.statement.predicate.commitment.sha256

    @property
    def owner(self) -> str:
        """The claimant's name, in their own words."""
        return self.statement.predicate.owner

    @property
    def model_root(self) -> str:
        """The digest of the model, in hexadecimal."""
        return self.statement.subject[0].digest.merkleSha256


class TreeHead(_SignedDocument):
    """A tree head of a ledger: the number of claims and the root over them.

    An exported tree head is a checkpoint.

    Attributes:
        envelope: the statement and its signatures.
        timestamps: RFC 3161 responses over the envelope, in base64.
    """

    what: ClassVar[str] = "tree head"
    kind: ClassVar[str] = "tree-head"
    words: ClassVar[type[HeadStatement]] = HeadStatement

    type: Literal["countermark/tree-head/v1"]

    @classmethod
    def make_unsigned(cls, ledger: str, size: int, root: str) -> Self:
        """Make an unsigned tree head with the current date.

        Args:
            ledger: the ledger's identity, in hexadecimal.
            size: the number of claims.
            root: the root over them, in hexadecimal.
        """
        text = make_head_text(ledger, size, root)
        return cls(
            type="countermark/tree-head/v1", envelope=_make_unsigned_envelope(text), timestamps=()
        )

    @property
    def statement(self) -> HeadStatement:
        """The statement about the ledger."""
        return cast(HeadStatement, self.parsed_statement)

    @property
    def size(self) -> int:
        """The number of claims."""
        return self.statement.predicate.size

    @property
    def root(self) -> str:
        """The root over the claims, in hexadecimal."""
        return self.statement.subject[0].digest.merkleSha256


class BundleSignature(_SignedDocument):
    """Signatures over the digests of all files of a bundle.

    Attributes:
        envelope: the statement and its signatures.
        timestamps: always empty.
    """

    what: ClassVar[str] = "bundle"
    kind: ClassVar[str] = "bundle-signature"
    words: ClassVar[type[BundleStatement]] = BundleStatement

    type: Literal["countermark/bundle-signature/v1"]

    @classmethod
    def make_unsigned(cls, digests: Mapping[str, str]) -> Self:
        """Make an unsigned statement about a bundle's files, with the current date.

        Args:
            digests: SHA-256 of each file, in hexadecimal, by the file's name.
        """
        envelope = _make_unsigned_envelope(make_bundle_text(digests))
        return cls(type="countermark/bundle-signature/v1", envelope=envelope, timestamps=())

    @property
    def statement(self) -> BundleStatement:
        """The statement about the bundle's files."""
        return cast(BundleStatement, self.parsed_statement)


def load_signed_document(path: str | Path) -> Claim | TreeHead:
    """Read a claim or a tree head.

    Raises:
        ClaimError: the file is neither.
    """
    try:
        content = files.read_regular(Path(path), LARGEST)
        document = files.parse_json(content)
    except ValueError as error:
        raise make_format_error("a claim or a tree head", str(path), str(error)) from None
    # Without a known type the parser of `Claim` says what is wrong.
    named = document.get("type") if isinstance(document, dict) else None
    kind = TreeHead if named == "countermark/tree-head/v1" else Claim
    return kind.from_bytes(content, str(path))


def _make_unsigned_envelope(text: bytes) -> Envelope:
    """Make an envelope without signatures."""
    return Envelope(payload=_encode_base64(text), payloadType=PAYLOAD_TYPE, signatures=())


def _encode_pae(body: bytes) -> bytes:
    """Return the pre-authentication encoding of DSSE, version 1."""
    # The signature covers the payload's type, so that the bytes cannot pass as another document.
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def _encode_base64(content: bytes) -> str:
    """Encode bytes as base64."""
    return base64.b64encode(content).decode()


def _decode_base64(text: str) -> bytes:
    """Decode base64, of which only the canonical spelling is accepted.

    Raises:
        ValueError: the text is not base64, or not its canonical spelling.
    """
    content = base64.b64decode(text, validate=True)
    # Unused bits at the end of base64 would allow several texts for one signature.
    if _encode_base64(content) != text:
        raise ValueError("base64 with bits behind its end")
    return content
