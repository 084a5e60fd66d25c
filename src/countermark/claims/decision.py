"""The case that a policy judges, and its decision: findings, one for each check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from countermark.claims.signed import Claim, TreeHead
from countermark.errors import make_printable
from countermark.results.verdict import NoTruthValue, Verdict

Outcome = Literal["accepted", "refused", "undecided"]
# 2 is left to errors of use, as in the other commands.
EXIT_CODES = {"accepted": 0, "refused": 1, "undecided": 3}


@dataclass(frozen=True)
class PolicyCase:
    """A claim and the facts beside it that a policy judges.

    Attributes:
        claim: the claim.
        heads: tree heads of a sound ledger, each over a list that contains this claim.
        verdict: the verdict on the suspect, if one was read.
    """

    claim: Claim
    heads: tuple[TreeHead, ...] = ()
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: name of the check.
        holds: whether it holds; None if there was nothing to judge by.
        reason: the reason in one sentence.
    """

    check: str
    holds: bool | None
    reason: str


@dataclass(frozen=True)
class Decision(NoTruthValue):
    """The decision of a policy on a case.

    It is accepted if every finding holds, and refused if one fails or there is no finding.
    """

    ask: ClassVar[str] = 'decision.outcome == "accepted"'

    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """Outcome: "accepted", "refused" or "undecided"; a policy without checks refuses."""
        held = [each.holds for each in self.findings]
        # A failure outweighs an open check. No checks at all would hold trivially, so they are
        # refused.
        if not held or False in held:
            return "refused"
        return "undecided" if None in held else "accepted"

    @property
    def exit_code(self) -> int:
        """Exit code: 0 accepted, 1 refused, 3 undecided."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """Return outcome and findings as JSON values."""
        findings = [asdict(each) for each in self.findings]
        return {"outcome": self.outcome, "findings": findings}

    def explain(self) -> str:
        """Return the outcome and one line for each finding, as text for people."""
        signs = {True: "holds ", False: "FAILS ", None: "open  "}
        lines = [f"{self.outcome.upper()}"] + [
            f"  {signs[each.holds]}  {each.check}: {each.reason}" for each in self.findings
        ]
        # Reasons quote claims that anybody may have written: control characters must not reach a
        # terminal.
        return "\n".join(map(make_printable, lines))
