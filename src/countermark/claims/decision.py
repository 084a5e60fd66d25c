"""What a policy is asked about, and what it says: findings, one for each check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from countermark.claims.signed import Claim, TreeHead
from countermark.errors import printable
from countermark.verdict import NoTruthValue, Verdict

Outcome = Literal["accepted", "refused", "undecided"]
EXIT_CODES = {"accepted": 0, "refused": 1, "undecided": 3}


@dataclass(frozen=True)
class Case:
    """What a policy is asked about.

    Attributes:
        claim: the claim.
        heads: tree heads of a ledger that is sound, each over a list with this claim in it.
        verdict: what was found in the suspect, where there is one.
    """

    claim: Claim
    heads: tuple[TreeHead, ...] = ()
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        holds: None where there was nothing to judge by.
        reason: in one sentence.
    """

    check: str
    holds: bool | None
    reason: str


@dataclass(frozen=True)
class Decision(NoTruthValue):
    """What a policy says of a case.

    Accepted when every finding holds, refused when one does not or there is none.
    """

    ask: ClassVar[str] = 'decision.outcome == "accepted"'

    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """accepted, refused, or undecided; a policy that asks nothing refuses."""
        held = [each.holds for each in self.findings]
        if not held or False in held:
            return "refused"
        return "undecided" if None in held else "accepted"

    @property
    def exit_code(self) -> int:
        """0 accepted, 1 refused, 3 undecided."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """Outcome and findings as JSON values."""
        findings = [asdict(each) for each in self.findings]
        return {"outcome": self.outcome, "findings": findings}

    def explain(self) -> str:
        """The findings for people, a line each."""
        signs = {True: "holds ", False: "FAILS ", None: "open  "}
        lines = [f"{self.outcome.upper()}"] + [
            f"  {signs[each.holds]}  {each.check}: {each.reason}" for each in self.findings
        ]
        return "\n".join(map(printable, lines))
