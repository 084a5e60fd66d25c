"""Two parties and a suspect, from their files: both keys read from all three models.

Whoever takes a model can put its neurons into another order, and none of its outputs changes. So
where one mark alone is in the suspect, the other is sought in the order of that party's own model.
What is found then is no evidence, since the mark has its part in the order: it leaves the dispute
open. So does a suspect whose other neurons are those of an older claimed model, without its mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from countermark.alignment import Disguised
from countermark.answers import Predict
from countermark.claims.audit import Audit, audit
from countermark.claims.dispute import PLACES, SIDES, Party, Place, Resolution, Side, resolve
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim
from countermark.claims.timestamp import Authority
from countermark.copies import likeness
from countermark.errors import AlignmentError
from countermark.examine import examine
from countermark.examine_aligned import perhaps_disguised
from countermark.key import Key
from countermark.verdict import Terms, Verdict
from countermark.weights import Suspect, model_digest, open_weights

READINGS = len(SIDES) * len(PLACES)
Opened = Callable[[Path, Key], AbstractContextManager["Suspect | Predict | Disguised"]]
Readings = dict[tuple[Side, Place], Verdict]


@dataclass(frozen=True)
class Shown:
    """What a party shows: its key, its claim, and the model that it claimed, as a file."""

    key: Key
    claim: Claim
    model: Path


@dataclass(frozen=True)
class Examiner:
    """What the examiner of a dispute decides by.

    Attributes:
        alpha: the largest chance of a false accusation, over all readings.
        believed: whose time stamps count.
        counted: the ledger, as `audited` reads it.
        base: a public model that both parties began with, as far as the examiner knows: what the
            suspect has in common with it is then no sign of a copy.
    """

    alpha: float
    believed: Sequence[Authority] = ()
    counted: Audit | None = None
    base: Path | None = None


def audited(url: str) -> Audit:
    """The whole ledger in which claims are counted, checked."""
    with Ledger(url) as opened:
        return audit(opened)


def terms_of(alpha: float, counted: Audit | None) -> Terms:
    """The terms of six readings, by keys out of so many commitments."""
    commitments = max(1, counted.count()) if counted else 1
    return Terms(alpha, assume_dated=True, dispute_readings=READINGS, claims=commitments)


def read_parties(
    suspect: Path, shown: Sequence[Shown], terms: Terms, opened: Opened
) -> tuple[tuple[Party, Party], Readings]:
    """The two parties for `claims.dispute.resolve`, and both keys' verdicts on all three models.

    Args:
        suspect: the model in dispute.
        shown: by the first party, and by the second.
        terms: of every reading.
        opened: how a file is opened as a suspect of a key.

    Raises:
        SuspectError: a model that cannot be read.
    """
    parties = []
    for each in shown:
        with open_weights(each.model) as weights:
            parties.append(Party(each.claim, each.key.commitment, model_digest(weights)))
    files = (suspect, *(each.model for each in shown))
    readings: Readings = {}
    for side, each in zip(SIDES, shown, strict=True):
        for place, file in zip(PLACES, files, strict=True):
            with opened(file, each.key) as found:
                readings[side, place] = examine(found, each.key, terms)
    return (parties[0], parties[1]), readings


def settle(suspect: Path, shown: Sequence[Shown], opened: Opened, examiner: Examiner) -> Resolution:
    """Read both keys from all three models, and decide between the two parties.

    Args:
        suspect: the model in dispute.
        shown: by the first party, and by the second.
        opened: how a file is opened as a suspect of a key.
        examiner: what the decision is made by.

    Raises:
        SuspectError: a model that cannot be read.
        ClaimError: a claim that is not whole, or not about its party's key and model.
    """
    parties, readings = read_parties(
        suspect, shown, terms_of(examiner.alpha, examiner.counted), opened
    )
    why = doubt(suspect, shown, readings)
    copies = copies_of(suspect, shown, readings, examiner.base)
    return resolve(parties, readings, examiner.believed, examiner.counted, doubt=why, copies=copies)


def copies_of(
    suspect: Path, shown: Sequence[Shown], readings: Readings, base: Path | None = None
) -> dict[Side, str]:
    """Find the parties whose models the suspect is a copy of, among those whose marks are missing.

    Args:
        suspect: the model in dispute.
        shown: by the first party, and by the second.
        readings: as `read_parties` gives them.
        base: as of an `Examiner`.

    Returns: for each of them, in words, how much of the suspect is the same.

    Raises:
        SuspectError: a model that cannot be read.
    """
    found: dict[Side, str] = {}
    for side, each in zip(SIDES, shown, strict=True):
        if readings[side, side].owned and not readings[side, "suspect"].owned:
            compared = likeness(suspect, each.model, base)
            if compared.is_copy:
                found[side] = str(compared)
    return found


def doubt(suspect: Path, shown: Sequence[Shown], readings: Readings) -> str | None:
    """Why a mark that was not found in the suspect may be there, behind another order of neurons.

    None where both marks were found, or neither, or the one that was not cannot be hidden so.
    """
    missing = [side for side in SIDES if not readings[side, "suspect"].owned]
    if len(missing) != 1:
        return None
    side, own = missing[0], shown[SIDES.index(missing[0])]
    try:
        hidden = perhaps_disguised(suspect, own.model, own.key)
    except AlignmentError as error:
        return (
            f"the {side}'s may be there behind another order of the neurons, which cannot be "
            f"undone: {error}"
        )
    return f"in the order of the {side}'s own model it has the {side}'s, too" if hidden else None
