"""RFC 3161 time stamps: an authority's signed word that bytes of this digest existed at a time.

Nobody is believed by default. A stamp counts when the chain of its signer ends in a root that the
examiner pinned, at the time of the stamp; whether a certificate was withdrawn is not asked. Parsing
and signatures are those of rfc3161-client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.claims.signed import Claim, TreeHead
from countermark.claims.signing import load_certificates
from countermark.claims.statement import CLOCK_SKEW, instant, require_past
from countermark.errors import ClaimError, MissingExtraError, printable

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

LARGEST_RESPONSE = 1 << 16  # bytes
_PATIENCE, OK = 30, 200  # seconds; HTTP
MEDIA_TYPE = "application/timestamp-query"


@dataclass(frozen=True)
class Stamp:
    """What a time stamp says, whoever signed it.

    Attributes:
        time: when, by the authority's clock.
        accuracy: by how much it may be wrong, as the authority states.
        signer: issuer and serial number of the certificate that signed.
    """

    time: datetime
    accuracy: timedelta
    signer: tuple[str, int]

    @property
    def latest(self) -> datetime:
        """The latest time that this stamp allows for: what was stamped is older.

        rfc3161-client leaves out fractions of a second.
        """
        return self.time + self.accuracy + timedelta(seconds=1)

    @property
    def soonest(self) -> datetime:
        """The earliest time at which this stamp can have been made."""
        return self.time - self.accuracy


@dataclass(frozen=True)
class Authority:
    """A time-stamping authority that an examiner pinned: its root, perhaps its own certificate.

    Attributes:
        name: subject of the pinned certificate that is nearest to the signer.
        roots: self-signed certificates; a chain must end in one.
        between: certificates of authorities below them.
        leaf: the one certificate that may sign, where it was pinned as well.
    """

    name: str
    roots: tuple[Certificate, ...] = field(repr=False)
    between: tuple[Certificate, ...] = field(repr=False, default=())
    leaf: Certificate | None = field(repr=False, default=None)

    @classmethod
    def load(cls, path: str | Path) -> Authority:
        """The certificates of a PEM file: one root at least, and at most one that is no authority.

        Raises:
            ClaimError: no certificate, no root, or several that could sign.
        """
        try:
            return cls._of(load_certificates(Path(path)), path)
        except ClaimError:
            raise
        except Exception as error:  # a damaged certificate raises half a dozen kinds, late
            raise ClaimError(
                f"{path} holds a certificate that cannot be used ({printable(str(error), 120)}): "
                "obtain it again from the authority"
            ) from None

    @classmethod
    def _of(cls, loaded: list[Certificate], path: str | Path) -> Authority:
        roots = [each for each in loaded if each.subject == each.issuer]
        others = [each for each in loaded if each.subject != each.issuer]
        leaves = [each for each in others if not _may_issue(each)]
        if not roots or len(leaves) > 1:
            raise ClaimError(
                f"{path} holds {len(roots)} roots and {len(leaves)} signers: expected a "
                "self-signed root, and at most one certificate of a signer below it"
            )
        between = [each for each in others if _may_issue(each)]
        nearest = (*leaves, *roots)[0]
        leaf = leaves[0] if leaves else None
        made = cls(
            printable(nearest.subject.rfc4514_string(), 200), tuple(roots), tuple(between), leaf
        )
        made.certified()  # now, if one has a key of no kind that is known
        return made

    def confirms(self, response: bytes, message: bytes) -> str | None:
        """None when a stamp over the message is of this authority; else why it is not."""
        client = _client()
        verifier = client.VerifierBuilder(
            roots=list(self.roots), intermediates=list(self.between), tsa_certificate=self.leaf
        ).build()
        try:
            verifier.verify_message(client.decode_timestamp_response(response), message)
        except Exception as error:  # as above: whatever a hostile response raises is no stamp
            return printable(str(error), 200) or "it cannot be verified"
        return None

    def certified(self) -> list[Any]:
        """The public keys of all pinned certificates."""
        kept = (*self.roots, *self.between, *((self.leaf,) if self.leaf else ()))
        return [each.public_key() for each in kept]


@dataclass(frozen=True)
class Confirmed:
    """A stamp that a pinned authority signed."""

    stamp: Stamp
    authority: Authority

    def to_json(self) -> dict[str, str]:
        """Authority, time, and the latest time that its accuracy allows for."""
        return {
            "authority": self.authority.name,
            "time": instant(self.stamp.time),
            "latest": instant(self.stamp.latest),
        }


def request_for(document: Claim | TreeHead) -> bytes:
    """A request (DER) to stamp a document with its signatures, for any RFC 3161 authority.

    Raises:
        MissingExtraError: rfc3161-client is not installed.
    """
    client = _client()
    builder = client.TimestampRequestBuilder().data(document.stamped_bytes)
    builder = builder.hash_algorithm(client.HashAlgorithm.SHA256).cert_request(cert_request=True)
    made: bytes = builder.build().as_bytes()
    return made


def read(response: bytes, document: Claim | TreeHead) -> Stamp:
    """What a response says, once it is certain that it is about this document.

    Raises:
        ClaimError: no granted stamp, one of something else, or a time in the future.
    """
    client = _client()
    if len(response) > LARGEST_RESPONSE:
        raise ClaimError(f"a time stamp has {len(response):,} bytes: expected at most 65,536")
    try:
        decoded = client.decode_timestamp_response(response)
        info = decoded.tst_info
        (signer,) = decoded.signed_data.signer_infos
        found = Stamp(
            info.gen_time.astimezone(UTC), _accuracy(info),
            (signer.issuer.rfc4514_string(), signer.serial_number),
        )  # fmt: skip
        _ = found.latest, found.soonest  # there is no year 10,000, and no year 0
        imprint = info.message_imprint
        named = client.digests[imprint.hash_algorithm.dotted_string]
    except Exception as error:  # a hostile response raises half a dozen kinds
        raise ClaimError(
            f"this is no time stamp that was granted ({printable(str(error), 120)}): expected an "
            "RFC 3161 response over SHA-256, SHA-384 or SHA-512"
        ) from None
    require_past(
        found.soonest, "the time of the time stamp", tolerance=CLOCK_SKEW, error=ClaimError
    )
    if imprint.message != hashlib.new(named, document.stamped_bytes).digest():
        raise ClaimError(
            f"the time stamp is of something else than this {document.what} with these signatures: "
            "it was made for another one, or this one was changed since"
        )
    return found


def confirmed(document: Claim | TreeHead, authorities: Sequence[Authority]) -> list[Confirmed]:
    """The stamps of a document that pinned authorities signed, earliest first.

    An authority counts once, and so does a signer that several pinned roots stand for. Whoever
    stamps with a key of a signer of the document stamps for himself: that does not count.

    Raises:
        ClaimError: a stamp that is of something else.
    """
    own = {bytes.fromhex(each) for each in document.signers}
    trusted = [each for each in authorities if not own & set(map(_raw, each.certified()))]
    stamps = [(read(each, document), each) for each in document.stamps]
    found: list[Confirmed] = []
    for stamp, response in sorted(stamps, key=lambda each: each[0].latest):
        signers = {each.stamp.signer for each in found}
        free = [each for each in trusted if each not in [known.authority for known in found]]
        for authority in free if stamp.signer not in signers else []:
            if authority.confirms(response, document.stamped_bytes) is None:
                found.append(Confirmed(stamp, authority))
                break
    return found


def ask(url: str, request: bytes) -> bytes:
    """Ask an authority by HTTP (RFC 3161, section 3.4) for a response in DER.

    Raises:
        ClaimError: it does not answer, or not with a response of at most 64 KiB.
        MissingExtraError: httpx2 is not installed.
    """
    try:
        import httpx2
    except ImportError:
        raise MissingExtraError("asking an authority", "evidence") from None

    found = bytearray()
    try:
        with httpx2.stream(
            "POST", url, content=request, headers={"Content-Type": MEDIA_TYPE}, timeout=_PATIENCE
        ) as answer:
            for piece in answer.iter_raw():
                found += piece
                if len(found) > LARGEST_RESPONSE:
                    break
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise ClaimError(f"{url} does not answer: {printable(str(error), 200)}") from None
    if answer.status_code != OK or not 0 < len(found) <= LARGEST_RESPONSE:
        raise ClaimError(
            f"{url} answers {answer.status_code} with {len(found):,} bytes: expected an RFC 3161 "
            "response"
        )
    return bytes(found)


def _may_issue(certificate: Certificate) -> bool:
    from cryptography.x509 import BasicConstraints, ExtensionNotFound

    try:
        return certificate.extensions.get_extension_for_class(BasicConstraints).value.ca
    except ExtensionNotFound:
        return False


def _accuracy(info: Any) -> timedelta:
    """What an authority states of its clock; nothing stated is nothing added."""
    stated = info.accuracy
    if stated is None:
        return timedelta()
    parts = {"seconds": stated.seconds, "milliseconds": stated.millis}
    return timedelta(
        **{name: value or 0 for name, value in parts.items()}, microseconds=stated.micros or 0
    )


def _raw(public: Any) -> bytes:
    """The 32 bytes of an Ed25519 key; nothing of another kind."""
    raw = getattr(public, "public_bytes_raw", None)
    return b"" if raw is None else bytes(raw())


class _Client:
    """The names of rfc3161-client that are used here."""

    def __init__(self) -> None:
        import rfc3161_client as library
        from rfc3161_client import verify

        self.TimestampRequestBuilder = library.TimestampRequestBuilder
        self.HashAlgorithm = library.HashAlgorithm
        self.VerifierBuilder = library.VerifierBuilder
        self.VerificationError = library.VerificationError
        self.decode_timestamp_response = library.decode_timestamp_response
        self.digests = {
            verify.SHA256_OID: "sha256",
            verify.SHA384_OID: "sha384",
            verify.SHA512_OID: "sha512",
        }


def _client() -> _Client:
    try:
        return _Client()
    except ImportError:
        raise MissingExtraError("a time stamp", "evidence") from None
