"""Verdict: the answer, and the null hypothesis behind it.

A scheme extracts evidence, a null gives its probability, `judge` applies both thresholds:
`alpha` against coincidence, `forgery_bits` against a cheat who tries keys. A verdict says that the
mark of a key is present, or not proven, or that nothing can be said; never who owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from countermark import stats
from countermark.age import Dating
from countermark.evidence import Disclosure, Evidence, Likeness, Reader
from countermark.limits import images_chosen, limits_of
from countermark.nulls import (
    LEAST_DATED_BITS,
    LEAST_FORGERY_BITS,
    LEAST_SIBLINGS,
    Null,
    SecretClassMap,
    UnmarkedModels,
    forgery_bits,
)
from countermark.telling import explained

Outcome = Literal["owned", "not_proven", "no_verdict"]

ALPHA = 1e-6
"""The default threshold against coincidence."""

EXIT_CODES: Mapping[Outcome, int] = {"owned": 0, "not_proven": 1, "no_verdict": 3}


@dataclass(frozen=True)
class Verdict:
    """What can be said about one suspect and one key.

    Attributes:
        outcome: owned (the mark of this key is present), not_proven, or no_verdict.
        reason: the outcome in one sentence.
        scheme, commitment, owner: the key that was read, by what is public of it.
        bits, matched, ber, ber_interval: raw bits, how many agree, the bit error rate with its
            95 % Clopper-Pearson interval; or the same of triggers, as `unit` says.
        answered: how many of them the suspect gave an answer to; the others count as misses.
        log10_p: log10 of the probability of a false accusation, corrected for `tests`.
        null, null_says, floor: the null hypothesis, in words, and log10 of its smallest p.
        tests: how many readings were tried and corrected for (Bonferroni on the best one).
        alpha: the threshold for p.
        forgery_bits: −log2 of the chance that one tried key fits, corrected for `tests`.
        payload: decoded or not; None when the message is too short to carry one.
        loss: L2 of a learnt reader, mean cross-entropy a bit in nats; None for linear keys.
        reader: what is known of a learnt reader: held-out unmarked `siblings`, the sibling
            `threshold`, `permuted` copies of the suspect, `false_reads` among them, `published`.
        likeness: `nc` of hidden and revealed pictures, and `nc_blank`, what a blank would get.
        disclosure: how many of the key's triggers were `opened`, of how many `committed` ones, and
            whether a `blind_choice` was stated; None where the whole key was there.
        assume_dated: the owner stated that the key is older than the suspect.
        dating: what a claim says about that; None where none was given.
        suspect: name, digests and tensors of what was read.
        limits: what the verdict does not say, in plain words.
    """

    outcome: Outcome
    reason: str
    scheme: str
    commitment: str
    owner: str
    bits: int
    unit: str = "bits"
    answered: int | None = None
    matched: int | None = None
    ber: float | None = None
    ber_interval: tuple[float, float] | None = None
    log10_p: float | None = None
    null: str | None = None
    null_says: str | None = None
    floor: float | None = None
    tests: int = 0
    alpha: float = ALPHA
    forgery_bits: float = 0.0
    payload: bool | None = None
    loss: float | None = None
    reader: Reader | None = None
    likeness: Likeness | None = None
    disclosure: Disclosure | None = None
    assume_dated: bool = False
    dating: Dating | None = None
    suspect: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()

    @property
    def owned(self) -> bool:
        """Whether the mark of this key is present."""
        return self.outcome == "owned"

    @property
    def exit_code(self) -> int:
        """0 owned, 1 not proven, 3 no verdict."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        interval = None if self.ber_interval is None else list(self.ber_interval)
        found = asdict(self) | {"limits": list(self.limits), "ber_interval": interval}
        if self.dating is not None:
            found["dating"]["authorities"] = list(self.dating.authorities)
        return found

    def explain(self) -> str:
        """The verdict for people, as lines of text."""
        return explained(self)


@dataclass(frozen=True)
class Judged:
    """What a verdict follows from.

    Attributes:
        evidence: the best reading that was found.
        null: the null hypothesis.
        tests: how many readings were tried.
        log10_p: by the null, before any correction.
    """

    evidence: Evidence
    null: Null
    tests: int
    log10_p: float


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
        told: is given what was judged, for a record.
    """

    alpha: float = ALPHA
    assume_dated: bool = False
    blind_choice: bool = False
    allow_test_key: bool = False
    dating: Dating | None = None
    keys: int = 1
    told: Callable[[Judged], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")

    @property
    def multiplier(self) -> int:
        """How many keys a claimant could have chosen this one from."""
        return 1 if self.dating is None else self.dating.multiplier


def judge(
    evidence: Evidence, null: Null, *, tests: int, terms: Terms, about: Mapping[str, Any]
) -> Verdict:
    """Apply both thresholds to evidence.

    Args:
        evidence: the best reading that was found.
        null: the null hypothesis to judge it by.
        tests: how many readings were tried; p is multiplied by it, and by the commitments that a
            claim is one of.
        terms: the thresholds and statements.
        about: `scheme`, `commitment`, `owner`, `suspect` and `test_key` for the verdict's record.
    """
    tests *= terms.keys
    correction = math.log10(tests * terms.multiplier)
    judged = Judged(evidence, null, tests, null.log10_p(evidence))
    if terms.told is not None:
        terms.told(judged)
    log10_p = min(0.0, judged.log10_p + correction)
    floor = null.log10_floor(evidence)
    against_forgery = forgery_bits(evidence, tests)
    least = _Least(floor + correction, _best_reading(evidence, null))
    # Of all other kinds the date is all there is: see docs/verdicts.md.
    foreseeable = evidence.committed or isinstance(null, SecretClassMap)
    chosen = images_chosen(evidence, null)
    thresholds = _Measured(log10_p, least, against_forgery, evidence, foreseeable, chosen)
    outcome, reason = _decide(thresholds, terms, test_key=about["test_key"])
    return Verdict(
        outcome=outcome,
        reason=reason,
        scheme=about["scheme"],
        commitment=about["commitment"],
        owner=about["owner"],
        bits=evidence.bits,
        unit=evidence.unit,
        answered=evidence.answered,
        matched=evidence.matched,
        ber=1 - evidence.matched / evidence.bits,
        ber_interval=stats.clopper_pearson(evidence.bits - evidence.matched, evidence.bits),
        log10_p=log10_p,
        null=null.name,
        null_says=null.says,
        floor=floor,
        tests=tests,
        alpha=terms.alpha,
        forgery_bits=against_forgery,
        payload=evidence.payload,
        loss=evidence.cross_entropy if evidence.reader else None,
        reader=evidence.reader,
        likeness=evidence.likeness,
        disclosure=evidence.disclosure,
        assume_dated=terms.assume_dated,
        dating=terms.dating,
        suspect=about["suspect"],
        limits=limits_of(evidence, null, outcome, terms, about["suspect"]),
    )


def no_verdict(
    reason: str, *, bits: int, terms: Terms, about: Mapping[str, Any], unit: str = "bits"
) -> Verdict:
    """The verdict of a key that could not be read at all, and why."""
    return Verdict(
        unit=unit,
        outcome="no_verdict",
        reason=reason,
        scheme=about["scheme"],
        commitment=about["commitment"],
        owner=about["owner"],
        bits=bits,
        alpha=terms.alpha,
        assume_dated=terms.assume_dated,
        dating=terms.dating,
        suspect=about["suspect"],
    )


@dataclass(frozen=True)
class _Least:
    """The smallest p that there is, corrected for the number of tests, and what would give it."""

    log10_p: float
    by: str


@dataclass(frozen=True)
class _Measured:
    """What is held against the thresholds, all of it corrected for the number of tests."""

    log10_p: float
    least: _Least
    forgery_bits: float
    evidence: Evidence
    foreseeable: bool
    chosen: str | None  # how whoever chose the images may have cheated


def _best_reading(evidence: Evidence, null: Null) -> str:
    """What would give the smallest p, in words."""
    if not isinstance(null, UnmarkedModels):
        opened = "" if evidence.disclosure is None else " opened"
        return f"even a perfect reading of its {evidence.readable}{opened} {evidence.unit}"
    if len(null.distances):
        return f"even a rank before all {len(null.distances)} unmarked models in the key"
    return "it was measured on no unmarked models (siblings), and a rank among none"


def _decide(measured: _Measured, terms: Terms, *, test_key: bool) -> tuple[Outcome, str]:
    log10_alpha = math.log10(terms.alpha)
    reader = measured.evidence.reader
    if test_key and not terms.allow_test_key:
        return "no_verdict", "this is a test key: anybody can make it again, so it proves nothing"
    if measured.least.log10_p > log10_alpha:
        return "no_verdict", (
            f"this key cannot prove anything here: {measured.least.by} gives log10 p "
            f"{measured.least.log10_p:.2f}, above the threshold {log10_alpha:.2f}"
        )
    if measured.log10_p > log10_alpha:
        return "not_proven", "the mark of this key was not found"
    if reader is not None and (why := _perhaps_a_sibling(reader)):
        return "no_verdict", why
    if why := _not_kept_out(measured, terms):
        return "no_verdict", f"the mark is there, but {why}"
    return "owned", "the mark of this key is present"


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
    if evidence.alignment is not None:
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
    if measured.evidence.alignment:
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
