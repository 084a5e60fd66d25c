"""Checks that an examiner combines to a policy; there is no default policy.

    AllOf([SignedBy([key]), CommittedBefore(date, [authority]), OwnedAt(1e-6)])

A check holds, fails, or stays open (nobody to trust was named). An empty policy accepts nothing.
`AtLeast(k, [...])` requires k of several checks; `SignedBy` and `CommittedBefore` require k of
their own keys and authorities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from countermark.checkpoints.digest import ModelDigest
from countermark.claims.decision import Decision, Finding, PolicyCase
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.signing import require_threshold
from countermark.claims.statement import format_time, require_past
from countermark.claims.timestamp import (
    Authority,
    ConfirmedTimestamp,
    find_confirmed_timestamps,
    read_response,
)
from countermark.errors import ClaimError
from countermark.results.null_hypotheses import LEAST_FORGERY_BITS
from countermark.results.verdict import Verdict


class Check(Protocol):
    """A part of a policy."""

    def judge(self, case: PolicyCase) -> Decision:
        """Judge a case; return one or more findings."""


@dataclass(frozen=True)
class AllOf:
    """A policy that requires every check to hold; without checks it accepts nothing.

    Attributes:
        checks: the checks.
    """

    checks: Sequence[Check]

    def judge(self, case: PolicyCase) -> Decision:
        """Return the findings of all checks."""
        # `all([])` is true: a policy that was left empty by mistake would accept everything.
        if not self.checks:
            reason = "an empty policy accepts nothing: say whom you believe"
            return Decision((Finding("policy", holds=False, reason=reason),))
        found = [each.judge(case).findings for each in self.checks]
        return Decision(tuple(finding for findings in found for finding in findings))


@dataclass(frozen=True)
class AtLeast:
    """A policy that requires k of several checks to hold.

    Attributes:
        least: k.
        checks: the checks.

    Raises:
        ConfigError: k is not 1 to n.
    """

    least: int
    checks: Sequence[Check]

    def __post_init__(self) -> None:
        require_threshold(self.least, self.checks, "checks")

    def judge(self, case: PolicyCase) -> Decision:
        """Return one finding: how many checks hold."""
        decisions = [each.judge(case) for each in self.checks]
        held = sum(each.outcome == "accepted" for each in decisions)
        why = "; ".join(f.reason for each in decisions for f in each.findings if not f.holds)
        reason = f"{held} of {len(decisions)} hold, {self.least} must" + (f": {why}" if why else "")
        return Decision((Finding("at least", held >= self.least, reason),))


@dataclass(frozen=True)
class OpenCheck:
    """A check that stays open because nobody to trust was named.

    Attributes:
        check: name of the check.
        reason: what is missing.
    """

    check: str
    reason: str

    def judge(self, case: PolicyCase) -> Decision:  # noqa: ARG002 - the same for every case
        """Return the finding that the policy cannot decide this check, with the reason."""
        return Decision((Finding(self.check, None, self.reason),))


@dataclass(frozen=True)
class IntegrityCheck:
    """A check that signatures and timestamps are over this claim."""

    def judge(self, case: PolicyCase) -> Decision:
        """Check that nothing was changed after it was signed and timestamped."""
        try:
            case.claim.check_signatures()
            for each in case.claim.timestamp_responses:
                read_response(each, case.claim)
        except ClaimError as error:
            return Decision((Finding("intact", holds=False, reason=str(error)),))
        of = f"{len(case.claim.signers)} signatures and {len(case.claim.timestamp_responses)} time stamps"
        return Decision((Finding("intact", holds=True, reason=f"{of} are of this claim"),))


@dataclass(frozen=True)
class ModelCheck:
    """A check that the claim is about a model.

    Attributes:
        model: the model's digest.
    """

    model: ModelDigest

    def judge(self, case: PolicyCase) -> Decision:
        """Check that the model digests agree."""
        said = ModelDigest(case.claim.model_root, case.claim.statement.predicate.tensors)
        reason = f"the claim is about {said.root} with {said.tensors} tensors, "
        reason += "this one" if said == self.model else f"the model is {self.model.root}"
        return Decision((Finding("of the model", said == self.model, reason),))


@dataclass(frozen=True)
class KeyCheck:
    """A check that the claim is about a key.

    Attributes:
        commitment: the key's commitment, in hexadecimal.
    """

    commitment: str

    def judge(self, case: PolicyCase) -> Decision:
        """Check that the commitments agree."""
        same = self.commitment == case.claim.commitment
        reason = f"the claim is about {case.claim.commitment}, "
        reason += "this one" if same else f"the key is {self.commitment}"
        return Decision((Finding("of the key", same, reason),))


@dataclass(frozen=True)
class SignedBy:
    """A check that at least `least` of the given keys signed the claim.

    Attributes:
        keys: public keys as `signing.compute_key_id` names them.
        least: k of n.

    Raises:
        ConfigError: k is not 1 to n.
    """

    keys: Sequence[str]
    least: int = 1

    def __post_init__(self) -> None:
        # A key that is listed twice must not count as two signers.
        require_threshold(self.least, sorted(set(self.keys)), "signers")

    def judge(self, case: PolicyCase) -> Decision:
        """Check that enough of the keys signed the claim."""
        try:
            case.claim.check_signatures()
        except ClaimError as error:
            return Decision((Finding("signed by", holds=False, reason=str(error)),))
        signed = sorted(set(case.claim.signers) & set(self.keys))
        reason = f"{len(signed)} of {len(set(self.keys))} pinned keys signed, {self.least} must"
        if not signed:
            reason += f"; it is signed by {', '.join(case.claim.signers)}, which nobody pinned"
        return Decision((Finding("signed by", len(signed) >= self.least, reason),))


@dataclass(frozen=True)
class CommittedBefore:
    """A check that at least `least` pinned authorities date the claim before a given time.

    A timestamp on the claim counts, and so does a timestamp on a ledger's tree head that covers the
    claim. A timestamp of any other authority, such as the claimant's own, leaves the claim undated.

    Attributes:
        date: the time; the latest time that a timestamp allows must lie before it.
        authorities: the authorities that the examiner trusts.
        least: k of n.

    Raises:
        ConfigError: k is not 1 to n, there are no authorities, or the date is in the future.
    """

    date: datetime
    authorities: Sequence[Authority] = field(repr=False)
    least: int = 1

    def __post_init__(self) -> None:
        require_threshold(self.least, self.authorities, "authorities")
        require_past(self.date, "the date before which the claim must be committed to")

    def judge(self, case: PolicyCase) -> Decision:
        """Check that enough authorities timestamped the claim in time."""
        try:
            case.claim.check_signatures()
            # Signatures first: a timestamp is over the signed envelope, and dates nothing if nobody
            # signed.
            stamps = find_earliest_timestamps([case.claim, *case.heads], self.authorities)
        except ClaimError as error:
            return Decision((Finding("committed before", holds=False, reason=str(error)),))
        date, early = format_time(self.date), [s for s in stamps if s.stamp.latest_time < self.date]
        if len(early) >= self.least:
            # The timestamps are sorted: at the time of the `least`-th, enough authorities agree.
            which = early[self.least - 1]
            reason = (
                f"stamped {format_time(which.stamp.latest_time)} at the latest by {which.authority.name}, "
                f"before {date}"
            )
        elif stamps:
            reason = (
                f"stamped {format_time(stamps[0].stamp.latest_time)} at the latest, which is not before "
                f"{date} by the word of {self.least} pinned authorities"
            )
        else:
            others = len(case.claim.timestamp_responses) + sum(
                len(each.timestamp_responses) for each in case.heads
            )
            reason = f"undated: {others} time stamps, none of them by an authority that was pinned"
        return Decision((Finding("committed before", len(early) >= self.least, reason),))


@dataclass(frozen=True)
class OwnedAt:
    """A check that the verdict finds the claimed key's mark, at a threshold or a stricter one.

    Attributes:
        alpha: the threshold against coincidence.
    """

    alpha: float

    def judge(self, case: PolicyCase) -> Decision:
        """Check that the verdict is "owned" and about the claim's key; open without a verdict."""
        verdict = case.verdict
        if verdict is None:
            return Decision((Finding("owned at", None, "no suspect was read"),))
        if verdict.commitment != case.claim.commitment:
            reason = (
                f"the verdict is about the key {verdict.commitment}, the claim about "
                f"{case.claim.commitment}: the key was made after the claim, or is another one"
            )
        # Keys with few forgery bits are judged by their age, which has to come from this claim.
        elif _is_self_dated(verdict):
            reason = (
                "that the key is older than the suspect is the owner's own word: judge it with "
                "the claim, and without --assume-dated"
            )
        elif verdict.dating is not None and verdict.dating.claim != case.claim.digest:
            reason = (
                f"judged with the claim {verdict.dating.claim}, and this one is {case.claim.digest}"
            )
        # p of the verdict was compared with the verdict's own alpha, so that a laxer alpha says
        # nothing about the stricter one.
        elif verdict.alpha > self.alpha:
            reason = f"judged at alpha {verdict.alpha:g}, {self.alpha:g} is asked for"
        else:
            return Decision((Finding("owned at", verdict.owned, verdict.reason),))
        return Decision((Finding("owned at", holds=False, reason=reason),))


def _is_self_dated(verdict: Verdict) -> bool:
    """Return true if the key's age rests on the owner's own statement."""
    return verdict.assume_dated and verdict.forgery_bits < LEAST_FORGERY_BITS


def find_earliest_timestamps(
    documents: Sequence[Claim | TreeHead], authorities: Sequence[Authority]
) -> list[ConfirmedTimestamp]:
    """Find the earliest timestamp of each pinned authority over any of several documents.

    Args:
        documents: claims or tree heads.
        authorities: the pinned authorities.

    Returns:
        The timestamps, earliest first; one for each authority and for each signing certificate.

    Raises:
        ClaimError: a timestamp is over something else than its document.
    """
    found = [
        each for document in documents for each in find_confirmed_timestamps(document, authorities)
    ]
    kept: list[ConfirmedTimestamp] = []
    for each in sorted(found, key=lambda each: each.stamp.latest_time):
        # Two pinned roots may stand for one signer: it counts once.
        new = each.authority not in [other.authority for other in kept]
        if new and each.stamp.signer not in [other.stamp.signer for other in kept]:
            kept.append(each)
    return kept
