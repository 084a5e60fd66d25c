"""In-toto Statements of version 1, each with one canonical JSON text (RFC 8785).

A claim states: the owner of this key commitment holds the model of this digest. A tree head states:
the ledger of this identity had this many claims under this root. `docs/format.md`
lists every field.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, TypeVar

import rfc8785
from pydantic import Field, StringConstraints

from countermark._internal import files
from countermark._internal.files import Hex32, StoredDocument
from countermark._version import VERSION
from countermark.errors import ClaimError, ConfigError, make_printable

STATEMENT: Final = "https://in-toto.io/Statement/v1"
CLAIM: Final = "countermark:claim/v1"
HEAD: Final = "countermark:tree-head/v1"
BUNDLE: Final = "countermark:bundle/v1"

Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
# One spelling for each time, always in UTC: the text is signed.
Instant = Annotated[
    str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$")
]
# No model or ledger comes near 2^40 leaves; the bound keeps every inclusion path short.
Count = Annotated[int, Field(ge=1, le=1 << 40)]
_Body = TypeVar("_Body", bound="ClaimStatement | HeadStatement | BundleStatement")


class Commitment(StoredDocument):
    """A key's commitment.

    Attributes:
        kind: C1 if the scheme learnt something after the first commitment, else C0.
        sha256: the commitment in hexadecimal.
    """

    kind: Literal["C0", "C1"]
    sha256: Hex32


class TreeDigest(StoredDocument):
    """The root of a Merkle tree (RFC 9162, SHA-256)."""

    merkleSha256: Hex32  # noqa: N815 - as in-toto spells the names of digests


class ModelSubject(StoredDocument):
    """The marked model, as the subject of a claim."""

    name: Literal["model"]
    digest: TreeDigest


class ClaimPredicate(StoredDocument):
    """The content of a claim about its model.

    Attributes:
        commitment: commitment of the key whose mark is in the model.
        owner: the owner's name, as in the key.
        date: when the claim was made, by the claimant's own clock: a statement, not evidence.
        tensors: the number of leaves of the model's tree.
        nonce: 16 random bytes in hexadecimal, so that two claims never have the same text.
        version: version of the library that wrote the claim.
    """

    commitment: Commitment
    owner: Name
    date: Instant
    tensors: Count
    nonce: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    version: Name


class ClaimStatement(StoredDocument):
    """An in-toto Statement about one model."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    # Exactly one: a claim about two models would be ambiguous.
    subject: tuple[ModelSubject]
    predicateType: Literal["countermark:claim/v1"]  # noqa: N815 - in-toto's spelling
    predicate: ClaimPredicate


class LedgerSubject(StoredDocument):
    """The ledger's claims in their order, as the subject of a tree head."""

    name: Literal["ledger"]
    digest: TreeDigest


class HeadPredicate(StoredDocument):
    """The content of a tree head about its ledger.

    Attributes:
        ledger: the ledger's identity, drawn when the ledger was created.
        size: the number of claims; the root alone does not fix it.
        date: when the head was made, by the operator's own clock.
        version: version of the library that wrote the head.
    """

    ledger: Hex32
    size: Annotated[int, Field(ge=0, le=1 << 40)]
    date: Instant
    version: Name


class HeadStatement(StoredDocument):
    """An in-toto Statement about the claims of a ledger."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[LedgerSubject]
    predicateType: Literal["countermark:tree-head/v1"]  # noqa: N815 - in-toto's spelling
    predicate: HeadPredicate


class FileDigest(StoredDocument):
    """SHA-256 of a file."""

    sha256: Hex32


class FileSubject(StoredDocument):
    """A file of a bundle, as a subject of its signature."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    digest: FileDigest


class BundlePredicate(StoredDocument):
    """The content of a signature about a bundle.

    Attributes:
        date: when the bundle was signed, by the signer's own clock.
        version: version of the library that wrote the signature.
    """

    date: Instant
    version: Name


class BundleStatement(StoredDocument):
    """An in-toto Statement about all files of a bundle."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[tuple[FileSubject, ...], Field(min_length=1, max_length=1000)]
    predicateType: Literal["countermark:bundle/v1"]  # noqa: N815 - in-toto's spelling
    predicate: BundlePredicate

    @property
    def file_digests(self) -> dict[str, str]:
        """SHA-256 of each file, in hexadecimal, by the file's name."""
        return {each.name: each.digest.sha256 for each in self.subject}


def make_claim_text(commitment: Commitment, owner: str, root: str, tensors: int) -> bytes:
    """Make the canonical text of a new claim, with the current date and a fresh nonce.

    Args:
        commitment: the key's commitment.
        owner: the claimant's name.
        root: the digest of the model, in hexadecimal.
        tensors: the number of tensors that the digest covers.

    Raises:
        ConfigError: an owner or a digest that a claim cannot hold.
    """
    predicate = {
        "commitment": commitment.model_dump(),
        "owner": owner,
        "date": format_time(datetime.now(UTC)),
        "tensors": tensors,
        "nonce": os.urandom(16).hex(),
        "version": VERSION,
    }
    subject = [{"name": "model", "digest": {"merkleSha256": root}}]
    return _make_text(ClaimStatement, CLAIM, subject, predicate)


def make_head_text(ledger: str, size: int, root: str) -> bytes:
    """Make the canonical text of a tree head, with the current date."""
    predicate = {
        "ledger": ledger,
        "size": size,
        "date": format_time(datetime.now(UTC)),
        "version": VERSION,
    }
    subject = [{"name": "ledger", "digest": {"merkleSha256": root}}]
    return _make_text(HeadStatement, HEAD, subject, predicate)


def make_bundle_text(digests: Mapping[str, str]) -> bytes:
    """Make the canonical text about the files of a bundle, with the current date.

    Args:
        digests: SHA-256 of each file, in hexadecimal, by the file's name.
    """
    # Sorted, so that equal bundles have equal subjects.
    subject = [{"name": n, "digest": {"sha256": each}} for n, each in sorted(digests.items())]
    predicate = {"date": format_time(datetime.now(UTC)), "version": VERSION}
    return _make_text(BundleStatement, BUNDLE, subject, predicate)


def _make_text(
    kind: type[Any], predicate_type: str, subject: list[dict[str, Any]],
    predicate: dict[str, Any],
) -> bytes:  # fmt: skip
    """Make the canonical text of a statement and check that it can be read back.

    Raises:
        ConfigError: a value that the statement's fields do not accept.
    """
    document: dict[str, Any] = {
        "_type": STATEMENT,
        "subject": subject,
        "predicateType": predicate_type,
        "predicate": predicate,
    }
    try:
        text = rfc8785.dumps(document)
        # Parse the text at once: nobody may sign a statement that no reader accepts.
        files.parse_document(kind, text)
    except (ValueError, UnicodeError) as error:
        why = make_printable(str(error), 200)
        raise ConfigError(
            f"nothing like this can be claimed ({why}): expected other words"
        ) from None
    return text


def parse_statement(kind: type[_Body], text: bytes) -> _Body:
    """Parse a statement from its text, which must be the canonical one.

    A signature is over bytes: two spellings of one claim would be two claims.

    Args:
        kind: the class of the statement.
        text: the text, as it may come from anybody.

    Raises:
        ValueError: the text is another document or is not canonical, or its date is in the future.
    """
    found = files.parse_document(kind, text)
    # `parse_document` accepts any spelling of the right values; here the bytes must be equal.
    if rfc8785.dumps(json.loads(text)) != text:
        raise ValueError("the statement is not in canonical JSON (RFC 8785)")
    # Other clocks may be a little ahead, but no document can come from the future.
    date = parse_time(found.predicate.date)
    require_past(date, "the date of the statement", tolerance=CLOCK_SKEW, error=ValueError)
    return found


def format_time(time: datetime) -> str:
    """Format a time in UTC as ISO 8601, to the second if it has no fraction."""
    return time.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"


def parse_time(text: str) -> datetime:
    """Parse a time that `format_time` wrote.

    Raises:
        ValueError: there is no such time.
    """
    return datetime.fromisoformat(text.removesuffix("Z") + "+00:00")


def current_time() -> datetime:
    """Read this machine's clock."""
    return datetime.now(UTC)


CLOCK_SKEW = timedelta(minutes=5)
"""How far the clock of somebody else may be ahead of this one."""


def require_past(
    time: datetime, what: str, *, tolerance: timedelta = timedelta(),
    error: type[Exception] = ConfigError,
) -> None:  # fmt: skip
    """Refuse a time in the future: nobody can know what will exist by then.

    Args:
        time: the time, with its zone.
        what: what the time belongs to, as the subject of the message.
        tolerance: how far the time may be ahead of this machine's clock.
        error: the exception class to raise.

    Raises:
        ConfigError: or `error`, for a time in the future, or one without a zone.
    """
    if time.tzinfo is None:
        # A time without a zone could be meant hours earlier or later, and decide a case.
        raise error(f"{what} has no zone: expected a time such as 2026-05-31T12:00:00Z")
    now = current_time()
    if time - now > tolerance:
        clock = format_time(now.replace(microsecond=0))
        raise error(
            f"{what}, {format_time(time)}, is in the future: it is {clock} now by this machine's "
            "clock; expected a time that has passed"
        )


def parse_day_or_time(text: str, option: str) -> datetime:
    """Parse a day, which means its first moment in UTC, or a time with its zone.

    Args:
        text: the value.
        option: name of the option in messages.

    Raises:
        ConfigError: the text is neither a day nor a time with its zone.
    """
    try:
        # `fromisoformat` alone would read a day as a time without a zone.
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return parse_time(f"{text}T00:00:00Z")
        found = datetime.fromisoformat(text)
        if found.tzinfo is not None and abs(found.utcoffset() or timedelta()) < timedelta(days=1):
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(
        f"{option} is {make_printable(text, 80)!r}: expected a day such as 2026-05-31, which is its "
        "first moment in UTC, or a time with its zone such as 2026-05-31T12:00:00+02:00"
    )


def make_format_error(what: str, where: str, why: str) -> ClaimError:
    """Make the error for a file that is not the expected document.

    Args:
        what: the expected document.
        where: name of the file.
        why: the reason, which may quote the file.
    """
    # The reason may quote a hostile file: `make_printable` escapes control characters.
    return ClaimError(f"{where}: {make_printable(why, 300)}; expected {what}")
