"""Verdict: the answer about one suspect and one key, and the null hypothesis behind the answer.

A scheme reads the suspect with a key, a null hypothesis gives the probability of that reading, and
`judge` applies two thresholds: `alpha` against coincidence, and `forgery_bits` against a cheat who
tries many keys. A verdict says that the mark of a key is present, that it is not proven, or that
no verdict is possible. It never says who owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NoReturn, Protocol

from pydantic import ConfigDict

from countermark.results import statistics
from countermark.results.caveats import (
    describe_blind_choice,
    describe_image_choice,
    is_name_order_stated,
    list_caveats,
)
from countermark.results.key_dating import KeyDating
from countermark.results.null_hypotheses import (
    LEAST_DATED_BITS,
    LEAST_FORGERY_BITS,
    LEAST_SIBLINGS,
    NullHypothesis,
    SecretClassMap,
    UnmarkedModels,
    compute_forgery_bits,
)
from countermark.results.owner_statements import (
    compute_rank,
    find_comparison_problem,
    find_exchangeability_problem,
    find_loss_problem,
)
from countermark.results.reading import Disclosure, ImageSimilarity, ReaderFacts, Reading
from countermark.results.subject import STORED, Subject
from countermark.results.test_result import Freedoms, TestResult, list_corrections
from countermark.results.verdict_text import format_verdict

Outcome = Literal["owned", "not_proven", "no_verdict"]

ALPHA = 1e-6
"""The default threshold against coincidence."""

# Exit code 2 is left to errors, for example a suspect that cannot be read.
EXIT_CODES: Mapping[Outcome, int] = {"owned": 0, "not_proven": 1, "no_verdict": 3}


class PublicKeyFacts(Protocol):
    """Public facts of a key, or of triggers that were opened from a key."""

    @property
    def scheme(self) -> str:
        """Name of the key's scheme."""

    @property
    def commitment(self) -> str:
        """Commitment of the key, in hexadecimal."""

    @property
    def owner(self) -> str:
        """Owner that the key names."""

    @property
    def test_key(self) -> bool:
        """Whether anybody can make the same key again."""


@dataclass(frozen=True)
class KeyIdentity:
    """The public facts of a key that a verdict records.

    Attributes:
        scheme, commitment, owner: public facts of the key.
        test_key: true if anybody can make the same key again, so that the key proves nothing.
    """

    # Reports store this class: a field that is unknown or of another type is refused on reading.
    __pydantic_config__: ClassVar[ConfigDict] = STORED

    scheme: str
    commitment: str
    owner: str
    test_key: bool = False

    @classmethod
    def from_key(cls, key: PublicKeyFacts) -> KeyIdentity:
        """Copy the public facts of a key."""
        return cls(key.scheme, key.commitment, key.owner, key.test_key)


class NoTruthValue:
    """A result with more than two outcomes; using it as a truth value raises TypeError.

    Attributes:
        ask: the attribute that callers should use instead.
    """

    ask: ClassVar[str]

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is neither true nor false, since it can also say that it "
            f"cannot tell: ask {self.ask}"
        )


@dataclass(frozen=True)
class Verdict(NoTruthValue):
    """The answer about one suspect and one key.

    A verdict has no truth value, because "not owned" and "cannot tell" are different answers. Use
    `.owned`.

    Attributes:
        outcome: owned (the mark of this key is present), not_proven, or no_verdict.
        reason: the outcome in one sentence, with the statements that it rests on.
        key: public facts of the key that was read.
        subject: description of the suspect and of how it was examined.
        bits, unit: number of raw bits, triggers or images that the key expects.
        alpha: threshold for p.
        result: the judged probability; None if the suspect could not be read.
        evidence: the reading, with the expected values of the key; never part of `to_json`.
        forgery_bits: −log2 of the chance that one tried key fits, corrected for its readings.
        assume_dated: true if the owner stated that the key is older than the suspect.
        blind_choice: true if the examiner stated that triggers, images or class names were chosen
            without knowledge of the key's expected values.
        dating: the age of the key according to a claim; None if no claim was given.
        limits: the caveats of the verdict, in plain words.
    """

    outcome: Outcome
    reason: str
    key: KeyIdentity
    subject: Subject
    bits: int
    unit: Literal["bits", "triggers", "images"] = "bits"
    alpha: float = ALPHA
    result: TestResult | None = None
    # The reading holds secret values of the key: it stays out of `repr`, equality and JSON.
    evidence: Reading | None = field(default=None, repr=False, compare=False)
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
        """Exit code of the command line: 0 owned, 1 not proven, 3 no verdict."""
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
        """Owner that the key names."""
        return self.key.owner

    @property
    def matched(self) -> int | None:
        """Number of bits, triggers or images that agree; None if the suspect could not be read."""
        return None if self.evidence is None else self.evidence.match_count

    @property
    def answer_count(self) -> int | None:
        """Number of bits, triggers or images that the suspect answered; the rest count as misses.

        None if the suspect could not be read.
        """
        return None if self.evidence is None else self.evidence.answer_count

    @property
    def ber(self) -> float | None:
        """Share of bits, triggers or images that disagree: for bits, the bit error rate.

        None if the suspect could not be read.
        """
        return None if self.matched is None else 1 - self.matched / self.bits

    @property
    def ber_interval(self) -> tuple[float, float] | None:
        """95 % Clopper-Pearson interval of `ber`; None if the suspect could not be read."""
        if self.matched is None:
            return None
        return statistics.compute_clopper_pearson(self.bits - self.matched, self.bits)

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
        """log10 of the smallest p that the null hypothesis can give, before corrections."""
        return None if self.result is None else self.result.floor

    @property
    def test_count(self) -> int:
        """Number of chances that this one key had; `result.corrections` lists all corrections."""
        return 0 if self.result is None else self.result.key_factor

    @property
    def payload(self) -> bool | None:
        """Whether the payload was decoded; None if the message is too short for a payload."""
        return None if self.evidence is None else self.evidence.payload

    @property
    def loss(self) -> float | None:
        """L2 of a learnt reader: mean cross-entropy a bit in nats; None for linear keys."""
        # Linear keys may have scores too, but L2 is a criterion for learnt readers only.
        learnt = self.evidence is not None and self.evidence.reader is not None
        return self.evidence.cross_entropy if learnt and self.evidence is not None else None

    @property
    def reader(self) -> ReaderFacts | None:
        """Facts about the learnt reader of the key; None for keys without a learnt reader."""
        return None if self.evidence is None else self.evidence.reader

    @property
    def likeness(self) -> ImageSimilarity | None:
        """Normalised correlation of hidden and revealed images; None for other keys."""
        return None if self.evidence is None else self.evidence.likeness

    @property
    def disclosure(self) -> Disclosure | None:
        """Number of triggers that were opened; None if the whole key was available."""
        return None if self.evidence is None else self.evidence.disclosure

    def to_json(self) -> dict[str, Any]:
        """Return the whole verdict as JSON values; `docs/verdicts.md` explains each field."""
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
            "answered": self.answer_count,
            "matched": self.matched,
            "ber": self.ber,
            "ber_interval": None if interval is None else list(interval),
            "log10_p": self.log10_p,
            "uncorrected_log10_p": None if result is None else result.uncorrected_log10_p,
            "corrections": [asdict(each) for each in corrections],
            "null": self.null,
            "null_says": self.null_says,
            "floor": self.floor,
            "tests": self.test_count,
            "alpha": self.alpha,
            "forgery_bits": self.forgery_bits,
            "payload": self.payload,
            "loss": self.loss,
            "reader": None if self.reader is None else asdict(self.reader),
            "hidden_units": None if (units := self.subject.hidden_units) is None else asdict(units),
            "unmarked": self._describe_unmarked_models(),
            "likeness": None if self.likeness is None else asdict(self.likeness),
            "disclosure": None if self.disclosure is None else asdict(self.disclosure),
            "assume_dated": self.assume_dated,
            "blind_choice": self.blind_choice,
            "dating": None if self.dating is None else self.dating.to_json(),
            "suspect": self.subject.to_json(),
            "limits": list(self.limits),
        }

    def _describe_unmarked_models(self) -> dict[str, Any] | None:
        """Return the examiner's unmarked models, with the suspect's rank among them, as JSON."""
        # Without a reading there is no distance, hence no rank.
        if (models := self.subject.unmarked) == () or self.evidence is None:
            return None
        rank = compute_rank(self.evidence, self.subject)
        return {
            "models": [asdict(each) for each in models],
            "rank": rank,
            "floor": 1 / (len(models) + 1),
        }

    def explain(self) -> str:
        """Return the verdict as lines of text for people."""
        return format_verdict(self)


@dataclass(frozen=True)
class VerificationOptions:
    """The options of a verification: thresholds, and statements that are not measured.

    Attributes:
        alpha: threshold against coincidence, after correction.
        assume_dated: the owner's own statement that the key is older than the suspect.
        blind_choice: the examiner's own statement that the opened triggers were chosen without
            knowledge of their labels, that images were chosen without knowledge of the bits that
            the key reads in them, and that class names were ordered without knowledge of answers.
        allow_test_key: judge a reproducible key as if it were secret; benchmarks only.
        dating: the age of the key according to a claim; p is multiplied by the claim's commitments.
        keys: number of keys that were tried on the suspect and that p is corrected for.
        dispute_readings: number of readings of the dispute that this reading belongs to.
        claims: number of commitments that the key was chosen from, if `dating` does not count them.
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

    def make_freedoms(self, *, opened: bool) -> Freedoms:
        """Return the choices, apart from those in the suspect, that p must be corrected for.

        Args:
            opened: true if the reading is about opened triggers; the blind choice then concerns
                these triggers and not the class names.
        """
        return Freedoms(
            keys=self.keys,
            dispute_readings=self.dispute_readings,
            # The commitments in a claim's ledger multiply the claims that the caller counts.
            claims=self.claims if self.dating is None else self.claims * self.dating.multiplier,
            class_orders=not is_name_order_stated(self, opened=opened),
        )


def judge(
    evidence: Reading,
    null: NullHypothesis,
    *,
    subject: Subject,
    key: KeyIdentity,
    terms: VerificationOptions,
) -> Verdict:
    """Judge a reading under a null hypothesis, and correct p for every choice that was free.

    Args:
        evidence: the best reading of the suspect.
        null: the null hypothesis.
        subject: description of the suspect, with the number of ways in which it was read.
        key: public facts of the key.
        terms: thresholds and statements.
    """
    result = TestResult(
        null=null.name,
        null_says=null.says,
        uncorrected_log10_p=null.compute_log10_p(evidence),
        floor=null.compute_log10_floor(evidence),
        corrections=list_corrections(
            subject, terms.make_freedoms(opened=evidence.disclosure is not None)
        ),
        unmarked_distances=(
            # Reports keep the distances, so the rank can be computed again without the models.
            tuple(map(float, null.distances)) if isinstance(null, UnmarkedModels) else None
        ),
    )
    return judge_result(evidence, result, subject=subject, key=key, terms=terms)


def judge_result(
    evidence: Reading,
    result: TestResult,
    *,
    subject: Subject,
    key: KeyIdentity,
    terms: VerificationOptions,
) -> Verdict:
    """Apply both thresholds to a probability that was computed before.

    Args:
        evidence: the reading of the suspect.
        result: the probability of the reading.
        subject: description of the suspect.
        key: public facts of the key.
        terms: thresholds and statements.
    """
    # `key_factor` omits claims and dispute readings: they give a cheat no further chances.
    against_forgery = compute_forgery_bits(evidence, result.key_factor)
    # Readings of the other kinds always have 0 forgery bits: a date is their only protection
    # (docs/verdicts.md).
    foreseeable = evidence.committed or result.null == SecretClassMap.name
    measured = _DecisionInputs(
        result,
        against_forgery,
        evidence,
        foreseeable,
        chosen=describe_image_choice(evidence, result.null),
        freely_chosen=describe_blind_choice(evidence, result.null, subject),
        subject=subject,
    )
    outcome, reason = _decide_outcome(measured, terms, test_key=key.test_key)
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
        limits=list_caveats(evidence, result, outcome, terms, subject),
    )


def make_no_verdict(
    reason: str, *, bits: int, subject: Subject, key: KeyIdentity, terms: VerificationOptions,
    unit: Literal["bits", "triggers", "images"] = "bits",
) -> Verdict:  # fmt: skip
    """Make the verdict for a suspect that could not be read or judged with this key."""
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
class _DecisionInputs:
    """The values that the decision compares with the thresholds and the statements."""

    result: TestResult
    forgery_bits: float
    evidence: Reading
    foreseeable: bool
    chosen: str | None  # how somebody may have cheated by choosing images
    freely_chosen: str | None  # what a blind choice states about this reading
    subject: Subject


def _describe_best_reading(measured: _DecisionInputs) -> str:
    """Describe the reading that would give the smallest p."""
    evidence, result = measured.evidence, measured.result
    if result.unmarked_model_count is None:
        opened = "" if evidence.disclosure is None else " opened"
        return f"even a perfect reading of its {evidence.readable_count}{opened} {evidence.unit}"
    if result.unmarked_model_count:
        whose = "that you supplied" if measured.subject.unmarked else "in the key"
        return f"even a rank before all {result.unmarked_model_count} unmarked models {whose}"
    return "it was measured on no unmarked models (siblings), and a rank among none"


def _decide_outcome(  # noqa: PLR0911 - one reason after the other
    measured: _DecisionInputs, terms: VerificationOptions, *, test_key: bool
) -> tuple[Outcome, str]:
    """Return the outcome and its reason.

    The checks run from "nothing can be proven here" to "the finding is not proof enough", and the
    first check that fails decides.
    """
    # A key whose secret is public proves nothing, whatever it reads: this check comes first.
    log10_alpha, result = math.log10(terms.alpha), measured.result
    if test_key and not terms.allow_test_key:
        return "no_verdict", "this is a test key: anybody can make it again, so it proves nothing"
    if why := find_loss_problem(measured.evidence):
        return "not_proven", why
    if why := find_exchangeability_problem(result, measured.subject):
        return "no_verdict", why
    # If even the best reading stays above alpha, a miss says nothing: no verdict, not "not proven".
    if result.least_log10_p > log10_alpha:
        return "no_verdict", (
            "this key cannot prove anything here: "
            f"{_describe_best_reading(measured)} gives log10 p "
            f"{result.least_log10_p:.2f}, above the threshold {log10_alpha:.2f}"
        )
    if result.log10_p > log10_alpha:
        return "not_proven", "the mark of this key was not found"
    # From here on p is small enough; the remaining checks can only withhold the verdict.
    if why := _find_distinction_problem(measured):
        return "no_verdict", why
    if why := _find_forgery_problem(measured, terms):
        return "no_verdict", f"the mark is there, but {why}"
    return "owned", _append_statements("the mark of this key is present", measured, terms)


def _find_distinction_problem(measured: _DecisionInputs) -> str | None:
    """Return why the suspect may be an unmarked model despite a small p; None if that is excluded.

    Both the owner's siblings and the examiner's unmarked models are consulted.
    """
    # The owner's sibling threshold can only make a verdict stricter, so it is checked first.
    reader = measured.evidence.reader
    if reader is not None and (why := _find_sibling_problem(reader)):
        return why
    return find_comparison_problem(measured.evidence, measured.result, measured.subject)


def _append_statements(finding: str, measured: _DecisionInputs, terms: VerificationOptions) -> str:
    """Append to a finding the statements without which it would not have been made."""
    stated = []
    if unmarked := len(measured.subject.unmarked):
        models = "model is" if unmarked == 1 else f"{unmarked} models are"
        stated.append(f"the supplied {models} unmarked (the examiner's statement)")
    if measured.freely_chosen and terms.blind_choice:
        stated.append(f"{measured.freely_chosen} (the examiner's statement)")
    # A reading with 80 forgery bits or more needs no date, hence no statement about the date.
    if measured.forgery_bits < LEAST_FORGERY_BITS:
        if terms.assume_dated:
            stated.append("the key is older than the suspect (the owner's statement)")
        elif terms.dating is not None:
            date = terms.dating.suspect_date
            stated.append(f"the suspect is not older than {date} (the examiner's statement)")
    return f"{finding}, provided that {' and that '.join(stated)}" if stated else finding


def _find_forgery_problem(measured: _DecisionInputs, terms: VerificationOptions) -> str | None:
    """Return how a cheat may have obtained this reading; None if bits or statements exclude it."""
    evidence, dating = measured.evidence, terms.dating
    # A choice of images needs no trial of keys, so forgery bits cannot exclude it.
    if measured.chosen and not terms.blind_choice:
        return f"{measured.chosen}, which you may state (--blind-choice)"
    if measured.forgery_bits >= LEAST_FORGERY_BITS or terms.assume_dated:
        return None
    if dating is None or not dating.is_dated:
        needed = "a dated claim is needed (--assume-dated is the owner's own statement)"
        if dating is not None:
            needed = f"the claim does not date the key, since {dating.why}"
        return f"{_describe_forgery(measured)}: {needed}"
    # A claim dates the key's commitment; a reference outside it may be younger than the suspect.
    if evidence.alignment is not None and not evidence.alignment.is_committed:
        return (
            f"{_describe_forgery(measured)}, or beforehand to fit a base that it shares: a claim dates a "
            "key, no reference (--assume-dated states that of both)"
        )
    # A date excludes keys made for the suspect, not a key that was picked before the claim, in
    # 2^forgery_bits trials, because it fits answers or base weights that can be foreseen.
    if measured.foreseeable and measured.forgery_bits < LEAST_DATED_BITS:
        return (
            "a key that fits what can be foreseen of a suspect could have been picked before the "
            f"claim among 2^{measured.forgery_bits:.0f}, fewer than 2^{LEAST_DATED_BITS:.0f}"
        )
    return None


def _describe_forgery(measured: _DecisionInputs) -> str:
    """Describe how a cheat could obtain this reading with a key or reference made afterwards."""
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


def _find_sibling_problem(reader: ReaderFacts) -> str | None:
    """Return why the suspect may be an unmarked sibling of the marked model, or None."""
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
