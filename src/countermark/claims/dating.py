"""By when a key was committed to, and among how many: what a claim adds to a verdict.

A time stamp alone dates a claim, but it does not count. Whoever has a thousand keys stamped in
silence and later shows the one that fits has tried a thousand. So a claim dates a key when it was
in a ledger under a tree head that a pinned authority stamped before the suspect's date, and p is
multiplied by how many commitments that ledger holds: of the claim's pinned signers, or of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from countermark.claims.audit import Audit
from countermark.claims.policy import CommittedBefore, earliest
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.statement import instant, require_past
from countermark.claims.timestamp import Authority
from countermark.errors import ClaimError
from countermark.key_dating import KeyDating


@dataclass(frozen=True)
class Believed:
    """Whom an examiner believes, and what he states.

    Attributes:
        suspect_date: before which a key must have been committed to: his own statement.
        authorities: whose time stamps count.
        signers: public keys that he knows to be the claimant's; empty where he knows none.
        least: how many of the authorities must agree.

    Raises:
        ConfigError: the suspect date is in the future.
    """

    suspect_date: datetime
    authorities: Sequence[Authority] = field(repr=False)
    signers: Sequence[str] = ()
    least: int = 1

    def __post_init__(self) -> None:
        require_past(self.suspect_date, "the suspect date")


def dating(claim: Claim, believed: Believed, audited: Audit | None) -> KeyDating:
    """What a claim says about the age of its key; undated where anything is missing, and why.

    Args:
        claim: about the key that is judged.
        believed: whom the examiner believes.
        audited: the ledger that he counts in; None where he named none.

    Raises:
        ClaimError: the claim's signatures or stamps are not its own, or its signer was not pinned
            where others were.
        ConfigError: there are no authorities to believe.
    """
    claim.check()
    signed = sorted(set(claim.signers) & set(believed.signers))
    if believed.signers and not signed:
        raise ClaimError(
            f"the claim is signed by {', '.join(claim.signers)}, by none of the pinned keys: it is "
            "somebody else's, or the wrong --signer was given"
        )
    CommittedBefore(believed.suspect_date, believed.authorities, believed.least)
    earliest([claim], believed.authorities)  # refuses stamps of something else
    why, heads = _counted(claim, audited)
    stamps = [] if why else earliest(heads, believed.authorities)
    early = [each for each in stamps if each.stamp.latest < believed.suspect_date]
    if not why and len(early) < believed.least:
        why = (
            f"{len(early)} pinned authorities stamped a tree head with this claim in it before "
            f"{instant(believed.suspect_date)}, {believed.least} must"
        )
    return KeyDating(
        claim=claim.digest,
        suspect_date=instant(believed.suspect_date),
        committed=None if why else instant(early[believed.least - 1].stamp.latest),
        authorities=tuple(each.authority.name for each in early),
        commitments=audited.count(believed.signers) if audited else None,
        signer="pinned" if signed else "unknown",
        why=why,
    )


def heads_over(claim: Claim, audited: Audit | None) -> list[TreeHead]:
    """The heads of a sound ledger over lists that have a claim; none without a ledger."""
    return _counted(claim, audited)[1]


def _counted(claim: Claim, audited: Audit | None) -> tuple[str | None, list[TreeHead]]:
    """Why nobody can count what a claim is one of; else the heads over lists that have it."""
    if audited is None:
        return (
            "without a ledger nobody can count how many keys were committed to beside this one, "
            "to show the one that fits: give --ledger URL"
        ), []
    if audited.faults:
        return f"the ledger was changed: {audited.faults[0]}", []
    place = audited.places.get(claim.digest)
    if place is None:
        return "the claim is not in the ledger, so that it is not one of those counted there", []
    return None, [each for each in audited.heads if each.size > place]
