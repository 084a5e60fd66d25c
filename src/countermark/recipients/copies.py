"""A key for many recipients, their copies of a checkpoint, and tracing of a suspect to a copy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints import (
    MOST_CANDIDATES,
    Suspect,
    open_suspect,
    open_weights,
)
from countermark.errors import ConfigError, SuspectError
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.messages import Bits
from countermark.recipients.collusion import RecipientCode
from countermark.recipients.tardos import (
    Biases,
    bound_log10_chance,
    compute_biases,
    compute_code_length,
    draw_uniform_numbers,
    score_recipients,
)
from countermark.results.null_hypotheses import LEAST_FORGERY_BITS
from countermark.results.test_result import Correction, drop_trivial_corrections, multiply_factors
from countermark.results.verdict import NoTruthValue
from countermark.schemes import load_scheme
from countermark.schemes.key_limits import MOST_RECIPIENTS
from countermark.schemes.stamp.scheme import Stamp
from countermark.stamping.advising import Advice, advise
from countermark.stamping.copying import get_shards, require_copy_place
from countermark.stamping.making import StampedCopy, draw_key, write_marked_copy

EPSILON = 1e-6
"""The default bound of the probability that any innocent recipient is named."""

_PLACES_AT_ONCE = 1 << 22  # places of code words that are expanded together

LIMITS = (
    (
        "whoever has the key and the checkpoint can make any recipient's copy: this speaks against "
        "a recipient as far as who keeps the key, and hands out the copies, is believed"
    ),
    "which recipient has which number is said by a list that the key does not hold",
    "it is said whose copy a suspect is, and not who published it: a copy may have been taken",
)


@dataclass(frozen=True)
class TraceResult(NoTruthValue):
    """The findings about a suspect and the recipients of a key.

    Attributes:
        named: number of each recipient whose mark is in the suspect, and log10 of the probability
            of the score for an innocent, corrected for all recipients and readings; smallest first.
        recipients: number of recipients of the key.
        corrections: factors of each probability: readings that were tried, and candidates.
        epsilon: the threshold.
        best: the smallest log10 probability, corrected.
        forgery_bits: −log2 of the probability that a single key, tried by a cheat, names somebody
            with the probability of the last named recipient.
        assume_dated: the owner stated that the key is older than the suspect.
        reason: the finding in one sentence.
        limits: caveats of a finding.
    """

    ask: ClassVar[str] = "traced.named"

    named: tuple[tuple[int, float], ...]
    recipients: int
    corrections: tuple[Correction, ...]
    epsilon: float
    best: float
    forgery_bits: float
    assume_dated: bool
    reason: str
    limits: tuple[str, ...] = LIMITS

    @property
    def exit_code(self) -> int:
        """0 if a recipient is named and the key is dated or hard to forge; otherwise 3."""
        # An undated key could have been searched for after the suspect became known.
        sure = self.assume_dated or self.forgery_bits >= LEAST_FORGERY_BITS
        return 0 if self.named and sure else 3

    def to_json(self) -> dict[str, Any]:
        """Return all findings as JSON values."""
        named = [list(each) for each in self.named]
        corrections = [asdict(each) for each in self.corrections]
        return asdict(self) | {
            "named": named, "corrections": corrections, "limits": list(self.limits)
        }  # fmt: skip


def make_recipients_key(
    source: Path, code: tuple[int, int], *, owner: str, epsilon: float = EPSILON,
    fields: Mapping[str, Any] | None = None, material: KeyMaterial | None = None,
) -> tuple[Key, RecipientCode, Advice]:  # fmt: skip
    """Make a key whose code distinguishes the recipients of a checkpoint; write nothing.

    Args:
        source: the checkpoint.
        code: number of recipients, and size of the largest coalition.
        owner: name of the key's owner.
        epsilon: bound of the probability of a false accusation that sets the length of the code.
        fields: other fields of `stamp`.
        material: secret and nonce; drawn from the operating system when None.

    Returns: the key, the parameters of its code, and the advice for the stamp.

    Raises:
        ConfigError: the numbers are out of range.
        SuspectError: the checkpoint cannot be read.
    """
    count, coalition = code
    if not (2 <= count <= MOST_RECIPIENTS and 1 <= coalition <= count and 0 < epsilon < 1):
        raise ConfigError(
            f"{count} recipients, coalitions of {coalition}, epsilon {epsilon}: expected 2 to "
            f"{MOST_RECIPIENTS:,}, no coalition of more than all, and a probability"
        )
    length = compute_code_length(count, coalition, epsilon)
    # The caller's fields may change the length, but not recipients and coalition.
    settled = {"bits": length, **(fields or {}), "recipients": count, "coalition": coalition}
    with open_weights(source) as weights:
        get_shards(weights, source)
        advice = advise(weights, settled)
        drawn = material or KeyMaterial.generate()
        # `trace` does not align suspects, so the key needs no values before the mark.
        key = draw_key(weights, advice, owner, drawn, keep_before=False)
    return key, RecipientCode(count, coalition, key.bits, epsilon), advice


def issue_copy(source: Path, out: Path, key: Key, number: int) -> StampedCopy:
    """Make a recipient's copy of the checkpoint that the key was made for.

    Args:
        source: the checkpoint; only read.
        out: the file or folder to write; must not exist yet.
        key: a key for recipients.
        number: number of the recipient, from 0.

    Raises:
        ConfigError: the key is not for recipients, has no such recipient, or `out` is taken.
        SuspectError: the checkpoint lacks a tensor that the key marks.
    """
    scheme = _get_recipients_scheme(key)
    if not 0 <= number < scheme.recipients:
        raise ConfigError(f"recipient {number}: expected 0 to {scheme.recipients - 1}")
    require_copy_place(source, out)
    with open_weights(source) as weights:
        get_shards(weights, source)
        for name, shape in key.tensors.items():
            if name not in weights.tensors or weights.tensors[name].shape != shape:
                raise SuspectError(f"{source} has no {name} {list(shape)}, which the key marks")
        # Only this recipient's word is expanded: a key may serve very many recipients.
        word = expand_codewords(key, range(number, number + 1))[0]
        return write_marked_copy(source, weights, out, key=key, bits=word)


def trace(
    suspect: Suspect, key: Key, *, epsilon: float = EPSILON, assume_dated: bool = False
) -> TraceResult:
    """Find the recipients whose marks are in a suspect.

    Args:
        suspect: a weight file, a folder of shards, or a live module.
        key: a key for recipients.
        epsilon: the largest probability that any innocent recipient is named.
        assume_dated: the owner states that the key is older than the suspect. Otherwise nobody is
            accused by a key that could have been found by trying fewer than 2^80 keys.

    Raises:
        SuspectError: the suspect cannot be read.
        ConfigError: the key is not for recipients.
    """
    scheme, p = _get_recipients_scheme(key), derive_code_biases(key)
    with open_suspect(suspect) as opened:
        weights, found = scheme.locate_tensors(opened, key)
        # Every assignment of tensors is a test that is corrected for; too many would take too long.
        if not 1 <= len(found) <= MOST_CANDIDATES:
            return _make_undecided_result(
                scheme, epsilon, "the suspect has not the tensors that this key reads"
            )
        readings = [
            scheme.read_bits(scheme.read_suspect_tensors(weights, where, key), key)
            for where in found
        ]
    found_scores = _score_readings(key, readings, p)  # (readings, n)
    # The best reading counts for each recipient; the correction below pays for the choice.
    chances = np.min(
        [
            bound_log10_chance(each, read, p)
            for each, read in zip(found_scores, readings, strict=True)
        ],
        axis=0,
    )
    corrections = drop_trivial_corrections(
        Correction("readings tried", len(found)), Correction("candidates", scheme.recipients)
    )
    corrected = np.minimum(0.0, chances + math.log10(multiply_factors(corrections)))
    order = np.argsort(corrected, kind="stable")
    named = [(int(j), float(corrected[j])) for j in order if corrected[j] <= math.log10(epsilon)]
    # Anyone can compute the secret of a test key, and thus any recipient's mark.
    if key.test_key:
        return _make_undecided_result(
            scheme, epsilon, "this is a test key: anybody can make it again"
        )
    best = float(corrected.min())
    bits = -(named[-1][1] if named else best) / math.log10(2)
    done = TraceResult(
        tuple(named), scheme.recipients, corrections, epsilon, best, bits, assume_dated,
        f"{len(named)} of {scheme.recipients} recipients are named",
    )  # fmt: skip
    # A finding that anyone could have forged is reported, but with the reason for the doubt.
    return done if done.exit_code == 0 else replace(done, reason=_explain_doubt(done))


def _explain_doubt(done: TraceResult) -> str:
    """Return the reason for a finding without effect."""
    if not done.named:
        return "cannot tell: no recipient's mark is there, or a larger coalition mixed theirs"
    return (
        "cannot tell: marks are there, but a key that names somebody could be found by trying "
        f"2^{done.forgery_bits:.0f} of them, fewer than 2^{LEAST_FORGERY_BITS:.0f}: a dated claim "
        "is needed (--assume-dated is the owner's own statement)"
    )


def _score_readings(key: Key, readings: Sequence[Bits], p: Biases) -> NDArray[np.float64]:
    """Return the score of each recipient by each reading (readings, n).

    Code words are expanded in parts, to bound the memory.
    """
    count = _get_recipients_scheme(key).recipients
    # A key from a file may declare many recipients: code words must not fill the memory.
    step = max(1, _PLACES_AT_ONCE // len(p))
    parts = []
    for first in range(0, count, step):
        words = expand_codewords(key, range(first, min(count, first + step)))
        parts.append([score_recipients(words, read, p) for read in readings])
    return np.concatenate(parts, axis=1)


def expand_codewords(key: Key, numbers: range) -> NDArray[np.uint8]:
    """Return code words (n, m) of recipients, each from the key's stream "code" and the number."""
    p = derive_code_biases(key)
    rows = [
        draw_uniform_numbers(key.make_stream("code", str(number)), len(p)) < p for number in numbers
    ]
    return np.array(rows, dtype=np.uint8)  # (n, m)


def derive_code_biases(key: Key) -> Biases:
    """Return the biases (m,) of a key's code, from the key's stream "biases"."""
    return compute_biases(
        draw_uniform_numbers(key.make_stream("biases"), key.bits),
        _get_recipients_scheme(key).coalition,
    )


def _get_recipients_scheme(key: Key) -> Stamp:
    """Return the stamp scheme of a key for recipients.

    Raises:
        ConfigError: the key is not for recipients.
    """
    scheme = load_scheme(key)
    if not isinstance(scheme, Stamp) or not scheme.recipients:
        raise ConfigError("this key tells no recipients apart: expected one of `recipient new`")
    return scheme


def _make_undecided_result(scheme: Stamp, epsilon: float, reason: str) -> TraceResult:
    """Return a finding that names nobody, with the reason."""
    return TraceResult(
        (), scheme.recipients, (), epsilon, 0.0, 0.0, False, f"cannot tell: {reason}"
    )
