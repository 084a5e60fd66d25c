"""What somebody accepts as evidence: checks that are put together, and no default.

    AllOf([SignedBy([key]), CommittedBefore(date, [authority]), OwnedAt(1e-6)])

A check holds, does not hold, or was not asked for (nobody to believe was named). An empty policy
accepts nothing. `AtLeast(k, [...])` asks for k of several; `SignedBy` and `CommittedBefore` take k
of their own keys and authorities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from countermark.claims.decision import Case, Decision, Finding
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.signing import least_of
from countermark.claims.statement import instant, require_past
from countermark.claims.timestamp import Authority, Confirmed, confirmed, read
from countermark.errors import ClaimError
from countermark.nulls import LEAST_FORGERY_BITS
from countermark.verdict import Verdict
from countermark.weights.digest import ModelDigest


class Check(Protocol):
    """A part of a policy."""

    def judge(self, case: Case) -> Decision:
        """What it says of a case."""


@dataclass(frozen=True)
class AllOf:
    """Every check must hold. Of none, nothing is accepted."""

    checks: Sequence[Check]

    def judge(self, case: Case) -> Decision:
        """The findings of all checks."""
        if not self.checks:
            reason = "an empty policy accepts nothing: say whom you believe"
            return Decision((Finding("policy", holds=False, reason=reason),))
        found = [each.judge(case).findings for each in self.checks]
        return Decision(tuple(finding for findings in found for finding in findings))


@dataclass(frozen=True)
class AtLeast:
    """k of several checks must hold.

    Raises:
        ConfigError: k is not 1 to n.
    """

    least: int
    checks: Sequence[Check]

    def __post_init__(self) -> None:
        least_of(self.least, self.checks, "checks")

    def judge(self, case: Case) -> Decision:
        """One finding: how many hold."""
        decisions = [each.judge(case) for each in self.checks]
        held = sum(each.outcome == "accepted" for each in decisions)
        why = "; ".join(f.reason for each in decisions for f in each.findings if not f.holds)
        reason = f"{held} of {len(decisions)} hold, {self.least} must" + (f": {why}" if why else "")
        return Decision((Finding("at least", held >= self.least, reason),))


@dataclass(frozen=True)
class Unasked:
    """What was left open, because nobody to believe was named.

    Attributes:
        check: what was not asked.
        reason: what is missing.
    """

    check: str
    reason: str

    def judge(self, case: Case) -> Decision:  # noqa: ARG002 - the same for every case
        """That it is open."""
        return Decision((Finding(self.check, None, self.reason),))


@dataclass(frozen=True)
class Intact:
    """Every signature is by its key over the claim, and every time stamp is of both."""

    def judge(self, case: Case) -> Decision:
        """Whether anything was changed since."""
        try:
            case.claim.check()
            for each in case.claim.stamps:
                read(each, case.claim)
        except ClaimError as error:
            return Decision((Finding("intact", holds=False, reason=str(error)),))
        of = f"{len(case.claim.signers)} signatures and {len(case.claim.stamps)} time stamps"
        return Decision((Finding("intact", holds=True, reason=f"{of} are of this claim"),))


@dataclass(frozen=True)
class OfModel:
    """The claim is about this model."""

    model: ModelDigest

    def judge(self, case: Case) -> Decision:
        """Whether the digests agree."""
        said = ModelDigest(case.claim.model_root, case.claim.statement.predicate.tensors)
        reason = f"the claim is about {said.root} with {said.tensors} tensors, "
        reason += "this one" if said == self.model else f"the model is {self.model.root}"
        return Decision((Finding("of the model", said == self.model, reason),))


@dataclass(frozen=True)
class OfKey:
    """The claim is about this key."""

    commitment: str

    def judge(self, case: Case) -> Decision:
        """Whether the commitments agree."""
        same = self.commitment == case.claim.commitment
        reason = f"the claim is about {case.claim.commitment}, "
        reason += "this one" if same else f"the key is {self.commitment}"
        return Decision((Finding("of the key", same, reason),))


@dataclass(frozen=True)
class SignedBy:
    """The claim is signed by at least `least` of these keys.

    Attributes:
        keys: public keys as `signing.key_id` names them.
        least: k of n.

    Raises:
        ConfigError: k is not 1 to n.
    """

    keys: Sequence[str]
    least: int = 1

    def __post_init__(self) -> None:
        least_of(self.least, sorted(set(self.keys)), "signers")

    def judge(self, case: Case) -> Decision:
        """Whether the signatures are theirs."""
        try:
            case.claim.check()
        except ClaimError as error:
            return Decision((Finding("signed by", holds=False, reason=str(error)),))
        signed = sorted(set(case.claim.signers) & set(self.keys))
        reason = f"{len(signed)} of {len(set(self.keys))} pinned keys signed, {self.least} must"
        if not signed:
            reason += f"; it is signed by {', '.join(case.claim.signers)}, which nobody pinned"
        return Decision((Finding("signed by", len(signed) >= self.least, reason),))


@dataclass(frozen=True)
class CommittedBefore:
    """The claim is older than a date, by the word of at least `least` pinned authorities.

    A stamp on the claim counts, and one on a tree head of a ledger that has the claim. A stamp of
    anybody else, the claimant's own authority included, leaves the claim undated.

    Attributes:
        date: what the latest time that a stamp allows for must lie before.
        authorities: whom the examiner believes.
        least: k of n.

    Raises:
        ConfigError: k is not 1 to n; with no authority there is nobody to believe; a date in the
            future.
    """

    date: datetime
    authorities: Sequence[Authority] = field(repr=False)
    least: int = 1

    def __post_init__(self) -> None:
        least_of(self.least, self.authorities, "authorities")
        require_past(self.date, "the date before which the claim must be committed to")

    def judge(self, case: Case) -> Decision:
        """Whether it was committed in time."""
        try:
            case.claim.check()
            stamps = earliest([case.claim, *case.heads], self.authorities)
        except ClaimError as error:
            return Decision((Finding("committed before", holds=False, reason=str(error)),))
        date, early = instant(self.date), [s for s in stamps if s.stamp.latest < self.date]
        if len(early) >= self.least:
            which = early[self.least - 1]
            reason = (
                f"stamped {instant(which.stamp.latest)} at the latest by {which.authority.name}, "
                f"before {date}"
            )
        elif stamps:
            reason = (
                f"stamped {instant(stamps[0].stamp.latest)} at the latest, which is not before "
                f"{date} by the word of {self.least} pinned authorities"
            )
        else:
            others = len(case.claim.stamps) + sum(len(each.stamps) for each in case.heads)
            reason = f"undated: {others} time stamps, none of them by an authority that was pinned"
        return Decision((Finding("committed before", len(early) >= self.least, reason),))


@dataclass(frozen=True)
class OwnedAt:
    """The mark of the claimed key is in the suspect, at this threshold or a stricter one."""

    alpha: float

    def judge(self, case: Case) -> Decision:
        """Whether the verdict says so, and is about the claim's key."""
        verdict = case.verdict
        if verdict is None:
            return Decision((Finding("owned at", None, "no suspect was read"),))
        if verdict.commitment != case.claim.commitment:
            reason = (
                f"the verdict is about the key {verdict.commitment}, the claim about "
                f"{case.claim.commitment}: the key was made after the claim, or is another one"
            )
        elif _by_word_alone(verdict):
            reason = (
                "that the key is older than the suspect is the owner's own word: judge it with "
                "the claim, and without --assume-dated"
            )
        elif verdict.dating is not None and verdict.dating.claim != case.claim.digest:
            reason = (
                f"judged with the claim {verdict.dating.claim}, and this one is {case.claim.digest}"
            )
        elif verdict.alpha > self.alpha:
            reason = f"judged at alpha {verdict.alpha:g}, {self.alpha:g} is asked for"
        else:
            return Decision((Finding("owned at", verdict.owned, verdict.reason),))
        return Decision((Finding("owned at", holds=False, reason=reason),))


def _by_word_alone(verdict: Verdict) -> bool:
    """Whether a verdict may rest on the owner's statement of a date; a claim may not do for it."""
    return verdict.assume_dated and verdict.forgery_bits < LEAST_FORGERY_BITS


def earliest(
    documents: Sequence[Claim | TreeHead], authorities: Sequence[Authority]
) -> list[Confirmed]:
    """The earliest stamp of each pinned authority over any of several documents, in that order.

    Raises:
        ClaimError: a stamp that is of something else.
    """
    found = [each for document in documents for each in confirmed(document, authorities)]
    kept: list[Confirmed] = []
    for each in sorted(found, key=lambda each: each.stamp.latest):
        new = each.authority not in [other.authority for other in kept]
        if new and each.stamp.signer not in [other.stamp.signer for other in kept]:
            kept.append(each)
    return kept
