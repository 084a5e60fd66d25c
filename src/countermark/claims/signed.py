"""The file: a statement in a DSSE envelope, who signed it, and time stamps over both.

    PAE       = "DSSEv1" SP len(type) SP type SP len(body) SP body          what is signed
    envelope  = canonical JSON {"payload", "payloadType", "signatures"}     what is stamped
    digest    = SHA-256(envelope)                                           what a claim is called

A stamp is over the signatures as well: whoever signs the same words later has another envelope,
and no stamp. The key that a signature names is its public key itself; who that is, a policy says.
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

from countermark import files
from countermark.claims import signing
from countermark.claims.statement import (
    BundleStatement,
    ClaimStatement,
    Commitment,
    HeadStatement,
    bundle_text,
    claim_text,
    head_text,
    not_a,
    parsed,
)
from countermark.errors import ClaimError, ConfigError
from countermark.files import Hex32, Stored
from countermark.places import write_new

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
LARGEST = 1 << 20  # bytes of a file
_MOST = 16  # signatures, and stamps
_STAMP = 1 << 17  # base64 digits of a stamp
Base64 = Annotated[str, Field(max_length=_STAMP)]


class Signature(Stored):
    """A signature: `keyid` is the public key (32 bytes in hexadecimal), `sig` base64."""

    keyid: Hex32
    sig: Base64


class Envelope(Stored):
    """A DSSE envelope (version 1) without fields of its own."""

    payload: Base64
    payloadType: Literal["application/vnd.in-toto+json"]  # noqa: N815 - DSSE's spelling
    signatures: Annotated[tuple[Signature, ...], Field(max_length=_MOST)]


class _Signed(Stored):
    """What claims and tree heads share."""

    what: ClassVar[str]
    kind: ClassVar[str]
    words: ClassVar[type[ClaimStatement] | type[HeadStatement] | type[BundleStatement]]

    envelope: Envelope
    timestamps: Annotated[tuple[Base64, ...], Field(max_length=_MOST)]

    @cached_property
    def said(self) -> ClaimStatement | HeadStatement | BundleStatement:
        """The statement, read from its text."""
        return parsed(self.words, self.payload)

    @cached_property
    def payload(self) -> bytes:
        """The statement's text."""
        return _plain(self.envelope.payload)

    @cached_property
    def stamped_bytes(self) -> bytes:
        """The envelope as it is stamped: canonical JSON."""
        return rfc8785.dumps(self.envelope.model_dump())

    @property
    def digest(self) -> str:
        """SHA-256 of the envelope, in hexadecimal: what this document is called."""
        return hashlib.sha256(self.stamped_bytes).hexdigest()

    @property
    def signers(self) -> tuple[str, ...]:
        """The public keys that signed, in hexadecimal; `check` says whether they did."""
        return tuple(each.keyid for each in self.envelope.signatures)

    @property
    def stamps(self) -> tuple[bytes, ...]:
        """The time stamps: RFC 3161 responses in DER."""
        return tuple(_plain(each) for each in self.timestamps)

    def check(self) -> None:
        """Find every signature to be one.

        Raises:
            ClaimError: nobody signed, somebody twice, or a signature is not by its key over this
                statement.
        """
        if not self.signers:
            raise ClaimError(f"nobody signed this {self.what}: expected it from `claim sign`")
        if len(set(self.signers)) < len(self.signers):
            raise ClaimError(f"one key signed this {self.what} twice: expected each once")
        message = _pae(self.payload)
        for each in self.envelope.signatures:
            if not signing.verified(each.keyid, _plain(each.sig), message):
                raise ClaimError(
                    f"the signature of {each.keyid} is not over this {self.what}: it was changed "
                    "after it was signed, or the signature belongs to another one"
                )

    def signed(self, private: Ed25519PrivateKey) -> Self:
        """The same with one signature more.

        Raises:
            ConfigError: this key signed before, or there are stamps, which would be over less.
        """
        keyid = signing.key_id(private.public_key())
        if keyid in self.signers:
            raise ConfigError(f"{keyid} signed this {self.what} already: expected another key")
        if self.timestamps:
            raise ConfigError(
                f"this {self.what} is stamped, and a stamp is over the signatures: sign first"
            )
        made = Signature(keyid=keyid, sig=_coded(private.sign(_pae(self.payload))))
        signatures = (*self.envelope.signatures, made)
        envelope = self.envelope.model_copy(update={"signatures": signatures})
        return type(self).model_validate(self.model_dump() | {"envelope": envelope.model_dump()})

    def stamped(self, response: bytes) -> Self:
        """The same with one time stamp more; `timestamp.read` says whether it is one."""
        stamps = (*self.timestamps, _coded(response))
        return type(self).model_validate(self.model_dump() | {"timestamps": stamps})

    def with_stamps_of(self, other: Self) -> Self:
        """The same with the stamps of another copy of it, too.

        Raises:
            ClaimError: they are too many together.
        """
        stamps = tuple(dict.fromkeys((*self.timestamps, *other.timestamps)))
        if len(stamps) > _MOST:
            raise ClaimError(f"this {self.what} has {len(stamps)} stamps: expected at most {_MOST}")
        return type(self).model_validate(self.model_dump() | {"timestamps": stamps})

    def to_bytes(self) -> bytes:
        """The file: canonical JSON (RFC 8785) and a line end."""
        return rfc8785.dumps(self.model_dump()) + b"\n"

    def save(self, path: str | Path, *, replace: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            ConfigError: something already has that name, and it is not to be replaced.
        """
        if replace:
            files.write_bytes(Path(path), self.to_bytes())
        else:
            write_new(path, self.to_bytes())

    @classmethod
    def from_bytes(cls, content: bytes, where: str = "it") -> Self:
        """A document that anybody may have written; `check` says who signed it.

        Raises:
            ClaimError: no such document, another version, or a field that is unknown, missing or
                wrong; says which.
        """
        try:
            found = files.parse_as(cls, content)
            if found.to_bytes().rstrip(b"\n") != content.rstrip(b"\n"):
                raise ValueError("it is not in canonical JSON (RFC 8785)")
            found.require()
        except ValueError as error:
            expected = f"a file of type countermark/{cls.kind}/v1"
            raise not_a(expected, where, str(error)) from None
        return found

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file; see `from_bytes`."""
        try:
            content = files.read_regular(Path(path), LARGEST)
        except ValueError as error:
            raise not_a(
                f"a file of type countermark/{cls.kind}/v1", str(path), str(error)
            ) from None
        return cls.from_bytes(content, str(path))

    def require(self) -> None:
        """Raise `ValueError` unless the statement and every base64 can be read."""
        _ = self.said
        for each in (*self.timestamps, *(each.sig for each in self.envelope.signatures)):
            _plain(each)


class Claim(_Signed):
    """A claim: this owner, by this key commitment, has this model.

    Attributes:
        envelope: the statement and its signatures.
        timestamps: RFC 3161 responses over them, in base64.
    """

    what: ClassVar[str] = "claim"
    kind: ClassVar[str] = "claim"
    words: ClassVar[type[ClaimStatement]] = ClaimStatement

    type: Literal["countermark/claim/v1"]

    @classmethod
    def new(cls, commitment: Commitment, owner: str, root: str, tensors: int) -> Self:
        """A claim that nobody has signed yet, dated now.

        Raises:
            ConfigError: an owner or a digest that no claim can bear.
        """
        text = claim_text(commitment, owner, root, tensors)
        return cls(type="countermark/claim/v1", envelope=_unsigned(text), timestamps=())

    @property
    def statement(self) -> ClaimStatement:
        """What is claimed."""
        return cast(ClaimStatement, self.said)

    @property
    def commitment(self) -> str:
        """The key's commitment, in hexadecimal."""
        return self.statement.predicate.commitment.sha256

    @property
    def owner(self) -> str:
        """Who claims, in his own words."""
        return self.statement.predicate.owner

    @property
    def model_root(self) -> str:
        """The digest of the model, in hexadecimal."""
        return self.statement.subject[0].digest.merkleSha256


class TreeHead(_Signed):
    """A tree head of a ledger: so many claims, and the root over them. Exported, a checkpoint.

    Attributes:
        envelope: the statement and its signatures.
        timestamps: RFC 3161 responses over them, in base64.
    """

    what: ClassVar[str] = "tree head"
    kind: ClassVar[str] = "tree-head"
    words: ClassVar[type[HeadStatement]] = HeadStatement

    type: Literal["countermark/tree-head/v1"]

    @classmethod
    def new(cls, ledger: str, size: int, root: str) -> Self:
        """A tree head that nobody has signed yet, dated now."""
        text = head_text(ledger, size, root)
        return cls(type="countermark/tree-head/v1", envelope=_unsigned(text), timestamps=())

    @property
    def statement(self) -> HeadStatement:
        """What is said of the ledger."""
        return cast(HeadStatement, self.said)

    @property
    def size(self) -> int:
        """How many claims."""
        return self.statement.predicate.size

    @property
    def root(self) -> str:
        """The root over them, in hexadecimal."""
        return self.statement.subject[0].digest.merkleSha256


class BundleSignature(_Signed):
    """Signatures over the digests of all files of a bundle.

    Attributes:
        envelope: the statement and its signatures.
        timestamps: none; there is nothing to stamp.
    """

    what: ClassVar[str] = "bundle"
    kind: ClassVar[str] = "bundle-signature"
    words: ClassVar[type[BundleStatement]] = BundleStatement

    type: Literal["countermark/bundle-signature/v1"]

    @classmethod
    def new(cls, digests: Mapping[str, str]) -> Self:
        """Make a statement that nobody has signed yet, dated now.

        Args:
            digests: SHA-256 of each file, in hexadecimal, by its name.
        """
        envelope = _unsigned(bundle_text(digests))
        return cls(type="countermark/bundle-signature/v1", envelope=envelope, timestamps=())

    @property
    def statement(self) -> BundleStatement:
        """What is said of the files."""
        return cast(BundleStatement, self.said)


def load_signed(path: str | Path) -> Claim | TreeHead:
    """Read a claim or a tree head.

    Raises:
        ClaimError: it is neither.
    """
    try:
        content = files.read_regular(Path(path), LARGEST)
        document = files.parse_json(content)
    except ValueError as error:
        raise not_a("a claim or a tree head", str(path), str(error)) from None
    named = document.get("type") if isinstance(document, dict) else None
    kind = TreeHead if named == "countermark/tree-head/v1" else Claim
    return kind.from_bytes(content, str(path))


def _unsigned(text: bytes) -> Envelope:
    return Envelope(payload=_coded(text), payloadType=PAYLOAD_TYPE, signatures=())


def _pae(body: bytes) -> bytes:
    """The pre-authentication encoding of DSSE, version 1."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def _coded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _plain(text: str) -> bytes:
    """Bytes out of base64, of which only one spelling is read."""
    content = base64.b64decode(text, validate=True)
    if _coded(content) != text:
        raise ValueError("base64 with bits behind its end")
    return content
