"""Verdict: the answer, and the null hypothesis behind it.

A scheme extracts evidence, a null gives its probability, `judge` applies both thresholds:
`alpha` against coincidence, `forgery_bits` against a cheat who tries keys. A verdict says that the
mark of a key is present, or not proven, or that nothing can be said; never who owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NoReturn, Protocol

from pydantic import ConfigDict

from countermark import stats
from countermark.evidence import Disclosure, Evidence, Likeness, Reader
from countermark.key_dating import KeyDating
from countermark.limits import blind_choice_of, images_chosen, limits_of, names_stated
from countermark.nulls import (
    LEAST_DATED_BITS,
    LEAST_FORGERY_BITS,
    LEAST_SIBLINGS,
    Null,
    SecretClassMap,
    UnmarkedModels,
    forgery_bits,
)
from countermark.owners_word import knows_nothing, not_compared, not_exchangeable, rank_among
from countermark.subject import STORED, Subject
from countermark.telling import explained
from countermark.test_result import Freedoms, TestResult, corrections_of

Outcome = Literal["owned", "not_proven", "no_verdict"]

ALPHA = 1e-6
"""The default threshold against coincidence."""

EXIT_CODES: Mapping[Outcome, int] = {"owned": 0, "not_proven": 1, "no_verdict": 3}


class PublicKeyFacts(Protocol):
    """What is public of a key, or of its opened triggers."""

    @property
    def scheme(self) -> str:
        """Name of its scheme."""

    @property
    def commitment(self) -> str:
        """The commitment, in hexadecimal."""

    @property
    def owner(self) -> str:
        """Whose key it is."""

    @property
    def test_key(self) -> bool:
        """Whether anybody can make it again."""


@dataclass(frozen=True)
class KeyIdentity:
    """What a verdict says of a key.

    Attributes:
        scheme, commitment, owner: what is public of it.
        test_key: whether anybody can make it again, so that it proves nothing.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    scheme: str
    commitment: str
    owner: str
    test_key: bool = False

    @classmethod
    def of(cls, key: PublicKeyFacts) -> KeyIdentity:
        """Copy what is public of a key."""
        return cls(key.scheme, key.commitment, key.owner, key.test_key)


class NoTruthValue:
    """A finding with more than two outcomes, which `if` must not flatten to true.

    Attributes:
        ask: what to ask in its place.
    """

    ask: ClassVar[str]

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is neither true nor false, since it can also say that it "
            f"cannot tell: ask {self.ask}"
        )


@dataclass(frozen=True)
class Verdict(NoTruthValue):
    """What can be said about one suspect and one key.

    A verdict is no truth value: "not owned" and "cannot tell" are two answers. Ask `.owned`.

    Attributes:
        outcome: owned (the mark of this key is present), not_proven, or no_verdict.
        reason: the outcome in one sentence, with the statements that it rests on.
        key: the key that was read, by what is public of it.
        subject: what was examined.
        bits, unit: how many raw bits, triggers or images the key expects.
        alpha: the threshold for p.
        result: the judged probability; None where nothing was read.
        evidence: what was read, which says what the key expects; never part of `to_json`.
        forgery_bits: −log2 of the chance that one tried key fits, corrected for its readings.
        assume_dated: the owner stated that the key is older than the suspect.
        blind_choice: the examiner stated that nobody chose what fits (`Terms.blind_choice`).
        dating: what a claim says about the key's age; None where none was given.
        limits: what the verdict does not say, in plain words.
    """

    outcome: Outcome
    reason: str
    key: KeyIdentity
    subject: Subject
    bits: int
    unit: Literal["bits", "triggers", "images"] = "bits"
    alpha: float = ALPHA
    result: TestResult | None = None
    evidence: Evidence | None = field(default=None, repr=False, compare=False)
    forgery_bits: float = 0.0
    assume_dated: bool = False
    blind_choice: bool = False
    dating: KeyDating | None = None
    limits: tuple[str, ...] = ()

    ask: ClassVar[str] = "verdict.owned, or compare verdict.outcome"

    @property
    def owned(self) -> bool:
        """Whether the mark of this key is present."""
        return self.outcome == "owned"

    @property
    def exit_code(self) -> int:
        """0 owned, 1 not proven, 3 no verdict."""
        return EXIT_CODES[self.outcome]

    @property
    def scheme(self) -> str:
        """Name of the key's scheme."""
        return self.key.scheme

    @property
    def commitment(self) -> str:
        """Commitment of the key, in hexadecimal."""
        return self.key.commitment

    @property
    def owner(self) -> str:
        """The owner that the key names."""
        return self.key.owner

    @property
    def matched(self) -> int | None:
        """How many bits, triggers or images agree; None where nothing was read."""
        return None if self.evidence is None else self.evidence.matched

    @property
    def answered(self) -> int | None:
        """How many of them the suspect gave an answer to; the others count as misses."""
        return None if self.evidence is None else self.evidence.answered

    @property
    def ber(self) -> float | None:
        """The share that disagrees: of bits, the bit error rate."""
        return None if self.matched is None else 1 - self.matched / self.bits

    @property
    def ber_interval(self) -> tuple[float, float] | None:
        """The 95 % Clopper-Pearson interval of `ber`."""
        if self.matched is None:
            return None
        return stats.clopper_pearson(self.bits - self.matched, self.bits)

    @property
    def log10_p(self) -> float | None:
        """log10 of the probability of a false accusation, after all corrections."""
        return None if self.result is None else self.result.log10_p

    @property
    def null(self) -> str | None:
        """Name of the null hypothesis."""
        return None if self.result is None else self.result.null

    @property
    def null_says(self) -> str | None:
        """The null hypothesis in words."""
        return None if self.result is None else self.result.null_says

    @property
    def floor(self) -> float | None:
        """log10 of the smallest p that the null can give, before corrections."""
        return None if self.result is None else self.result.floor

    @property
    def tests(self) -> int:
        """How many chances this one key had; `result.corrections` names them all."""
        return 0 if self.result is None else self.result.key_factor

    @property
    def payload(self) -> bool | None:
        """Decoded or not; None when the message is too short to carry a payload."""
        return None if self.evidence is None else self.evidence.payload

    @property
    def loss(self) -> float | None:
        """L2 of a learnt reader, mean cross-entropy a bit in nats; None for linear keys."""
        learnt = self.evidence is not None and self.evidence.reader is not None
        return self.evidence.cross_entropy if learnt and self.evidence is not None else None

    @property
    def reader(self) -> Reader | None:
        """What is known of a learnt reader."""
        return None if self.evidence is None else self.evidence.reader

    @property
    def likeness(self) -> Likeness | None:
        """Normalised correlation of hidden and revealed images."""
        return None if self.evidence is None else self.evidence.likeness

    @property
    def disclosure(self) -> Disclosure | None:
        """How many of the key's triggers were opened; None where the whole key was there."""
        return None if self.evidence is None else self.evidence.disclosure

    def to_json(self) -> dict[str, Any]:
        """All that is said, as JSON values; `docs/verdicts.md` explains each field."""
        interval, result = self.ber_interval, self.result
        corrections = () if result is None else result.corrections
        return {
            "outcome": self.outcome,
            "reason": self.reason,
            "scheme": self.scheme,
            "commitment": self.commitment,
            "owner": self.owner,
            "bits": self.bits,
            "unit": self.unit,
            "answered": self.answered,
            "matched": self.matched,
            "ber": self.ber,
            "ber_interval": None if interval is None else list(interval),
            "log10_p": self.log10_p,
            "uncorrected_log10_p": None if result is None else result.uncorrected_log10_p,
            "corrections": [asdict(each) for each in corrections],
            "null": self.null,
            "null_says": self.null_says,
            "floor": self.floor,
            "tests": self.tests,
            "alpha": self.alpha,
            "forgery_bits": self.forgery_bits,
            "payload": self.payload,
            "loss": self.loss,
            "reader": None if self.reader is None else asdict(self.reader),
            "hidden_units": None if (units := self.subject.hidden_units) is None else asdict(units),
            "unmarked": self._compared(),
            "likeness": None if self.likeness is None else asdict(self.likeness),
            "disclosure": None if self.disclosure is None else asdict(self.disclosure),
            "assume_dated": self.assume_dated,
            "blind_choice": self.blind_choice,
            "dating": None if self.dating is None else self.dating.to_json(),
            "suspect": self.subject.to_json(),
            "limits": list(self.limits),
        }

    def _compared(self) -> dict[str, Any] | None:
        """The examiner's unmarked models, and the suspect's rank among them."""
        if (models := self.subject.unmarked) == () or self.evidence is None:
            return None
        rank = rank_among(self.evidence, self.subject)
        return {
            "models": [asdict(each) for each in models],
            "rank": rank,
            "floor": 1 / (len(models) + 1),
        }

    def explain(self) -> str:
        """The verdict for people, as lines of text."""
        return explained(self)


@dataclass(frozen=True)
class Terms:
    """The terms of a judgement: what is asked, and what is stated rather than measured.

    Attributes:
        alpha: threshold against coincidence, after correction.
        assume_dated: the owner's own statement that the key is older than the suspect.
        blind_choice: the examiner's own statement that whoever chose which triggers were opened did
            not know their labels, whoever chose pictures not what the key reads in them, and
            whoever ordered the names of classes not the answers.
        allow_test_key: let a reproducible key be judged as if it were secret; benchmarks only.
        dating: what a claim says about the key's age; p is multiplied by its commitments.
        keys: how many keys were tried on the suspect and are to be corrected for.
        dispute_readings: how many readings the dispute rests on that this one is of.
        claims: how many commitments the key was one of, where no dating counts them.
    """

    alpha: float = ALPHA
    assume_dated: bool = False
    blind_choice: bool = False
    allow_test_key: bool = False
    dating: KeyDating | None = None
    keys: int = 1
    dispute_readings: int = 1
    claims: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")

    def freedoms(self, *, opened: bool) -> Freedoms:
        """List what could be chosen beside the suspect.

        Args:
            opened: the evidence is about opened triggers, of which alone a blind choice speaks.
        """
        return Freedoms(
            keys=self.keys,
            dispute_readings=self.dispute_readings,
            claims=self.claims if self.dating is None else self.claims * self.dating.multiplier,
            class_orders=not names_stated(self, opened=opened),
        )


def judge(
    evidence: Evidence, null: Null, *, subject: Subject, key: KeyIdentity, terms: Terms
) -> Verdict:
    """Judge evidence by a null hypothesis, corrected for every freedom that there was.

    Args:
        evidence: the best reading that was found.
        null: the null hypothesis to judge it by.
        subject: what was read, and in how many ways.
        key: whose reading it is.
        terms: the thresholds and statements.
    """
    result = TestResult(
        null=null.name,
        null_says=null.says,
        uncorrected_log10_p=null.log10_p(evidence),
        floor=null.log10_floor(evidence),
        corrections=corrections_of(subject, terms.freedoms(opened=evidence.disclosure is not None)),
        unmarked_distances=(
            tuple(map(float, null.distances)) if isinstance(null, UnmarkedModels) else None
        ),
    )
    return judge_result(evidence, result, subject=subject, key=key, terms=terms)


def judge_result(
    evidence: Evidence, result: TestResult, *, subject: Subject, key: KeyIdentity, terms: Terms
) -> Verdict:
    """Apply both thresholds to a probability that is known already.

    Args:
        evidence: what was read.
        result: its probability.
        subject: what was examined.
        key: whose reading it is.
        terms: the thresholds and statements.
    """
    against_forgery = forgery_bits(evidence, result.key_factor)
    # Of all other kinds the date is all there is: see docs/verdicts.md.
    foreseeable = evidence.committed or result.null == SecretClassMap.name
    measured = _Measured(
        result,
        against_forgery,
        evidence,
        foreseeable,
        chosen=images_chosen(evidence, result.null),
        freely_chosen=blind_choice_of(evidence, result.null, subject),
        subject=subject,
    )
    outcome, reason = _decide(measured, terms, test_key=key.test_key)
    return Verdict(
        outcome=outcome,
        reason=reason,
        key=key,
        subject=subject,
        bits=evidence.bits,
        unit=evidence.unit,
        alpha=terms.alpha,
        result=result,
        evidence=evidence,
        forgery_bits=against_forgery,
        assume_dated=terms.assume_dated,
        blind_choice=terms.blind_choice,
        dating=terms.dating,
        limits=limits_of(evidence, result, outcome, terms, subject),
    )


def no_verdict(
    reason: str, *, bits: int, subject: Subject, key: KeyIdentity, terms: Terms,
    unit: Literal["bits", "triggers", "images"] = "bits",
) -> Verdict:  # fmt: skip
    """Make the verdict of a key that could not be read at all, and say why."""
    return Verdict(
        outcome="no_verdict",
        reason=reason,
        key=key,
        subject=subject,
        bits=bits,
        unit=unit,
        alpha=terms.alpha,
        assume_dated=terms.assume_dated,
        blind_choice=terms.blind_choice,
        dating=terms.dating,
    )


@dataclass(frozen=True)
class _Measured:
    """What is held against the thresholds."""

    result: TestResult
    forgery_bits: float
    evidence: Evidence
    foreseeable: bool
    chosen: str | None  # how whoever chose the images may have cheated
    freely_chosen: str | None  # what a blind choice states of this reading
    subject: Subject


def _best_reading(measured: _Measured) -> str:
    """Say in words what would give the smallest p."""
    evidence, result = measured.evidence, measured.result
    if result.unmarked_models is None:
        opened = "" if evidence.disclosure is None else " opened"
        return f"even a perfect reading of its {evidence.readable}{opened} {evidence.unit}"
    if result.unmarked_models:
        whose = "that you supplied" if measured.subject.unmarked else "in the key"
        return f"even a rank before all {result.unmarked_models} unmarked models {whose}"
    return "it was measured on no unmarked models (siblings), and a rank among none"


def _decide(  # noqa: PLR0911 - one reason after the other
    measured: _Measured, terms: Terms, *, test_key: bool
) -> tuple[Outcome, str]:
    log10_alpha, result = math.log10(terms.alpha), measured.result
    if test_key and not terms.allow_test_key:
        return "no_verdict", "this is a test key: anybody can make it again, so it proves nothing"
    if why := knows_nothing(measured.evidence):
        return "not_proven", why
    if why := not_exchangeable(result, measured.subject):
        return "no_verdict", why
    if result.least_log10_p > log10_alpha:
        return "no_verdict", (
            "this key cannot prove anything here: "
            f"{_best_reading(measured)} gives log10 p "
            f"{result.least_log10_p:.2f}, above the threshold {log10_alpha:.2f}"
        )
    if result.log10_p > log10_alpha:
        return "not_proven", "the mark of this key was not found"
    if why := _not_told_apart(measured):
        return "no_verdict", why
    if why := _not_kept_out(measured, terms):
        return "no_verdict", f"the mark is there, but {why}"
    return "owned", _with_statements("the mark of this key is present", measured, terms)


def _not_told_apart(measured: _Measured) -> str | None:
    """Why the suspect may be unmarked however small p is, by the owner's models or examiner's."""
    reader = measured.evidence.reader
    if reader is not None and (why := _perhaps_a_sibling(reader)):
        return why
    return not_compared(measured.evidence, measured.result, measured.subject)


def _with_statements(finding: str, measured: _Measured, terms: Terms) -> str:
    """Name the statements without which the finding would not have been made."""
    stated = []
    if unmarked := len(measured.subject.unmarked):
        models = "model is" if unmarked == 1 else f"{unmarked} models are"
        stated.append(f"the supplied {models} unmarked (the examiner's statement)")
    if measured.freely_chosen and terms.blind_choice:
        stated.append(f"{measured.freely_chosen} (the examiner's statement)")
    aligned = measured.evidence.alignment
    if aligned is not None and aligned.is_committed and not aligned.names_architecture:
        stated.append(
            "the reference is of the architecture that was named (the examiner's statement)"
        )
    if measured.forgery_bits < LEAST_FORGERY_BITS:
        if terms.assume_dated:
            stated.append("the key is older than the suspect (the owner's statement)")
        elif terms.dating is not None:
            date = terms.dating.suspect_date
            stated.append(f"the suspect is not older than {date} (the examiner's statement)")
    return f"{finding}, provided that {' and that '.join(stated)}" if stated else finding


def _not_kept_out(measured: _Measured, terms: Terms) -> str | None:
    """Why a cheat may have come to such a reading; None where bits or statements keep him out."""
    evidence, dating = measured.evidence, terms.dating
    if measured.chosen and not terms.blind_choice:
        return f"{measured.chosen}, which you may state (--blind-choice)"
    if measured.forgery_bits >= LEAST_FORGERY_BITS or terms.assume_dated:
        return None
    if dating is None or not dating.dated:
        needed = "a dated claim is needed (--assume-dated is the owner's own statement)"
        if dating is not None:
            needed = f"the claim does not date the key, since {dating.why}"
        return f"{_forged(measured)}: {needed}"
    if evidence.alignment is not None and not evidence.alignment.is_committed:
        return (
            f"{_forged(measured)}, or beforehand to fit a base that it shares: a claim dates a "
            "key, no reference (--assume-dated states that of both)"
        )
    if measured.foreseeable and measured.forgery_bits < LEAST_DATED_BITS:
        return (
            "a key that fits what can be foreseen of a suspect could have been picked before the "
            f"claim among 2^{measured.forgery_bits:.0f}, fewer than 2^{LEAST_DATED_BITS:.0f}"
        )
    return None


def _forged(measured: _Measured) -> str:
    """How a cheat would come to such a reading."""
    if measured.evidence.reader:
        return "a reader can be trained afterwards to find any bits in anybody's model"
    if measured.evidence.alignment and not measured.evidence.alignment.is_committed:
        return "a reference can be made afterwards to which anybody's model aligns as wished"
    if measured.evidence.unit == "images":
        return "networks can be trained afterwards to reveal any picture in anybody's images"
    if measured.evidence.unit == "triggers" and not measured.evidence.committed:
        return "a key can be made afterwards to which anybody's model gives such answers"
    return (
        f"a key that fits could be found by trying 2^{measured.forgery_bits:.0f} of them, fewer "
        f"than 2^{LEAST_FORGERY_BITS:.0f}"
    )


def _perhaps_a_sibling(reader: Reader) -> str | None:
    """Why the suspect may be an unmarked relative of the marked model; None when it is below."""
    loss = reader.quiet_loss
    if reader.threshold is None:
        return (
            "no copy can be told from a sibling of the marked model: the key was measured on "
            f"{reader.siblings} held-out unmarked siblings, and a threshold needs {LEAST_SIBLINGS}"
        )
    if loss is None:
        return (
            "no copy can be told from a louder sibling of the marked model: the key does not say "
            "how loud that is, as those that were made before it did; mark the model again"
        )
    if loss <= reader.threshold:
        return None
    return (
        f"the suspect may be an unmarked sibling of the marked model: its L2 {loss:.3g}, no unit "
        f"louder than in that, is not below the sibling threshold {reader.threshold:.3g}"
    )
