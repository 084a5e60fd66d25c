"""Claims for pages and programs: search in the ledger, and a fresh check of one claim."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from countermark._internal import merkle
from countermark.claims.ledger import InclusionProof, Ledger, LedgerEntry
from countermark.claims.signed import Claim
from countermark.claims.statement import format_time
from countermark.claims.timestamp import Authority, find_confirmed_timestamps, read_response
from countermark.errors import ClaimError, ConfigError, make_printable

# Claims that one answer lists.
PAGE = 25


class UnknownClaimError(ConfigError):
    """The ledger has no claim with this digest."""


@dataclass(frozen=True)
class ClaimSummary:
    """A claim in a list. Its content is unchecked."""

    place: int
    digest: str
    owner: str
    date: str
    commitment: str
    model: str


@dataclass(frozen=True)
class ClaimList:
    """One part of a list of claims, the newest first.

    Attributes:
        size: the number of all claims in the ledger.
        claims: at most `PAGE` claims that match the search.
        older: the place before which the list goes on; None at its end.
    """

    size: int
    claims: tuple[ClaimSummary, ...]
    older: int | None


@dataclass(frozen=True)
class TimestampInfo:
    """A timestamp of a claim: when, by whom, and whether this server trusts the authority."""

    time: str
    signer: str
    believed: bool


@dataclass(frozen=True)
class CheckedClaim:
    """A claim and the result of a fresh check.

    Attributes:
        line: the claim's content, as a list shows it.
        claim: the claim.
        signature: why its signatures are invalid; None if they are valid.
        stamps: its timestamps that can be read.
        no_stamps: the number of its timestamps that are invalid.
        proof: the proof that the claim is in the ledger's tree.
        included: whether the proof leads to the root.
    """

    line: ClaimSummary
    claim: Claim = field(repr=False)
    signature: str | None
    stamps: tuple[TimestampInfo, ...]
    no_stamps: int
    proof: InclusionProof
    included: bool

    @property
    def holds(self) -> bool:
        """Whether all signatures, timestamps and the inclusion proof are valid."""
        return self.signature is None and not self.no_stamps and self.included


class Catalogue:
    """The contents of all claims of a ledger, for search.

    The first search reads every claim; later ones read only the claims added since.

    Args:
        ledger: the ledger.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lines: list[ClaimSummary] = []
        self._lock = threading.Lock()

    def find_claims(self, words: str = "", before: int | None = None) -> ClaimList:
        """Find claims by a part of the owner's name or by a digest.

        Args:
            words: a part of the owner's name, or the digest of a claim, a commitment or a model in
                64 hexadecimal digits; "" for all claims.
            before: list only claims at earlier places.

        Raises:
            LedgerError: the ledger does not answer, or holds an entry that is no claim.
        """
        lines, wanted = self._update_summaries(), words.strip().casefold()
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
        return ClaimList(len(lines), shown, shown[-1].place if len(fitting) > PAGE else None)

    def _update_summaries(self) -> list[ClaimSummary]:
        """Return all claims, after reading those that were added since the last call."""
        # A ledger only grows, so claims that were read once stay as they are.
        with self._lock:
            with self._ledger.database.begin_reading() as connection:
                rows = self._ledger.rows
                after = self._lines[-1].place if self._lines else -1
                for row in rows.iterate_claims(connection, after=after):
                    self._lines.append(_summarise_row(rows.parse_place(row), row))
            return list(self._lines)


def check_claim(ledger: Ledger, digest: str, authorities: Sequence[Authority]) -> CheckedClaim:
    """Read a claim of the ledger and check signatures, timestamps and inclusion.

    Args:
        ledger: the ledger.
        digest: the claim's digest, in hexadecimal.
        authorities: the authorities whose timestamps count as trusted.

    Raises:
        UnknownClaimError: the ledger has no claim with this digest.
        LedgerError: the ledger was changed.
    """
    found = ledger.find(digest=digest)
    if not found:
        why = f"the ledger has no claim {make_printable(digest)}: expected the digest of one"
        raise UnknownClaimError(why)
    entry = found[0]
    claim, proof = entry.claim, ledger.prove(entry.place)
    stamps, no_stamps = _read_timestamps(claim, authorities)
    return CheckedClaim(
        line=summarise_entry(entry), claim=claim, signature=_find_signature_fault(claim), stamps=stamps,
        no_stamps=no_stamps, proof=proof,
        included=merkle.is_under(
            proof.root, claim.to_bytes(), proof.place, proof.size, proof.path
        ),
    )  # fmt: skip


def summarise_entry(entry: LedgerEntry) -> ClaimSummary:
    """Return the content of a claim as a list shows it."""
    claim = entry.claim
    date = claim.statement.predicate.date
    return ClaimSummary(
        entry.place, claim.digest, claim.owner, date, claim.commitment, claim.model_root
    )  # fmt: skip


def _summarise_row(place: int, row: Any) -> ClaimSummary:
    """Return the content of a database row as a list shows it, without parsing the whole claim."""
    owner, date = "", ""
    try:
        payload = json.loads(row.content)["envelope"]["payload"]
        said = json.loads(base64.b64decode(payload))["predicate"]
        owner, date = str(said["owner"]), str(said["date"])
    # Whoever can write to the database can write anything there. Deep nesting exhausts recursion.
    except (ValueError, KeyError, TypeError, RecursionError):
        owner = "(this claim was changed and cannot be read)"
    return ClaimSummary(
        place, str(row.digest), owner, date, str(row.commitment), str(row.model)
    )  # fmt: skip


def _find_signature_fault(claim: Claim) -> str | None:
    """Return why the signatures of a claim are invalid, or None if they are valid."""
    try:
        claim.check_signatures()
    except ClaimError as error:
        return str(error)
    return None


def _read_timestamps(
    claim: Claim, authorities: Sequence[Authority]
) -> tuple[tuple[TimestampInfo, ...], int]:
    """Return the timestamps of a claim, and the number of invalid ones."""
    read_ones, broken = [], 0
    for response in claim.timestamp_responses:
        try:
            read_ones.append(read_response(response, claim))
        except ClaimError:
            broken += 1
    # `find_confirmed_timestamps` raises for an invalid timestamp; then no timestamp of the claim is trusted.
    believed = (
        set() if broken else {each.stamp for each in find_confirmed_timestamps(claim, authorities)}
    )
    found = [
        TimestampInfo(format_time(each.time), each.signer[0], each in believed)
        for each in read_ones
    ]
    return tuple(found), broken
