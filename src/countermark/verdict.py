"""Verdict: the answer, and the null hypothesis behind it.

A scheme extracts evidence, a null gives its probability, `judge` applies both thresholds:
`alpha` against coincidence, `forgery_bits` against a cheat who tries keys. A verdict says that the
mark of a key is present, or not proven, or that nothing can be said; never who owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from countermark import stats
from countermark.message import Bits

Outcome = Literal["owned", "not_proven", "no_verdict"]

ALPHA = 1e-6
"""The default threshold against coincidence."""

LEAST_FORGERY_BITS = 80.0
"""Below this an undated key proves nothing: 2^80 keys could be tried for one that fits."""

EXIT_CODES: Mapping[Outcome, int] = {"owned": 0, "not_proven": 1, "no_verdict": 3}


@dataclass(frozen=True)
class Evidence:
    """What a key read out of a suspect.

    Attributes:
        read: the raw bits (T,) that were read.
        expected: the message (T,).
        committed: whether `expected` is XOF output over a commitment that holds everything else;
            only then does a cheat have to search for a key that fits.
        payload: whether the payload decodes; None when the message has none.
        scores: the real values (T,) whose signs are the bits, where a scheme has them.
    """

    read: Bits = field(repr=False)
    expected: Bits = field(repr=False)
    committed: bool = True
    payload: bool | None = None
    scores: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def bits(self) -> int:
        """T."""
        return len(self.expected)

    @property
    def matched(self) -> int:
        """How many of the T bits are as expected."""
        return int(np.count_nonzero(self.read == self.expected))

    @property
    def cross_entropy(self) -> float | None:
        """E_R per bit in nats: the mean of −log P(expected bit) under sigmoid(scores)."""
        if self.scores is None:
            return None
        agreement = (2.0 * self.expected - 1.0) * self.scores
        return float(np.logaddexp(0.0, -agreement).mean())


class Null(Protocol):
    """A null hypothesis: how probable evidence is on a model that never saw the mark."""

    name: ClassVar[str]
    says: ClassVar[str]

    def log10_p(self, evidence: Evidence) -> float:
        """log10 of the probability of evidence at least as good."""

    def log10_floor(self, evidence: Evidence) -> float:
        """log10 of the smallest p that this null can give."""


@dataclass(frozen=True)
class FairCoin:
    """Each raw bit agrees with probability ½: exact where the message is XOF output.

    p = P[Bin(T, ½) ≥ k]. Exact for every suspect that does not depend on the key's secret,
    siblings of the marked model included.
    """

    name: ClassVar[str] = "fair_coin"
    says: ClassVar[str] = (
        "on a model made without this key's secret each raw bit agrees with probability 1/2, "
        "independently, because the message is keyed random output fixed by the commitment"
    )

    def log10_p(self, evidence: Evidence) -> float:
        """The exact binomial tail."""
        return stats.log10_binomial_tail(evidence.matched, evidence.bits)

    def log10_floor(self, evidence: Evidence) -> float:
        """T matches out of T: 2^−T."""
        return -evidence.bits * math.log10(2)


@dataclass(frozen=True)
class FreshKeys:
    """The owner's key ranked among new keys on the same suspect: exact for linear keys.

    p = (1 + #{fresh keys that match at least as many bits}) / (draws + 1), stopping early at
    `stop_at` exceedances (Besag and Clifford 1991), which keeps it valid.

    Attributes:
        redraw: draws one fresh key of the same scheme, fields and owner, and returns how many of
            its own bits it finds in the suspect.
        draws: how many fresh keys at the most.
    """

    name: ClassVar[str] = "fresh_keys"
    says: ClassVar[str] = (
        "on a model made without this key's secret the owner's key ranks among fresh keys of the "
        "same scheme, read from the same suspect, like any one of them"
    )

    redraw: Callable[[], int] = field(repr=False)
    draws: int = 1999
    stop_at: int = 10

    def log10_p(self, evidence: Evidence) -> float:
        """The rank of the owner's key."""
        exceedances = 0
        for drawn in range(1, self.draws + 1):
            exceedances += self.redraw() >= evidence.matched
            if exceedances == self.stop_at:
                return stats.sequential_log10_p(exceedances, drawn, self.stop_at)
        return stats.sequential_log10_p(exceedances, self.draws, self.stop_at)

    def log10_floor(self, evidence: Evidence) -> float:  # noqa: ARG002 - the same for any evidence
        """1 / (draws + 1)."""
        return stats.empirical_log10_floor(self.draws)


@dataclass(frozen=True)
class Verdict:
    """What can be said about one suspect and one key.

    Attributes:
        outcome: owned (the mark of this key is present), not_proven, or no_verdict.
        reason: the outcome in one sentence.
        scheme, commitment, owner: the key that was read, by what is public of it.
        bits, matched, ber, ber_interval: raw bits, how many agree, the bit error rate with its
            95 % Clopper-Pearson interval.
        log10_p: log10 of the probability of a false accusation, corrected for `tests`.
        null, null_says, floor: the null hypothesis, in words, and log10 of its smallest p.
        tests: how many readings were tried and corrected for (Bonferroni on the best one).
        alpha: the threshold for p.
        forgery_bits: −log2 of the chance that one tried key fits, corrected for `tests`.
        payload: decoded or not; None when the message is too short to carry one.
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
        return asdict(self) | {"limits": list(self.limits)}

    def explain(self) -> str:
        """The verdict for people, as lines of text."""
        lines = [f"{self.outcome.upper().replace('_', ' ')}: {self.reason}"]
        if self.matched is not None and self.ber_interval is not None:
            low, high = self.ber_interval
            lines += [
                (
                    f"  matched       {self.matched} of {self.bits} bits "
                    f"(bit error rate {self.ber:.4f}, 95 % interval {low:.4f} to {high:.4f})"
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
                f"  payload       {_PAYLOAD[self.payload]}",
            ]
        lines += [f"  limit         {limit}" for limit in self.limits]
        return "\n".join(lines)


_PAYLOAD = {
    True: "decoded: it names this key's owner",
    False: "not decoded (the p-value above is about raw bits and stands without it)",
    None: "none: fewer than 128 bits carry no payload",
}


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


@dataclass(frozen=True)
class Terms:
    """The terms of a judgement: what is asked, and what is stated rather than measured.

    Attributes:
        alpha: threshold against coincidence, after correction.
        assume_dated: the owner's own statement that the key is older than the suspect.
        allow_test_key: let a reproducible key be judged as if it were secret; benchmarks only.
    """

    alpha: float = ALPHA
    assume_dated: bool = False
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
    thresholds = _Measured(log10_p, floor + correction, against_forgery, evidence.bits)
    outcome, reason = _decide(thresholds, terms, test_key=about["test_key"])
    return Verdict(
        outcome=outcome,
        reason=reason,
        scheme=about["scheme"],
        commitment=about["commitment"],
        owner=about["owner"],
        bits=evidence.bits,
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
        assume_dated=terms.assume_dated,
        suspect=about["suspect"],
        limits=_limits(evidence, outcome, tests, terms),
    )


def forgery_bits(evidence: Evidence, tests: int = 1) -> float:
    """−log2 of the chance that one key, tried by a cheat, reads at least as well by luck.

    0 where the bits are not XOF output over a commitment: then nothing has to be searched.
    """
    if not evidence.committed:
        return 0.0
    tail = stats.log10_binomial_tail(evidence.matched, evidence.bits)
    return max(0.0, -tail / math.log10(2) - math.log2(tests))


def no_verdict(reason: str, *, bits: int, terms: Terms, about: Mapping[str, Any]) -> Verdict:
    """The verdict of a key that could not be read at all, and why."""
    return Verdict(
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
class _Measured:
    """What is held against the thresholds, all of it corrected for the number of tests."""

    log10_p: float
    least_log10_p: float
    forgery_bits: float
    bits: int


def _decide(measured: _Measured, terms: Terms, *, test_key: bool) -> tuple[Outcome, str]:
    log10_alpha = math.log10(terms.alpha)
    if test_key and not terms.allow_test_key:
        return "no_verdict", "this is a test key: anybody can make it again, so it proves nothing"
    if measured.least_log10_p > log10_alpha:
        return "no_verdict", (
            "this key cannot prove anything here: even a perfect reading of its "
            f"{measured.bits} bits gives log10 p {measured.least_log10_p:.2f}, above the "
            f"threshold {log10_alpha:.2f}"
        )
    if measured.log10_p > log10_alpha:
        return "not_proven", "the mark of this key was not found"
    if measured.forgery_bits < LEAST_FORGERY_BITS and not terms.assume_dated:
        return "no_verdict", (
            "the bits are there, but a key that fits could be found by trying "
            f"2^{measured.forgery_bits:.0f} of them, fewer than 2^{LEAST_FORGERY_BITS:.0f}: a "
            "dated claim is needed (--assume-dated is the owner's own statement)"
        )
    return "owned", "the mark of this key is present"


def _limits(evidence: Evidence, outcome: Outcome, tests: int, terms: Terms) -> tuple[str, ...]:
    limits = [WHOSE, WHAT_P_IS]
    if outcome == "not_proven":
        limits.append(NOT_INNOCENT)
    if tests > 1:
        limits.append(f"a tensor was found by its shape only; p is corrected for {tests} readings")
    if terms.assume_dated:
        limits.append("that the key is older than the suspect is the owner's own statement")
    if evidence.payload is False and outcome == "owned":
        limits.append("the payload is lost: the mark is present by its raw bits only")
    return tuple(limits)
