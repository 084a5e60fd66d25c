"""By when a key was committed to, and among how many commitments: what a claim adds to a verdict.

A timestamp on a claim dates the claim but does not count claims. Somebody could have a thousand
claims timestamped in silence and later show the one whose key fits: a thousand tries. So a claim
dates its key only if the claim was in a ledger under a tree head that a pinned authority
timestamped before the suspect's date. p is then multiplied by the number of commitments in that
ledger: of the claim's pinned signers, or of all signers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from countermark.claims.audit import Audit
from countermark.claims.policy import CommittedBefore, find_earliest_timestamps
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.statement import format_time, require_past
from countermark.claims.timestamp import Authority
from countermark.errors import ClaimError
from countermark.results.key_dating import KeyDating


@dataclass(frozen=True)
class ExaminerTrust:
    """The authorities and signers that an examiner trusts, and the suspect's date.

    Attributes:
        suspect_date: the key must have been committed to before this time, as the examiner states.
        authorities: the authorities whose timestamps count.
        signers: public keys that the examiner knows to be the claimant's; empty if they know none.
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


def date_key(claim: Claim, believed: ExaminerTrust, audited: Audit | None) -> KeyDating:
    """Return the age of a key as a claim shows it; undated, with a reason, if anything is missing.

    Args:
        claim: a claim about the key that is judged.
        believed: the authorities and signers that the examiner trusts.
        audited: the ledger in which claims are counted; None if the examiner named none.

    Raises:
        ClaimError: the claim's signatures or timestamps are over something else, or signers were
            pinned and none of them signed.
        ConfigError: no authorities were given.
    """
    claim.check_signatures()
    signed = sorted(set(claim.signers) & set(believed.signers))
    if believed.signers and not signed:
        raise ClaimError(
            f"the claim is signed by {', '.join(claim.signers)}, by none of the pinned keys: it is "
            "somebody else's, or the wrong --signer was given"
        )
    # Constructed only for its checks: there are authorities, and `least` is at most their number.
    CommittedBefore(believed.suspect_date, believed.authorities, believed.least)
    find_earliest_timestamps(
        [claim], believed.authorities
    )  # raises for a timestamp over something else
    # From here on only timestamps on tree heads date the key. A timestamp on the claim alone would
    # not show how many other claims there were.
    why, heads = _find_counted_heads(claim, audited)
    stamps = [] if why else find_earliest_timestamps(heads, believed.authorities)
    early = [each for each in stamps if each.stamp.latest_time < believed.suspect_date]
    if not why and len(early) < believed.least:
        why = (
            f"{len(early)} pinned authorities stamped a tree head with this claim in it before "
            f"{format_time(believed.suspect_date)}, {believed.least} must"
        )
    return KeyDating(
        claim=claim.digest,
        suspect_date=format_time(believed.suspect_date),
        # The timestamps are sorted: at the time of the `least`-th, enough authorities agree.
        committed=None if why else format_time(early[believed.least - 1].stamp.latest_time),
        authorities=tuple(each.authority.name for each in early),
        commitments=audited.count_commitments(believed.signers) if audited else None,
        signer="pinned" if signed else "unknown",
        why=why,
    )


def find_heads_over(claim: Claim, audited: Audit | None) -> list[TreeHead]:
    """Return the tree heads of a sound ledger that cover a claim; empty without a ledger."""
    return _find_counted_heads(claim, audited)[1]


def _find_counted_heads(claim: Claim, audited: Audit | None) -> tuple[str | None, list[TreeHead]]:
    """Find the tree heads that cover a claim, or the reason why commitments cannot be counted.

    Returns:
        The reason, or None; and the tree heads that cover the claim.
    """
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
    # Places start at 0: a head over n claims covers the places 0 to n − 1.
    return None, [each for each in audited.heads if each.size > place]
