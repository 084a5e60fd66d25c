"""What is said: in-toto Statements of version 1, each with one canonical JSON text (RFC 8785).

A claim says: the owner of this key commitment holds the model of this digest. A tree head says: the
ledger of this name had so many claims, and this root. `docs/format.md` has every field.
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

from countermark import files
from countermark._version import VERSION
from countermark.errors import ClaimError, ConfigError, printable
from countermark.files import Hex32, Stored

STATEMENT: Final = "https://in-toto.io/Statement/v1"
CLAIM: Final = "countermark:claim/v1"
HEAD: Final = "countermark:tree-head/v1"
BUNDLE: Final = "countermark:bundle/v1"

Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Instant = Annotated[
    str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$")
]
Count = Annotated[int, Field(ge=1, le=1 << 40)]
_Body = TypeVar("_Body", bound="ClaimStatement | HeadStatement | BundleStatement")


class Commitment(Stored):
    """A key's commitment: C1 where something was learnt, else C0."""

    kind: Literal["C0", "C1"]
    sha256: Hex32


class TreeDigest(Stored):
    """The root of a Merkle tree (RFC 9162, SHA-256)."""

    merkleSha256: Hex32  # noqa: N815 - as in-toto spells the names of digests


class ModelSubject(Stored):
    """The marked model."""

    name: Literal["model"]
    digest: TreeDigest


class ClaimPredicate(Stored):
    """What a claim says of its model.

    Attributes:
        commitment: of the key whose mark is in the model.
        owner: as in the key.
        date: when the claim was made, by the claimant's own clock: a statement, no evidence.
        tensors: how many leaves the model's tree has.
        nonce: 16 random bytes, so that two claims are never one.
        version: of the library that wrote it.
    """

    commitment: Commitment
    owner: Name
    date: Instant
    tensors: Count
    nonce: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    version: Name


class ClaimStatement(Stored):
    """An in-toto Statement about one model."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[ModelSubject]
    predicateType: Literal["countermark:claim/v1"]  # noqa: N815 - in-toto's spelling
    predicate: ClaimPredicate


class LedgerSubject(Stored):
    """The ledger's claims, in their order."""

    name: Literal["ledger"]
    digest: TreeDigest


class HeadPredicate(Stored):
    """What a tree head says of its ledger.

    Attributes:
        ledger: the ledger's identity, drawn when it was made.
        size: how many claims it had; the root does not fix their number.
        date: when, by the operator's own clock.
        version: of the library that wrote it.
    """

    ledger: Hex32
    size: Annotated[int, Field(ge=0, le=1 << 40)]
    date: Instant
    version: Name


class HeadStatement(Stored):
    """An in-toto Statement about the claims of a ledger."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[LedgerSubject]
    predicateType: Literal["countermark:tree-head/v1"]  # noqa: N815 - in-toto's spelling
    predicate: HeadPredicate


class FileDigest(Stored):
    """SHA-256 of a file."""

    sha256: Hex32


class FileSubject(Stored):
    """A file of a bundle."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    digest: FileDigest


class BundlePredicate(Stored):
    """What a signer says of a bundle.

    Attributes:
        date: when it was signed, by the signer's own clock.
        version: of the library that wrote it.
    """

    date: Instant
    version: Name


class BundleStatement(Stored):
    """An in-toto Statement about all files of a bundle."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[tuple[FileSubject, ...], Field(min_length=1, max_length=1000)]
    predicateType: Literal["countermark:bundle/v1"]  # noqa: N815 - in-toto's spelling
    predicate: BundlePredicate

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file, in hexadecimal, by its name."""
        return {each.name: each.digest.sha256 for each in self.subject}


def claim_text(commitment: Commitment, owner: str, root: str, tensors: int) -> bytes:
    """The canonical text of a new claim, dated now and with a fresh nonce.

    Raises:
        ConfigError: an owner or a digest that no claim can bear.
    """
    predicate = {
        "commitment": commitment.model_dump(),
        "owner": owner,
        "date": instant(datetime.now(UTC)),
        "tensors": tensors,
        "nonce": os.urandom(16).hex(),
        "version": VERSION,
    }
    subject = [{"name": "model", "digest": {"merkleSha256": root}}]
    return _text(ClaimStatement, CLAIM, subject, predicate)


def head_text(ledger: str, size: int, root: str) -> bytes:
    """The canonical text of a tree head, dated now."""
    predicate = {
        "ledger": ledger,
        "size": size,
        "date": instant(datetime.now(UTC)),
        "version": VERSION,
    }
    subject = [{"name": "ledger", "digest": {"merkleSha256": root}}]
    return _text(HeadStatement, HEAD, subject, predicate)


def bundle_text(digests: Mapping[str, str]) -> bytes:
    """The canonical text about the files of a bundle, dated now.

    Args:
        digests: SHA-256 of each file, in hexadecimal, by its name.
    """
    subject = [{"name": n, "digest": {"sha256": each}} for n, each in sorted(digests.items())]
    predicate = {"date": instant(datetime.now(UTC)), "version": VERSION}
    return _text(BundleStatement, BUNDLE, subject, predicate)


def _text(
    kind: type[Any], predicate_type: str, subject: list[dict[str, Any]],
    predicate: dict[str, Any],
) -> bytes:  # fmt: skip
    document: dict[str, Any] = {
        "_type": STATEMENT,
        "subject": subject,
        "predicateType": predicate_type,
        "predicate": predicate,
    }
    try:
        text = rfc8785.dumps(document)
        files.parse_as(kind, text)
    except (ValueError, UnicodeError) as error:
        why = printable(str(error), 200)
        raise ConfigError(
            f"nothing like this can be claimed ({why}): expected other words"
        ) from None
    return text


def parsed(kind: type[_Body], text: bytes) -> _Body:
    """A statement out of its text, which must be the canonical one.

    Raises:
        ValueError: it is no such statement, or another spelling of one: a signature is about bytes,
            and two spellings of a claim would be two claims; or its date is in the future.
    """
    found = files.parse_as(kind, text)
    if rfc8785.dumps(json.loads(text)) != text:
        raise ValueError("the statement is not in canonical JSON (RFC 8785)")
    date = moment(found.predicate.date)
    require_past(date, "the date of the statement", tolerance=CLOCK_SKEW, error=ValueError)
    return found


def instant(time: datetime) -> str:
    """A time in UTC as ISO 8601, to the second where it has no fraction."""
    return time.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"


def moment(text: str) -> datetime:
    """The time that `instant` wrote.

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
    """Refuse a time that has not come yet: nobody can know what will be there by then.

    Args:
        time: with its zone.
        what: what the time is of, as the subject of the message.
        tolerance: by how much it may be ahead of this machine's clock.
        error: what to raise.

    Raises:
        ConfigError: or `error`, for a time in the future, or one without a zone.
    """
    if time.tzinfo is None:
        raise error(f"{what} has no zone: expected a time such as 2026-05-31T12:00:00Z")
    now = current_time()
    if time - now > tolerance:
        clock = instant(now.replace(microsecond=0))
        raise error(
            f"{what}, {instant(time)}, is in the future: it is {clock} now by this machine's "
            "clock; expected a time that has passed"
        )


def day_or_moment(text: str, option: str) -> datetime:
    """A date, which is its first moment in UTC, or a time with its zone, of the command line.

    Raises:
        ConfigError: neither.
    """
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return moment(f"{text}T00:00:00Z")
        found = datetime.fromisoformat(text)
        if found.tzinfo is not None and abs(found.utcoffset() or timedelta()) < timedelta(days=1):
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(
        f"{option} is {printable(text, 80)!r}: expected a day such as 2026-05-31, which is its "
        "first moment in UTC, or a time with its zone such as 2026-05-31T12:00:00+02:00"
    )


def not_a(what: str, where: str, why: str) -> ClaimError:
    """The error of a file that is no claim, or no tree head."""
    return ClaimError(f"{where}: {printable(why, 300)}; expected {what}")
