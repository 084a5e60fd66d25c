"""Decide between two parties who claim one suspect: read both keys from all three models.

A thief can put a model's neurons into another order without changing any of its outputs. If only
one party's mark is in the suspect, the other mark is therefore sought once more in the neuron order
of that party's own model. A mark that is found this way is no evidence, because the mark itself
takes part in finding the order: it only leaves the dispute open. The dispute stays open too if the
suspect lacks the mark of an older claimed model, but its other neurons are those of that model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from countermark.alignment import SuspectWithReference
from countermark.checkpoints import Suspect, compute_model_digest, open_weights
from countermark.claims.audit import Audit, audit_ledger
from countermark.claims.dispute import PLACES, SIDES, DisputeDecision, Party, Place, Side, resolve
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim
from countermark.claims.timestamp import Authority
from countermark.errors import AlignmentError
from countermark.keys.key import Key
from countermark.predictors.base import Predictor
from countermark.results.verdict import Verdict, VerificationOptions
from countermark.verification.copies import compare_units
from countermark.verification.verify import examine
from countermark.verification.verify_aligned import is_possible_reordered_copy

READINGS = len(SIDES) * len(PLACES)
Opened = Callable[[Path, Key], AbstractContextManager["Suspect | Predictor | SuspectWithReference"]]
Readings = dict[tuple[Side, Place], Verdict]


@dataclass(frozen=True)
class PartyExhibits:
    """The exhibits of one party.

    Attributes:
        key: the party's key.
        claim: the party's claim.
        model: file of the model that the party claims.
    """

    key: Key
    claim: Claim
    model: Path


@dataclass(frozen=True)
class ExaminerSettings:
    """The settings by which an examiner decides a dispute.

    Attributes:
        alpha: the largest accepted chance of a false accusation, over all readings.
        believed: authorities whose timestamps count.
        counted: the checked ledger in which commitments are counted, if there is one.
        base: a public model that both parties began with, as far as the examiner knows. Whatever
            the suspect shares with it is no sign of a copy.
    """

    alpha: float
    believed: Sequence[Authority] = ()
    counted: Audit | None = None
    base: Path | None = None


def audit_ledger_at(url: str) -> Audit:
    """Check the whole ledger in which claims are counted, and return the audit."""
    with Ledger(url) as opened:
        return audit_ledger(opened)


def make_dispute_options(alpha: float, counted: Audit | None) -> VerificationOptions:
    """Return the options of the six readings of a dispute.

    Args:
        alpha: the largest accepted chance of a false accusation, over all readings.
        counted: the ledger whose commitments p is corrected for; None for no correction.
    """
    # Whoever registers many commitments gets as many chances to match a suspect, so p is multiplied
    # by their number.
    commitments = max(1, counted.count_commitments()) if counted else 1
    return VerificationOptions(
        alpha, assume_dated=True, dispute_readings=READINGS, claims=commitments
    )


def read_parties(
    suspect: Path, shown: Sequence[PartyExhibits], terms: VerificationOptions, opened: Opened
) -> tuple[tuple[Party, Party], Readings]:
    """Read both keys from all three models.

    Args:
        suspect: file of the model in dispute.
        shown: exhibits of the first party and of the second.
        terms: options of every reading.
        opened: opens a file as a suspect of a key.

    Returns: the two parties as `claims.dispute.resolve` takes them, and the six verdicts.

    Raises:
        SuspectError: a model cannot be read.
    """
    parties = []
    for each in shown:
        with open_weights(each.model) as weights:
            # The decision compares these digests with the claim, which must be about this key and
            # model.
            parties.append(Party(each.claim, each.key.commitment, compute_model_digest(weights)))
    # In the order of `PLACES`: the suspect, then the model of each party.
    files = (suspect, *(each.model for each in shown))
    readings: Readings = {}
    for side, each in zip(SIDES, shown, strict=True):
        for place, file in zip(PLACES, files, strict=True):
            with opened(file, each.key) as found:
                readings[side, place] = examine(found, each.key, terms)
    return (parties[0], parties[1]), readings


def settle_dispute(
    suspect: Path, shown: Sequence[PartyExhibits], opened: Opened, examiner: ExaminerSettings
) -> DisputeDecision:
    """Read both keys from all three models, and decide between the two parties.

    Args:
        suspect: file of the model in dispute.
        shown: exhibits of the first party and of the second.
        opened: opens a file as a suspect of a key.
        examiner: the settings of the decision.

    Raises:
        SuspectError: a model cannot be read.
        ClaimError: a claim is incomplete, or not about its party's key and model.
    """
    parties, readings = read_parties(
        suspect, shown, make_dispute_options(examiner.alpha, examiner.counted), opened
    )
    why = explain_doubt(suspect, shown, readings)
    copies = find_copies(suspect, shown, readings, examiner.base)
    return resolve(parties, readings, examiner.believed, examiner.counted, doubt=why, copies=copies)


def find_copies(
    suspect: Path, shown: Sequence[PartyExhibits], readings: Readings, base: Path | None = None
) -> dict[Side, str]:
    """Find the parties whose mark is missing in a suspect that is a copy of their model.

    Args:
        suspect: file of the model in dispute.
        shown: exhibits of the first party and of the second.
        readings: the six verdicts.
        base: a public model that both parties began with, if known.

    Returns: for each of these parties, in words, how much of the suspect is the same.

    Raises:
        SuspectError: a model cannot be read.
    """
    found: dict[Side, str] = {}
    for side, each in zip(SIDES, shown, strict=True):
        # A mark that is not even in the party's own model says nothing about copies of this model.
        if readings[side, side].owned and not readings[side, "suspect"].owned:
            compared = compare_units(suspect, each.model, base)
            if compared.is_copy:
                found[side] = str(compared)
    return found


def explain_doubt(suspect: Path, shown: Sequence[PartyExhibits], readings: Readings) -> str | None:
    """Explain that a mark may be in the suspect although its neurons were reordered; None if not.

    Args:
        suspect: file of the model in dispute.
        shown: exhibits of the first party and of the second.
        readings: the six verdicts.

    Returns: None if both marks were found or neither was, or if the missing mark is not hidden
        behind another order.
    """
    missing = [side for side in SIDES if not readings[side, "suspect"].owned]
    # With both marks found, or neither, another reading would decide nothing.
    if len(missing) != 1:
        return None
    side, own = missing[0], shown[SIDES.index(missing[0])]
    try:
        hidden = is_possible_reordered_copy(suspect, own.model, own.key)
    except AlignmentError as error:
        return (
            f"the {side}'s may be there behind another order of the neurons, which cannot be "
            f"undone: {error}"
        )
    return f"in the order of the {side}'s own model it has the {side}'s, too" if hidden else None
