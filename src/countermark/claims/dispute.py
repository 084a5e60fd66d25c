"""Decide between two owners who claim one suspect: who was first, or that it cannot be decided.

Both keys are read from three models: the suspect, and each party's own model, which their claims
fixed. Whoever marks a stolen copy again has two marks in that model, the owner's and their own;
the owner's model has one mark:

    first's mark in second's model, second's mark not in first's   ->  the second's is a copy

A mark that was found in the other party's model counts if its key cannot have been made for that
model afterwards: by its forgery bits, or by half as many forgery bits and a claim that was in a
ledger, under a timestamped tree head, before the other's claim was timestamped. A timestamp on the
claim alone is not enough: it dates the claim and does not count claims (`dating`). A learnt reader
never counts: it has no forgery bits.

A mark can be removed from a copy, for instance by noise in the free weights of dead units. So
nothing is decided against a party whose mark is missing in the suspect, if the suspect's other
neurons are those of that party's own marked model and that model was claimed before the other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from countermark.checkpoints.digest import ModelDigest
from countermark.claims.audit import Audit
from countermark.claims.dating import find_heads_over
from countermark.claims.policy import find_earliest_timestamps
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.statement import format_time
from countermark.claims.timestamp import Authority, Timestamp
from countermark.errors import ClaimError, make_printable
from countermark.results.null_hypotheses import LEAST_DATED_BITS, LEAST_FORGERY_BITS
from countermark.results.verdict import NoTruthValue, Verdict

Side = Literal["first", "second"]
Outcome = Literal["first", "second", "neither", "undecidable"]
Place = Literal["suspect", "first", "second"]
SIDES: tuple[Side, Side] = ("first", "second")
PLACES: tuple[Place, ...] = ("suspect", *SIDES)
# 2 is left to errors of use, as in the other commands.
EXIT_CODES: Mapping[Outcome, int] = {"first": 0, "second": 1, "neither": 1, "undecidable": 3}

LIMITS = (
    "a stamp says that a claim existed by then; that it is older, a party may know and cannot show",
    (
        "keys below 80 forgery bits count only with a ledger in which the examiner counts claims, "
        "from 40 on and against a claim that is dated, too: a key may have been picked to fit what "
        "a party could know of the other's model before that was claimed, if it was published by "
        "then, or what it could foresee, if both begin with one base"
    ),
    "that a mark was not found is no proof that it was never there: marks can be removed",
    (
        "a copy is known by its neurons, in their order or once they are put into it; of a copy "
        "whose residual stream was rotated this is not seen"
    ),
    "it is decided between these two; somebody else may have been before both",
    "the authorities are those that the examiner pinned",
)


@dataclass(frozen=True)
class Party:
    """One of the two parties.

    Attributes:
        claim: the party's claim.
        commitment: the commitment of the party's key, in hexadecimal.
        model: the digest of the model that the party calls its own.
    """

    claim: Claim
    commitment: str
    model: ModelDigest


@dataclass(frozen=True)
class DisputeDecision(NoTruthValue):
    """The decision between the two parties, with its reasons.

    Attributes:
        outcome: whose the suspect is, between the two; or that it cannot be decided.
        reason: the reason in one sentence.
        owners: names of the first and second owner, as in their claims.
        stamped: by when each claim existed, by timestamps of pinned authorities; None if undated.
        counted: by when each claim was in the ledger, by timestamps of pinned authorities on tree
            heads; None if it was not in the ledger, or there is no ledger.
        readings: the verdict on each key in each model.
        limits: the caveats of the decision.
        copies: for each party whose mark is missing in the suspect and whose own model the suspect
            copies, by its neurons: how much of the model is the same.
    """

    ask: ClassVar[str] = "resolution.outcome"

    outcome: Outcome
    reason: str
    owners: tuple[str, str]
    stamped: tuple[str | None, str | None]
    counted: tuple[str | None, str | None]
    readings: Mapping[tuple[Side, Place], Verdict] = field(repr=False)
    limits: tuple[str, ...] = LIMITS
    copies: Mapping[Side, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """Exit code: 0 for the first, 1 for the second or neither, 3 undecidable."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """Return the whole decision as JSON values."""
        readings = [
            {"key": key, "model": place, "found": verdict.owned, "verdict": verdict.to_json()}
            for (key, place), verdict in self.readings.items()
        ]
        return {
            "outcome": self.outcome, "reason": self.reason, "owners": list(self.owners),
            "stamped": list(self.stamped), "counted": list(self.counted), "readings": readings,
            "limits": list(self.limits), "copies": dict(self.copies),
        }  # fmt: skip

    def explain(self) -> str:
        """Return the whole decision as text for people."""
        lines = [f"{self.outcome.upper()}: {self.reason}"]
        told = zip(SIDES, self.owners, self.stamped, self.counted, strict=True)
        for side, owner, stamped, counted in told:
            dated = f"claim stamped {stamped or 'by nobody believed'}"
            dated += f", in the ledger by {counted}" if counted else ", in no stamped ledger"
            lines.append(f"  {side:<7} {owner}; {dated}")
        for (key, place), verdict in self.readings.items():
            where = "the suspect" if place == "suspect" else f"the {place}'s model"
            p = "" if verdict.log10_p is None else f", log10 p {verdict.log10_p:.1f}"
            found = verdict.outcome.replace("_", " ")
            lines.append(f"  reading {key}'s mark in {where}: {found}{p}")
        for side, why in self.copies.items():
            lines.append(f"  the suspect is like the {side}'s model: {why}")
        lines += [f"  limit   {each}" for each in self.limits]
        return "\n".join(map(make_printable, lines))


def resolve(
    parties: tuple[Party, Party],
    readings: Mapping[tuple[Side, Place], Verdict],
    authorities: Sequence[Authority] = (),
    audited: Audit | None = None,
    *,
    doubt: str | None = None,
    copies: Mapping[Side, str] | None = None,
) -> DisputeDecision:
    """Decide between two parties, or say that it cannot be decided.

    Args:
        parties: the first and the second party.
        readings: verdicts on both keys in the suspect and in both models. They were judged with the
            keys' age left open (`assume_dated`) and a threshold that is corrected for six readings,
            and for the commitments in the ledger if there is one.
        authorities: the authorities whose timestamps count.
        audited: the ledger in which the examiner counts claims.
        doubt: why a mark that was not found in the suspect may be there all the same; None if there
            is no such reason.
        copies: the parties whose own models the suspect copies by its neurons although their marks
            were not found in it; with a description of the comparison.

    Raises:
        ClaimError: a claim that is damaged, or not about its party's key and model; or both parties
            show the same key.
    """
    # First make sure that each claim, key and model belong together: otherwise a party could show
    # the claim of somebody else.
    for side, party in zip(SIDES, parties, strict=True):
        _require_matching_claim(side, party)
    if parties[0].commitment == parties[1].commitment:
        raise ClaimError("both parties show one key: expected two, of two owners")
    first, second = (party.claim for party in parties)
    stamped = _find_timestamps([first], authorities), _find_timestamps([second], authorities)
    counted = (
        _find_timestamps(find_heads_over(first, audited), authorities),
        _find_timestamps(find_heads_over(second, audited), authorities),
    )
    outcome, reason = _decide_outcome(
        _DisputeFacts(readings, counted, stamped, doubt, copies or {})
    )
    return DisputeDecision(
        outcome,
        reason,
        (first.owner, second.owner),
        (_format_earliest(stamped[0]), _format_earliest(stamped[1])),
        (_format_earliest(counted[0]), _format_earliest(counted[1])),
        readings,
        copies=copies or {},
    )


def _require_matching_claim(side: Side, party: Party) -> None:
    """Raise `ClaimError` unless a party's claim is about that party's key and model."""
    claim = party.claim
    claim.check_signatures()
    if claim.commitment != party.commitment:
        raise ClaimError(
            f"the {side} claim is about the key {claim.commitment}, the {side} key is "
            f"{party.commitment}: expected the key that was claimed"
        )
    if (claim.model_root, claim.statement.predicate.tensors) != (
        party.model.root, party.model.tensors
    ):  # fmt: skip
        raise ClaimError(
            f"the {side} claim is about the model {claim.model_root}, the {side} model is "
            f"{party.model.root}: expected the model that was claimed"
        )


def _find_timestamps(
    documents: Sequence[Claim | TreeHead], authorities: Sequence[Authority]
) -> list[Timestamp]:
    """Return the earliest timestamp of each authority over any of several documents, sorted."""
    return [each.stamp for each in find_earliest_timestamps(documents, authorities)]


def _format_earliest(stamps: Sequence[Timestamp]) -> str | None:
    """Format the latest time that the first timestamp allows; None without timestamps."""
    return format_time(stamps[0].latest_time) if stamps else None


@dataclass(frozen=True)
class _DisputeFacts:
    """The facts that a dispute is decided by.

    Attributes:
        readings: the verdict on each key in each model.
        counted: for each party, timestamps on tree heads that cover its claim, earliest first.
        stamped: for each party, timestamps on the claim itself, earliest first.
        doubt, copies: as for `resolve`.
    """

    readings: Mapping[tuple[Side, Place], Verdict]
    counted: tuple[Sequence[Timestamp], Sequence[Timestamp]]
    stamped: tuple[Sequence[Timestamp], Sequence[Timestamp]]
    doubt: str | None
    copies: Mapping[Side, str]

    def is_found(self, key: Side, place: Place) -> bool:
        """Return true if a party's mark was found in a model."""
        return self.readings[key, place].owned

    def list_unreadable(self) -> list[str]:
        """Describe the readings that gave no verdict."""
        return [
            f"the {key}'s key in the {place}: {verdict.reason}"
            for (key, place), verdict in self.readings.items()
            if verdict.outcome == "no_verdict"
        ]

    def is_earlier(self, side: Side) -> bool:
        """Return true if a party's claim was in the ledger before the other's first timestamp."""
        own, other = SIDES.index(side), SIDES.index(_get_other_side(side))
        theirs = [each.earliest_time for each in (*self.counted[other], *self.stamped[other])]
        ours = self.counted[own]
        # Compare the latest time that this party's timestamp allows with the earliest time that the
        # other's allow: so inaccurate clocks cannot decide. Without a timestamp of the other party
        # there is no order.
        return bool(ours and theirs) and ours[0].latest_time <= min(theirs)

    def explain_removal(self, side: Side) -> str | None:
        """Say why a party's missing mark may have been removed from the suspect; else return None.

        The party's own model, which the suspect copies, must have been claimed under a timestamped
        tree head before the other's claim was timestamped. A party without timestamps is not older.
        """
        own, other = SIDES.index(side), SIDES.index(_get_other_side(side))
        theirs = [each.earliest_time for each in (*self.counted[other], *self.stamped[other])]
        ours = self.counted[own]
        # Unlike `is_earlier`, a party whose opponent has no timestamp is the older one here: the
        # result only leaves the dispute open.
        older = bool(ours) and (not theirs or ours[0].latest_time <= min(theirs))
        if side not in self.copies or not older or not self.is_found(side, side):
            return None
        return (
            f"the suspect is a copy of the {side}'s own model, in which the {side}'s mark is and "
            f"which was claimed before the {_get_other_side(side)}'s ({self.copies[side]}): the {side}'s "
            "mark may have been removed, unless both models come of one older base, which the "
            "examiner can name"
        )

    def is_conclusive(self, key: Side, place: Place) -> bool:
        """Return true if a mark was found and its key cannot have been made to fit afterwards."""
        verdict = self.readings[key, place]
        dated = verdict.forgery_bits >= LEAST_DATED_BITS and self.is_earlier(key)
        return verdict.owned and (dated or verdict.forgery_bits >= LEAST_FORGERY_BITS)


def _decide_outcome(seen: _DisputeFacts) -> tuple[Outcome, str]:
    """Decide by the facts; return the outcome and its reason."""
    # A reading without a verdict could turn the outcome either way.
    if unsure := seen.list_unreadable():
        return "undecidable", f"a reading says nothing: {unsure[0]}"
    # Both parties must show their marks in their own models before anything else counts.
    if missing := [each for each in SIDES if not seen.is_found(each, each)]:
        return "undecidable", f"the {missing[0]}'s mark is not in the {missing[0]}'s own model"
    in_suspect = [each for each in SIDES if seen.is_found(each, "suspect")]
    if not in_suspect:
        if removed := next((why for each in SIDES if (why := seen.explain_removal(each))), None):
            return "undecidable", f"neither mark was found in the suspect, but {removed}"
        return "neither", "neither mark was found in the suspect"
    if len(in_suspect) == 1:
        return _decide_one_mark(seen, in_suspect[0])
    return _decide_two_marks(seen)


def _decide_one_mark(seen: _DisputeFacts, side: Side) -> tuple[Outcome, str]:
    """Decide if the suspect has the mark of one party only."""
    other = _get_other_side(side)
    # A key that was made after the suspect became known could fit the suspect by trial.
    if not seen.is_conclusive(side, "suspect"):
        return "undecidable", (
            f"only the {side}'s mark is in the suspect, but its key could have been made for it "
            f"afterwards, and its claim is not shown to be older than the {other}'s"
        )
    if seen.is_conclusive(other, side):
        return other, (
            f"the suspect has the {side}'s mark, and the {side}'s own model has the {other}'s: it "
            f"is a copy of the {other}'s"
        )
    if seen.doubt:
        return "undecidable", f"only the {side}'s mark was found in the suspect, but {seen.doubt}"
    if removed := seen.explain_removal(other):
        return "undecidable", f"only the {side}'s mark was found in the suspect, but {removed}"
    return side, f"of the two marks only the {side}'s was found in the suspect"


def _decide_two_marks(seen: _DisputeFacts) -> tuple[Outcome, str]:
    """Decide if the suspect has both marks: the copy is the model that has both."""
    # `copies` holds marks that count, `crossed` every mark in the other party's model: the
    # difference is a mark whose key could have been made for that model.
    copies = [each for each in SIDES if seen.is_conclusive(_get_other_side(each), each)]
    crossed = [each for each in SIDES if seen.is_found(_get_other_side(each), each)]
    if len(copies) == 1:
        copy, owner = copies[0], _get_other_side(copies[0])
        also = (
            ""
            if len(crossed) == 1
            else (
                f"; the {copy}'s mark in the {owner}'s model could have been made to fit afterwards"
            )
        )
        return owner, (
            f"the {copy}'s model has both marks and so is a copy that was marked anew{also}"
        )
    if len(copies) == 2:
        return "undecidable", (
            "each party's mark is in the other's model and no key can have been made afterwards: "
            "both had access to each other's models"
        )
    if crossed:
        return "undecidable", (
            f"the {_get_other_side(crossed[0])}'s mark is in the {crossed[0]}'s model, but its key could "
            "have been made for it afterwards, and no stamped ledger shows that its claim is older"
        )
    return "undecidable", (
        "the suspect has both marks, and neither party's model has the other's: it may come from "
        "both"
    )


def _get_other_side(side: Side) -> Side:
    """Return the other of the two sides."""
    return "second" if side == "first" else "first"
