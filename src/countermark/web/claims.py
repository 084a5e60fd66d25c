"""Claims as they are shown: looked for, and each checked anew when it is opened."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from countermark import merkle
from countermark.claims.ledger import Entry, Ledger, Proof
from countermark.claims.signed import Claim
from countermark.claims.statement import instant
from countermark.claims.timestamp import Authority, confirmed, read
from countermark.errors import ClaimError, ConfigError, printable

PAGE = 25  # claims that are listed at once


class UnknownClaimError(ConfigError):
    """The ledger has no claim of this digest."""


@dataclass(frozen=True)
class Line:
    """A claim in a list: what it says, nothing of it checked."""

    place: int
    digest: str
    owner: str
    date: str
    commitment: str
    model: str


@dataclass(frozen=True)
class Found:
    """A list of claims, the newest first.

    Attributes:
        size: how many the ledger has.
        claims: at most `PAGE` of those that were sought.
        older: before which place to go on; None at the end.
    """

    size: int
    claims: tuple[Line, ...]
    older: int | None


@dataclass(frozen=True)
class Stamped:
    """A time stamp of a claim: when, by whom, and whether this server believes him."""

    time: str
    signer: str
    believed: bool


@dataclass(frozen=True)
class Checked:
    """A claim, and what was found of it just now.

    Attributes:
        line: what it says.
        claim: the claim.
        signature: why its signatures do not hold; None when they do.
        stamps: time stamps over it.
        no_stamps: how many of its stamps are none.
        proof: that it is in the ledger's tree.
        included: whether that proof leads to the root.
    """

    line: Line
    claim: Claim = field(repr=False)
    signature: str | None
    stamps: tuple[Stamped, ...]
    no_stamps: int
    proof: Proof
    included: bool

    @property
    def holds(self) -> bool:
        """Whether signatures, stamps and inclusion are what they say."""
        return self.signature is None and not self.no_stamps and self.included


class Catalogue:
    """Who owns which claim, by place: read once, and then what has been added.

    Args:
        ledger: whose claims.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lines: list[Line] = []
        self._lock = threading.Lock()

    def find(self, words: str = "", before: int | None = None) -> Found:
        """Claims whose owner has these words in it, or one of whose digests this is.

        Args:
            words: 64 hexadecimal digits, or a part of the owner's name; "" for all.
            before: only claims of earlier places.

        Raises:
            LedgerError: the ledger does not answer, or holds what is no claim.
        """
        lines, wanted = self._all(), words.strip().casefold()
        fitting = [
            line
            for line in reversed(lines)
            if (before is None or line.place < before)
            and (
                wanted in line.owner.casefold()
                or wanted in (line.digest, line.commitment, line.model)
            )
        ]
        shown = tuple(fitting[:PAGE])
        return Found(len(lines), shown, shown[-1].place if len(fitting) > PAGE else None)

    def _all(self) -> list[Line]:
        with self._lock:
            with self._ledger.database.reading() as connection:
                rows = self._ledger.rows
                after = self._lines[-1].place if self._lines else -1
                for row in rows.claims(connection, after=after):
                    self._lines.append(_line(rows.placed(row), row))
            return list(self._lines)


def checked(ledger: Ledger, digest: str, authorities: Sequence[Authority]) -> Checked:
    """A claim of the ledger, checked now.

    Raises:
        UnknownClaimError: there is none of this digest.
        LedgerError: the ledger was changed.
    """
    found = ledger.find(digest=digest)
    if not found:
        why = f"the ledger has no claim {printable(digest)}: expected the digest of one"
        raise UnknownClaimError(why)
    entry = found[0]
    claim, proof = entry.claim, ledger.prove(entry.place)
    stamps, no_stamps = _stamps(claim, authorities)
    return Checked(
        line=line_of(entry), claim=claim, signature=_signature(claim), stamps=stamps,
        no_stamps=no_stamps, proof=proof,
        included=merkle.is_under(
            proof.root, claim.to_bytes(), proof.place, proof.size, proof.path
        ),
    )  # fmt: skip


def line_of(entry: Entry) -> Line:
    """A claim as it stands in a list."""
    claim = entry.claim
    date = claim.statement.predicate.date
    return Line(
        entry.place, claim.digest, claim.owner, date, claim.commitment, claim.model_root
    )  # fmt: skip


def _line(place: int, row: Any) -> Line:
    """The same, of a row, without reading all of the claim: its page does that."""
    owner, date = "", ""
    try:
        payload = json.loads(row.content)["envelope"]["payload"]
        said = json.loads(base64.b64decode(payload))["predicate"]
        owner, date = str(said["owner"]), str(said["date"])
    except (ValueError, KeyError, TypeError, RecursionError):
        owner = "(this claim was changed and cannot be read)"
    return Line(
        place, str(row.digest), owner, date, str(row.commitment), str(row.model)
    )  # fmt: skip


def _signature(claim: Claim) -> str | None:
    try:
        claim.check()
    except ClaimError as error:
        return str(error)
    return None


def _stamps(claim: Claim, authorities: Sequence[Authority]) -> tuple[tuple[Stamped, ...], int]:
    """The stamps over a claim, and how many are none."""
    read_ones, broken = [], 0
    for response in claim.stamps:
        try:
            read_ones.append(read(response, claim))
        except ClaimError:
            broken += 1
    believed = set() if broken else {each.stamp for each in confirmed(claim, authorities)}
    found = [Stamped(instant(each.time), each.signer[0], each in believed) for each in read_ones]
    return tuple(found), broken
