"""RFC 3161 timestamps: an authority's signed statement that bytes of a digest existed at a time.

No authority is trusted by default. A timestamp counts if the certificate chain of its signer ends,
at the time of the timestamp, in a root that the examiner pinned. Revocation of certificates is not
checked. Parsing and signature checks are those of rfc3161-client.
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
from countermark.claims.statement import CLOCK_SKEW, format_time, require_past
from countermark.errors import ClaimError, MissingExtraError, make_printable

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

LARGEST_RESPONSE = 1 << 16  # bytes; room for a timestamp with its certificates
_PATIENCE, OK = 30, 200  # timeout in seconds; HTTP status
MEDIA_TYPE = "application/timestamp-query"


@dataclass(frozen=True)
class Timestamp:
    """The content of a timestamp, whoever signed it.

    Attributes:
        time: the time by the authority's clock.
        accuracy: by how much the time may be wrong, as the authority states.
        signer: issuer and serial number of the signing certificate.
    """

    time: datetime
    accuracy: timedelta
    signer: tuple[str, int]

    @property
    def latest_time(self) -> datetime:
        """The latest time that this timestamp allows: the timestamped document is older.

        rfc3161-client drops fractions of a second, hence the added second.
        """
        return self.time + self.accuracy + timedelta(seconds=1)

    @property
    def earliest_time(self) -> datetime:
        """The earliest time at which this timestamp can have been made."""
        return self.time - self.accuracy


@dataclass(frozen=True)
class Authority:
    """A time-stamping authority that an examiner pinned: its root, and perhaps its own certificate.

    Attributes:
        name: subject of the pinned certificate that is nearest to the signer.
        roots: self-signed certificates; a chain must end in one of them.
        between: certificates of authorities below the roots.
        leaf: the only certificate that may sign, if it was pinned; else None.
    """

    name: str
    roots: tuple[Certificate, ...] = field(repr=False)
    between: tuple[Certificate, ...] = field(repr=False, default=())
    leaf: Certificate | None = field(repr=False, default=None)

    @classmethod
    def load(cls, path: str | Path) -> Authority:
        """Load a PEM file: one or more roots, intermediates, and at most one signer's certificate.

        Raises:
            ClaimError: the file holds no certificate, no root, or several that could sign.
        """
        try:
            return cls._from_certificates(load_certificates(Path(path)), path)
        except ClaimError:
            raise
        except Exception as error:  # a damaged certificate can raise anything, late
            raise ClaimError(
                f"{path} holds a certificate that cannot be used ({make_printable(str(error), 120)}): "
                "obtain it again from the authority"
            ) from None

    @classmethod
    def _from_certificates(cls, loaded: list[Certificate], path: str | Path) -> Authority:
        """Sort certificates into roots, intermediates and signer, and check them."""
        # The names decide, not the signature: the examiner trusts everything in this file anyway.
        roots = [each for each in loaded if each.subject == each.issuer]
        others = [each for each in loaded if each.subject != each.issuer]
        # A certificate that may issue others is an intermediate; any other one below a root signs.
        leaves = [each for each in others if not _is_issuer(each)]
        if not roots or len(leaves) > 1:
            raise ClaimError(
                f"{path} holds {len(roots)} roots and {len(leaves)} signers: expected a "
                "self-signed root, and at most one certificate of a signer below it"
            )
        between = [each for each in others if _is_issuer(each)]
        nearest = (*leaves, *roots)[0]
        leaf = leaves[0] if leaves else None
        made = cls(
            make_printable(nearest.subject.rfc4514_string(), 200),
            tuple(roots),
            tuple(between),
            leaf,
        )
        made.list_public_keys()  # raises now for a key of an unknown kind
        return made

    def explain_rejection(self, response: bytes, message: bytes) -> str | None:
        """Return why a timestamp over a message is not by this authority; None if it is.

        Args:
            response: an RFC 3161 response in DER.
            message: the timestamped bytes.
        """
        client = _load_library()
        verifier = client.VerifierBuilder(
            roots=list(self.roots), intermediates=list(self.between), tsa_certificate=self.leaf
        ).build()
        try:
            verifier.verify_message(client.decode_timestamp_response(response), message)
        except Exception as error:  # a hostile response can raise anything
            return make_printable(str(error), 200) or "it cannot be verified"
        return None

    def list_public_keys(self) -> list[Any]:
        """Return the public keys of all pinned certificates."""
        kept = (*self.roots, *self.between, *((self.leaf,) if self.leaf else ()))
        return [each.public_key() for each in kept]


@dataclass(frozen=True)
class ConfirmedTimestamp:
    """A timestamp that a pinned authority signed.

    Attributes:
        stamp: the timestamp.
        authority: the authority.
    """

    stamp: Timestamp
    authority: Authority

    def to_json(self) -> dict[str, str]:
        """Return the authority, the time, and the latest time that the accuracy allows."""
        return {
            "authority": self.authority.name,
            "time": format_time(self.stamp.time),
            "latest": format_time(self.stamp.latest_time),
        }


def make_request(document: Claim | TreeHead) -> bytes:
    """Make a request (DER) to timestamp a document with its signatures, for any RFC 3161 authority.

    Raises:
        MissingExtraError: rfc3161-client is not installed.
    """
    client = _load_library()
    builder = client.TimestampRequestBuilder().data(document.envelope_bytes)
    builder = builder.hash_algorithm(client.HashAlgorithm.SHA256).cert_request(cert_request=True)
    made: bytes = builder.build().as_bytes()
    return made


def read_response(response: bytes, document: Claim | TreeHead) -> Timestamp:
    """Read the timestamp out of a response and check that it is over this document.

    Args:
        response: an RFC 3161 response in DER, as hostile input.
        document: the document with its signatures.

    Raises:
        ClaimError: no timestamp was granted, it is over something else, or it is in the future.
    """
    client = _load_library()
    # Bound the size before the parser sees a hostile response.
    if len(response) > LARGEST_RESPONSE:
        raise ClaimError(f"a time stamp has {len(response):,} bytes: expected at most 65,536")
    try:
        decoded = client.decode_timestamp_response(response)
        info = decoded.tst_info
        # Exactly one signer, as RFC 3161, section 2.4.2, requires.
        (signer,) = decoded.signed_data.signer_infos
        found = Timestamp(
            info.gen_time.astimezone(UTC), _read_accuracy(info),
            (signer.issuer.rfc4514_string(), signer.serial_number),
        )  # fmt: skip
        _ = found.latest_time, found.earliest_time  # overflows for times near year 1 or 9999
        imprint = info.message_imprint
        # Raises KeyError for a digest other than SHA-256, SHA-384 or SHA-512.
        named = client.digests[imprint.hash_algorithm.dotted_string]
    except Exception as error:  # a hostile response can raise anything
        raise ClaimError(
            f"this is no time stamp that was granted ({make_printable(str(error), 120)}): expected an "
            "RFC 3161 response over SHA-256, SHA-384 or SHA-512"
        ) from None
    require_past(
        found.earliest_time, "the time of the time stamp", tolerance=CLOCK_SKEW, error=ClaimError
    )
    if imprint.message != hashlib.new(named, document.envelope_bytes).digest():
        raise ClaimError(
            f"the time stamp is of something else than this {document.what} with these signatures: "
            "it was made for another one, or this one was changed since"
        )
    return found


def find_confirmed_timestamps(
    document: Claim | TreeHead, authorities: Sequence[Authority]
) -> list[ConfirmedTimestamp]:
    """Find the timestamps of a document that pinned authorities signed, earliest first.

    An authority counts once, and so does a signer that several pinned roots certify. An authority
    whose key also signed the document does not count: its owner would confirm their own claim.

    Raises:
        ClaimError: a timestamp is over something else.
    """
    # Signers of documents are Ed25519 keys, so only an authority's Ed25519 keys can be among them.
    own = {bytes.fromhex(each) for each in document.signers}
    trusted = [
        each for each in authorities if not own & set(map(_encode_raw_key, each.list_public_keys()))
    ]
    stamps = [(read_response(each, document), each) for each in document.timestamp_responses]
    found: list[ConfirmedTimestamp] = []
    # Earliest first: the first timestamp of each authority and signer is kept.
    for stamp, response in sorted(stamps, key=lambda each: each[0].latest_time):
        signers = {each.stamp.signer for each in found}
        free = [each for each in trusted if each not in [known.authority for known in found]]
        for authority in free if stamp.signer not in signers else []:
            if authority.explain_rejection(response, document.envelope_bytes) is None:
                found.append(ConfirmedTimestamp(stamp, authority))
                break
    return found


def request_timestamp(url: str, request: bytes) -> bytes:
    """Send a request to an authority over HTTP (RFC 3161, section 3.4); return its response, DER.

    Raises:
        ClaimError: the authority does not answer, or its answer is no response of at most 64 KiB.
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
            # Read at most the bound: a hostile server could send without end.
            for piece in answer.iter_raw():
                found += piece
                if len(found) > LARGEST_RESPONSE:
                    break
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise ClaimError(f"{url} does not answer: {make_printable(str(error), 200)}") from None
    if answer.status_code != OK or not 0 < len(found) <= LARGEST_RESPONSE:
        raise ClaimError(
            f"{url} answers {answer.status_code} with {len(found):,} bytes: expected an RFC 3161 "
            "response"
        )
    return bytes(found)


def _is_issuer(certificate: Certificate) -> bool:
    """Return true if a certificate may issue others (basic constraint CA)."""
    from cryptography.x509 import BasicConstraints, ExtensionNotFound

    try:
        return certificate.extensions.get_extension_for_class(BasicConstraints).value.ca
    except ExtensionNotFound:
        return False


def _read_accuracy(info: Any) -> timedelta:
    """Return the accuracy that an authority states for its clock; zero if it states none."""
    # RFC 3161, section 2.4.2: a missing accuracy says nothing, so nothing is added.
    stated = info.accuracy
    if stated is None:
        return timedelta()
    parts = {"seconds": stated.seconds, "milliseconds": stated.millis}
    return timedelta(
        **{name: value or 0 for name, value in parts.items()}, microseconds=stated.micros or 0
    )


def _encode_raw_key(public: Any) -> bytes:
    """Return the 32 bytes of an Ed25519 public key; empty bytes for a key of another kind."""
    raw = getattr(public, "public_bytes_raw", None)
    return b"" if raw is None else bytes(raw())


class _TimestampLibrary:
    """The names of rfc3161-client that this module uses."""

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


def _load_library() -> _TimestampLibrary:
    """Import rfc3161-client, or raise `MissingExtraError`."""
    try:
        return _TimestampLibrary()
    except ImportError:
        raise MissingExtraError("a time stamp", "evidence") from None
