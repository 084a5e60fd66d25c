"""Verdict: the answer, and the null hypothesis behind it.

A scheme extracts evidence, a null gives its probability, `judge` applies both thresholds:
`alpha` against coincidence, `forgery_bits` against a cheat who tries keys. A verdict says that the
mark of a key is present, or not proven, or that nothing can be said; never who owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from countermark import stats
from countermark.errors import printable
from countermark.nulls import (
    LEAST_SIBLINGS,
    Disclosure,
    Evidence,
    Likeness,
    Null,
    PermutedUnits,
    Reader,
    SecretClassMap,
    UnmarkedModels,
    forgery_bits,
)  # fmt: skip

Outcome = Literal["owned", "not_proven", "no_verdict"]

ALPHA = 1e-6
"""The default threshold against coincidence."""

LEAST_FORGERY_BITS = 80.0
"""Below this an undated key proves nothing: 2^80 keys could be tried for one that fits."""

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
        return asdict(self) | {"limits": list(self.limits), "ber_interval": interval}

    def explain(self) -> str:
        """The verdict for people, as lines of text."""
        lines = [f"{self.outcome.upper().replace('_', ' ')}: {self.reason}"]
        if self.matched is not None and self.ber_interval is not None:
            low, high = self.ber_interval
            lines += [
                (
                    f"  matched       {self.matched} of {self.bits} {self.unit} "
                    f"({_RATES[self.unit]} {self.ber:.4f}, 95 % interval {low:.4f} to {high:.4f})"
                ),
                (
                    f"  log10 p       {self.log10_p:.2f}, corrected for {self.tests} test(s); "
                    f"threshold {math.log10(self.alpha):.2f}, floor {self.floor:.2f}"
                ),
                f"  null          {self.null}: {self.null_says}",
                (
                    f"  forgery_bits  {self.forgery_bits:.1f} "
                    f"(an undated key needs {LEAST_FORGERY_BITS:.0f})"
                ),
            ]
            if self.unit == "bits":
                lines.append(f"  payload       {_PAYLOAD[self.payload]}")
            elif self.unit == "triggers" and self.answered != self.bits:
                lines.append(
                    f"  answered      {self.answered} of {self.bits}; the others are misses"
                )
            if self.unit == "images":
                lines.append(
                    f"  published     success rate {self.matched / self.bits:.4f}: refused as "
                    "proof, its rank among unmarked networks is judged instead"
                )
            if self.unit == "triggers" and self.null == UnmarkedModels.name:
                lines.append(
                    f"  published     trigger accuracy {self.matched / self.bits:.4f}: refused as "
                    "proof, its rank among unmarked models is judged instead"
                )
        if "images" in self.suspect:
            lines.append(f"  images        {_counted(self.suspect)}")
        if self.likeness is not None:
            lines.append(
                f"  NC            {self.likeness.nc:.4f} of hidden and revealed pictures; a blank "
                f"gets {self.likeness.nc_blank:.4f}"
            )
        if self.disclosure is not None:
            shown = self.disclosure
            lines.append(f"  opened        {shown.opened} of the key's {shown.committed} triggers")
        if self.reader is not None:
            lines += [f"  {line}" for line in self._of_the_reader(self.reader)]
        lines += [f"  limit         {limit}" for limit in self.limits]
        return "\n".join(printable(line) for line in lines)  # a key's or suspect's names may lie

    def _of_the_reader(self, reader: Reader) -> list[str]:
        lines = [f"L2            {self.loss:.3g} nats a bit; ln 2 = 0.693 knows nothing"]
        if reader.threshold is None:
            lines.append(f"siblings      {reader.siblings} held-out: too few for a threshold")
        else:
            lines.append(
                f"siblings      L2 must be below {reader.threshold:.3g}, set on {reader.siblings} "
                f"held-out unmarked siblings; one passes with p <= {1 / (reader.siblings + 1):.2g}"
            )
        lines.append(
            f"false reads   {reader.false_reads} of {reader.permuted} hidden-unit permutations of "
            "the suspect read at least as many bits"
        )
        if reader.published is not None and self.loss is not None:
            met = "met" if self.loss <= reader.published else "not met"
            lines.append(
                f"published     L2 <= {reader.published:g}: {met}; refused as proof, "
                "the rank of L2 is judged instead"
            )
        return lines


_RATES = {
    "bits": "bit error rate", "triggers": "share of misses", "images": "share of failures"
}  # fmt: skip
_PAYLOAD = {
    True: "decoded: it names this key's owner",
    False: "not decoded (the p-value above is about raw bits and stands without it)",
    None: "none: fewer than 128 bits carry no payload",
}


def _counted(suspect: Mapping[str, Any]) -> str:
    """How many images were read, and how many were skipped for which reasons."""
    reasons = suspect["skipped"]["reasons"]
    if not reasons:
        return f"{suspect['images']} read"
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{suspect['images']} read, {sum(reasons.values())} skipped ({why})"


WHOSE = (
    "it says that the mark of a key is present or not; who owns the model is another question, "
    "answered by dated claims under a policy"
)
WHAT_P_IS = (
    "p is the chance of this reading on a model made without the key's secret; it is not the "
    "probability that the suspect is innocent"
)
NOT_INNOCENT = (
    "not proven is not innocent: a mark can be removed, and tensors that were permuted, rescaled "
    "or folded are not realigned before reading"
)
NOT_INNOCENT_OF_TRIGGERS = (
    "not proven is not innocent: a mark can be removed, classes can be renamed, and whoever "
    "answers can recognise triggers and lie"
)
NOT_INNOCENT_OF_OUTPUTS = (
    "not proven is not innocent: images that were cropped, resized or filtered, or made by a "
    "network that could not learn the mark, are read as they are"
)
ONE_SET = (
    "all images count as one set with one message: how many there are makes the reading better, "
    "and p no smaller; whoever chose them must not have chosen by what the key reads"
)
BURNT = (
    "whoever saw the triggers, the operator of a queried service included, can train them out: "
    "they are evidence once"
)

OPENED_LATER = (
    "p is about a model made without knowledge of the opened triggers: one made after they were "
    "opened can be trained on them"
)


def _opened(shown: Disclosure) -> str:
    """How many triggers were opened, and what that makes of p."""
    if shown.opened == shown.committed:
        return f"all {shown.committed} of the key's triggers were opened"
    if shown.blind_choice:
        what = (
            "p is about these alone and holds only if whoever chose them did not know their "
            "labels: the owner did not choose them, as the examiner states"
        )
    else:
        what = "the others count as misses, so p holds whoever chose these"
    return f"{shown.opened} of the key's {shown.committed} triggers were opened; {what}"


ANYBODYS = (
    "these triggers and answers are no keyed random output: whoever can ask a model, or knows how "
    "the stego network was trained, may make triggers that get such answers"
)
BLIND_COVERS = (
    "the covers of fresh triggers must be chosen by somebody who did not look at what the suspect "
    "answers: p does not know how they were chosen"
)
RANK_AMONG_UNMARKED = (
    "log10 p is a rank among {n} unmarked models that the owner trained and measured: it is never "
    "below 1/{more}, and speaks of models like them"
)


INDEPENDENT_ONLY = (
    "log10 p is against models trained independently from other initial weights; against "
    "fine-tunes of a shared base and twins from the same initial weights only the sibling "
    "threshold speaks"
)
BITS_MEAN_NOTHING = (
    "the reader was trained on the message, so the number of matching bits, its interval and the "
    "payload are no evidence by themselves: p is the rank of L2"
)


@dataclass(frozen=True)
class Terms:
    """The terms of a judgement: what is asked, and what is stated rather than measured.

    Attributes:
        alpha: threshold against coincidence, after correction.
        assume_dated: the owner's own statement that the key is older than the suspect.
        blind_choice: the examiner's own statement that whoever chose which triggers were opened did
            not know their labels; of no effect with a whole key.
        allow_test_key: let a reproducible key be judged as if it were secret; benchmarks only.
    """

    alpha: float = ALPHA
    assume_dated: bool = False
    blind_choice: bool = False
    allow_test_key: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")


def judge(
    evidence: Evidence, null: Null, *, tests: int, terms: Terms, about: Mapping[str, Any]
) -> Verdict:
    """Apply both thresholds to evidence.

    Args:
        evidence: the best reading that was found.
        null: the null hypothesis to judge it by.
        tests: how many readings were tried; p is multiplied by it.
        terms: the thresholds and statements.
        about: `scheme`, `commitment`, `owner`, `suspect` and `test_key` for the verdict's record.
    """
    correction = math.log10(tests)
    log10_p = min(0.0, null.log10_p(evidence) + correction)
    floor = null.log10_floor(evidence)
    against_forgery = forgery_bits(evidence, tests)
    found = about["suspect"].get("tensors", {})
    renamed = [f"{wanted} as {name}" for wanted, name in found.items() if wanted != name]
    least = _Least(floor + correction, _best_reading(evidence, null))
    thresholds = _Measured(log10_p, least, against_forgery, evidence)
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
        suspect=about["suspect"],
        limits=_limits(evidence, null, outcome, terms, renamed),
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
    if reader is not None and (why := _perhaps_a_sibling(reader, measured.evidence)):
        return "no_verdict", why
    if measured.forgery_bits < LEAST_FORGERY_BITS and not terms.assume_dated:
        return "no_verdict", (
            f"the mark is there, but {_forged(measured)}: a dated claim is needed (--assume-dated "
            "is the owner's own statement)"
        )
    return "owned", "the mark of this key is present"


def _forged(measured: _Measured) -> str:
    """How a cheat would come to such a reading."""
    if measured.evidence.reader:
        return "a reader can be trained afterwards to find any bits in anybody's model"
    if measured.evidence.unit == "images":
        return "networks can be trained afterwards to reveal any picture in anybody's images"
    if measured.evidence.unit == "triggers" and not measured.evidence.committed:
        return "a key can be made afterwards to which anybody's model gives such answers"
    return (
        f"a key that fits could be found by trying 2^{measured.forgery_bits:.0f} of them, fewer "
        f"than 2^{LEAST_FORGERY_BITS:.0f}"
    )


def _perhaps_a_sibling(reader: Reader, evidence: Evidence) -> str | None:
    """Why the suspect may be an unmarked relative of the marked model; None when it is below."""
    loss = evidence.cross_entropy
    if reader.threshold is None or loss is None:
        return (
            "no copy can be told from a sibling of the marked model: the key was measured on "
            f"{reader.siblings} held-out unmarked siblings, and a threshold needs {LEAST_SIBLINGS}"
        )
    if loss <= reader.threshold:
        return None
    return (
        f"the suspect may be an unmarked sibling of the marked model: its L2 {loss:.3g} is not "
        f"below the sibling threshold {reader.threshold:.3g}"
    )


def _limits(
    evidence: Evidence, null: Null, outcome: Outcome, terms: Terms, renamed: list[str]
) -> tuple[str, ...]:
    limits = [WHOSE, WHAT_P_IS]
    if evidence.reader is not None:
        limits.append(BITS_MEAN_NOTHING)
    limits += _limits_of(null, evidence)
    if outcome == "not_proven":
        limits.append(_not_innocent(evidence))
    if evidence.likeness is not None:
        limits.append(ONE_SET)
    if evidence.unit == "triggers":
        limits.append(BURNT)
    if evidence.disclosure is not None:
        limits += [_opened(evidence.disclosure), OPENED_LATER]
    if renamed:
        limits.append(
            f"found by shape, not by name: {', '.join(renamed)}; p is corrected for every reading "
            "that was tried"
        )
    if terms.assume_dated:
        limits.append("that the key is older than the suspect is the owner's own statement")
    if evidence.payload is False and outcome == "owned":
        limits.append("the payload is lost: the mark is present by its raw bits only")
    return tuple(limits)


def _not_innocent(evidence: Evidence) -> str:
    if evidence.likeness is not None:
        return NOT_INNOCENT_OF_OUTPUTS
    return NOT_INNOCENT if evidence.unit == "bits" else NOT_INNOCENT_OF_TRIGGERS


def _limits_of(null: Null, evidence: Evidence) -> list[str]:
    """What a null hypothesis does not cover."""
    if isinstance(null, PermutedUnits):
        return [INDEPENDENT_ONLY]
    if isinstance(null, SecretClassMap):
        return [BLIND_COVERS]
    if not isinstance(null, UnmarkedModels):
        return []
    n = len(null.distances)
    ranked = RANK_AMONG_UNMARKED.format(n=n, more=n + 1)
    return [ranked, ANYBODYS] if evidence.unit == "triggers" else [ranked]
