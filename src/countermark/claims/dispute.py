"""Two owners, two claims, one suspect: who was first, and when that cannot be told.

Both keys are read from three models: the suspect, and each party's own, which their claims fixed.
Who marks a stolen copy anew has two marks in it, the owner's and his own; the owner's has one:

    first's mark in second's model, second's mark not in first's   ->  the second's is a copy

A mark that was found in another's model counts when nobody can have made its key for that model
afterwards: by its forgery bits, or by half as many and a claim that was in a ledger, under a
stamped tree head, before the other's was stamped. A stamp on the claim alone does not do: it dates
and does not count (`dating`). A reader that was learnt never counts: it has no forgery bits.

A mark can be removed from a copy, for instance by noise in the free weights of dead units. So where
a mark is missing, but the suspect's other neurons are those of that party's own marked model, and
that model was claimed before the other's, nothing is decided against that party.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from countermark.claims.audit import Audit
from countermark.claims.dating import heads_over
from countermark.claims.policy import earliest
from countermark.claims.signed import Claim, TreeHead
from countermark.claims.statement import instant
from countermark.claims.timestamp import Authority, Stamp
from countermark.errors import ClaimError, printable
from countermark.nulls import LEAST_DATED_BITS, LEAST_FORGERY_BITS
from countermark.verdict import NoTruthValue, Verdict
from countermark.weights.digest import ModelDigest

Side = Literal["first", "second"]
Outcome = Literal["first", "second", "neither", "undecidable"]
Place = Literal["suspect", "first", "second"]
SIDES: tuple[Side, Side] = ("first", "second")
PLACES: tuple[Place, ...] = ("suspect", *SIDES)
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
    """One of the two.

    Attributes:
        claim: what it claims.
        commitment: of the key that it gave.
        model: the digest of the model that it calls its own.
    """

    claim: Claim
    commitment: str
    model: ModelDigest


@dataclass(frozen=True)
class Resolution(NoTruthValue):
    """What can be said about the two.

    Attributes:
        outcome: whose the suspect is, between the two; or that it cannot be told.
        reason: in one sentence.
        owners: as in the claims, first and second.
        stamped: by when each claim existed, as pinned authorities stamped it; None where undated.
        counted: by when it was in the ledger, likewise; None where it was not, or there is none.
        readings: for each key and place, whether its mark was found, and the verdict.
        limits: what this does not say.
        copies: for each party whose mark is missing in the suspect and whose own model the suspect
            is a copy of, by its neurons: how much of it is the same.
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
        """0 for the first, 1 for the second or neither, 3 undecidable."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
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
        """All of it for people."""
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
        return "\n".join(map(printable, lines))


def resolve(
    parties: tuple[Party, Party],
    readings: Mapping[tuple[Side, Place], Verdict],
    authorities: Sequence[Authority] = (),
    audited: Audit | None = None,
    *,
    doubt: str | None = None,
    copies: Mapping[Side, str] | None = None,
) -> Resolution:
    """Decide between two parties, or say that it cannot be decided.

    Args:
        parties: first and second.
        readings: both keys in the suspect and in both models, judged with their age left open
            (`assume_dated`) and a threshold that is corrected for six readings, and for the
            commitments in the ledger where there is one.
        authorities: whose time stamps are believed.
        audited: the ledger that the examiner counts in.
        doubt: why a mark that was not found in the suspect may be there all the same; None where
            nothing speaks for it.
        copies: the parties of whose own models the suspect is a copy by its neurons, although their
            marks were not found in it; with what was compared, in words.

    Raises:
        ClaimError: a claim that is not whole, or not about its party's key and model.
    """
    for side, party in zip(SIDES, parties, strict=True):
        _require_about(side, party)
    if parties[0].commitment == parties[1].commitment:
        raise ClaimError("both parties show one key: expected two, of two owners")
    first, second = (party.claim for party in parties)
    stamped = _stamps([first], authorities), _stamps([second], authorities)
    counted = (
        _stamps(heads_over(first, audited), authorities),
        _stamps(heads_over(second, audited), authorities),
    )
    outcome, reason = _decided(_Seen(readings, counted, stamped, doubt, copies or {}))
    return Resolution(
        outcome,
        reason,
        (first.owner, second.owner),
        (_told(stamped[0]), _told(stamped[1])),
        (_told(counted[0]), _told(counted[1])),
        readings,
        copies=copies or {},
    )


def _require_about(side: Side, party: Party) -> None:
    claim = party.claim
    claim.check()
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


def _stamps(documents: Sequence[Claim | TreeHead], authorities: Sequence[Authority]) -> list[Stamp]:
    """The earliest stamp of each authority over any of several documents, in that order."""
    return [each.stamp for each in earliest(documents, authorities)]


def _told(stamps: Sequence[Stamp]) -> str | None:
    """By when it existed."""
    return instant(stamps[0].latest) if stamps else None


@dataclass(frozen=True)
class _Seen:
    """The readings, the stamps over each claim in the ledger, and on it, and what is doubtful."""

    readings: Mapping[tuple[Side, Place], Verdict]
    counted: tuple[Sequence[Stamp], Sequence[Stamp]]
    stamped: tuple[Sequence[Stamp], Sequence[Stamp]]
    doubt: str | None
    copies: Mapping[Side, str]

    def found(self, key: Side, place: Place) -> bool:
        return self.readings[key, place].owned

    def unsure(self) -> list[str]:
        """What could not be read."""
        return [
            f"the {key}'s key in the {place}: {verdict.reason}"
            for (key, place), verdict in self.readings.items()
            if verdict.outcome == "no_verdict"
        ]

    def earlier(self, side: Side) -> bool:
        """Whether a party's claim was in the ledger before anybody stamped the other's."""
        own, other = SIDES.index(side), SIDES.index(_other(side))
        theirs = [each.soonest for each in (*self.counted[other], *self.stamped[other])]
        ours = self.counted[own]
        return bool(ours and theirs) and ours[0].latest <= min(theirs)

    def removed(self, side: Side) -> str | None:
        """Say why a party's missing mark may have been removed from the suspect; None if nothing.

        Its own model, of which the suspect is a copy, has to be claimed under a stamped head, and
        before anybody stamped the other's claim: whoever stamps nothing is not the older one.
        """
        own, other = SIDES.index(side), SIDES.index(_other(side))
        theirs = [each.soonest for each in (*self.counted[other], *self.stamped[other])]
        ours = self.counted[own]
        older = bool(ours) and (not theirs or ours[0].latest <= min(theirs))
        if side not in self.copies or not older or not self.found(side, side):
            return None
        return (
            f"the suspect is a copy of the {side}'s own model, in which the {side}'s mark is and "
            f"which was claimed before the {_other(side)}'s ({self.copies[side]}): the {side}'s "
            "mark may have been removed, unless both models come of one older base, which the "
            "examiner can name"
        )

    def counts(self, key: Side, place: Place) -> bool:
        """Whether a mark is there, and its key cannot have been made to fit afterwards."""
        verdict = self.readings[key, place]
        dated = verdict.forgery_bits >= LEAST_DATED_BITS and self.earlier(key)
        return verdict.owned and (dated or verdict.forgery_bits >= LEAST_FORGERY_BITS)


def _decided(seen: _Seen) -> tuple[Outcome, str]:
    if unsure := seen.unsure():
        return "undecidable", f"a reading says nothing: {unsure[0]}"
    if missing := [each for each in SIDES if not seen.found(each, each)]:
        return "undecidable", f"the {missing[0]}'s mark is not in the {missing[0]}'s own model"
    in_suspect = [each for each in SIDES if seen.found(each, "suspect")]
    if not in_suspect:
        if removed := next((why for each in SIDES if (why := seen.removed(each))), None):
            return "undecidable", f"neither mark was found in the suspect, but {removed}"
        return "neither", "neither mark was found in the suspect"
    if len(in_suspect) == 1:
        return _one_mark(seen, in_suspect[0])
    return _two_marks(seen)


def _one_mark(seen: _Seen, side: Side) -> tuple[Outcome, str]:
    """The suspect has one of the marks; whose it is, is asked only if nobody made that key late."""
    other = _other(side)
    if not seen.counts(side, "suspect"):
        return "undecidable", (
            f"only the {side}'s mark is in the suspect, but its key could have been made for it "
            f"afterwards, and its claim is not shown to be older than the {other}'s"
        )
    if seen.counts(other, side):
        return other, (
            f"the suspect has the {side}'s mark, and the {side}'s own model has the {other}'s: it "
            f"is a copy of the {other}'s"
        )
    if seen.doubt:
        return "undecidable", f"only the {side}'s mark was found in the suspect, but {seen.doubt}"
    if removed := seen.removed(other):
        return "undecidable", f"only the {side}'s mark was found in the suspect, but {removed}"
    return side, f"of the two marks only the {side}'s was found in the suspect"


def _two_marks(seen: _Seen) -> tuple[Outcome, str]:
    """The suspect has both: the copy is the model in which both are."""
    copies = [each for each in SIDES if seen.counts(_other(each), each)]
    crossed = [each for each in SIDES if seen.found(_other(each), each)]
    if len(copies) == 1:
        copy, owner = copies[0], _other(copies[0])
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
            f"the {_other(crossed[0])}'s mark is in the {crossed[0]}'s model, but its key could "
            "have been made for it afterwards, and no stamped ledger shows that its claim is older"
        )
    return "undecidable", (
        "the suspect has both marks, and neither party's model has the other's: it may come from "
        "both"
    )


def _other(side: Side) -> Side:
    return "second" if side == "first" else "first"
