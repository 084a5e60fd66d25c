"""A key for many recipients, their copies of a checkpoint, and whose copy a suspect is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError, SuspectError
from countermark.key import Key, KeyMaterial
from countermark.message import Bits
from countermark.nulls import LEAST_FORGERY_BITS
from countermark.schemes import scheme_of
from countermark.schemes.bounds import MOST_RECIPIENTS
from countermark.schemes.stamp import Stamp
from countermark.stamping.advising import Advice, advise
from countermark.stamping.copying import require_room, shards_of
from countermark.stamping.making import Copy, copy_marked, drawn_key
from countermark.test_result import Correction, applying, total_factor
from countermark.tracing.colluding import Code
from countermark.tracing.tardos import Biases, biases, code_length, keyed, log10_chance, scores
from countermark.verdict import NoTruthValue
from countermark.weights import MOST_CANDIDATES, Suspect, as_numbers, assignments, open_weights

EPSILON = 1e-6
"""The largest chance that any innocent recipient is named, by default."""

_PLACES_AT_ONCE = 1 << 22  # of code words that are expanded together

LIMITS = (
    (
        "whoever has the key and the checkpoint can make any recipient's copy: this speaks against "
        "a recipient as far as who keeps the key, and hands out the copies, is believed"
    ),
    "which recipient has which number is said by a list that the key does not hold",
    "it is said whose copy a suspect is, and not who published it: a copy may have been taken",
)


@dataclass(frozen=True)
class Traced(NoTruthValue):
    """What can be said about a suspect and the recipients of a key.

    Attributes:
        named: number and log10 of the chance of each recipient whose mark is there, corrected for
            all recipients and readings; the least first.
        recipients: how many there are.
        corrections: what each chance is multiplied by: readings that were tried, and candidates.
        epsilon: the threshold.
        best: the least log10 chance, corrected.
        forgery_bits: −log2 of the chance that one key, tried by a cheat, names somebody by as
            much as the last of those named.
        assume_dated: the owner stated that the key is older than the suspect.
        reason: in one sentence.
        limits: what this does not say of those named.
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
        """0: traced; 3: cannot tell, or a cheat could have made the key."""
        sure = self.assume_dated or self.forgery_bits >= LEAST_FORGERY_BITS
        return 0 if self.named and sure else 3

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        named = [list(each) for each in self.named]
        corrections = [asdict(each) for each in self.corrections]
        return asdict(self) | {
            "named": named, "corrections": corrections, "limits": list(self.limits)
        }  # fmt: skip


def recipients_key(
    source: Path, code: tuple[int, int], *, owner: str, epsilon: float = EPSILON,
    fields: Mapping[str, Any] | None = None, material: KeyMaterial | None = None,
) -> tuple[Key, Code, Advice]:  # fmt: skip
    """A key whose code tells recipients of a checkpoint apart; nothing is written.

    Args:
        source: the checkpoint.
        code: how many recipients, and how many of them may come together.
        owner: whose key it is.
        epsilon: what the code is made long enough for.
        fields: other fields of `stamp`.
        material: secret and nonce; drawn from the operating system when None.

    Raises:
        ConfigError: numbers that cannot be right.
        SuspectError: the checkpoint cannot be read.
    """
    count, coalition = code
    if not (2 <= count <= MOST_RECIPIENTS and 1 <= coalition <= count and 0 < epsilon < 1):
        raise ConfigError(
            f"{count} recipients, coalitions of {coalition}, epsilon {epsilon}: expected 2 to "
            f"{MOST_RECIPIENTS:,}, no coalition of more than all, and a probability"
        )
    length = code_length(count, coalition, epsilon)
    settled = {"bits": length, **(fields or {}), "recipients": count, "coalition": coalition}
    with open_weights(source) as weights:
        shards_of(weights, source)
        advice = advise(weights, settled)
        drawn = material or KeyMaterial.fresh()
        key = drawn_key(weights, advice, owner, drawn, keep_before=False)
    return key, Code(count, coalition, key.bits, epsilon), advice


def issue(source: Path, out: Path, key: Key, number: int) -> Copy:
    """Make a recipient's copy of the checkpoint that the key was made for.

    Args:
        source: the checkpoint; only read.
        out: the file or folder to write; must not exist yet.
        key: a key for recipients.
        number: which of them, from 0 on.

    Raises:
        ConfigError: a key of another kind, no such recipient, or something in the way.
    """
    scheme = _scheme_of(key)
    if not 0 <= number < scheme.recipients:
        raise ConfigError(f"recipient {number}: expected 0 to {scheme.recipients - 1}")
    require_room(source, out)
    with open_weights(source) as weights:
        shards_of(weights, source)
        for name, shape in key.tensors.items():
            if name not in weights.tensors or weights.tensors[name].shape != shape:
                raise SuspectError(f"{source} has no {name} {list(shape)}, which the key marks")
        word = codewords(key, range(number, number + 1))[0]
        return copy_marked(source, weights, out, key=key, bits=word)


def trace(
    suspect: Suspect, key: Key, *, epsilon: float = EPSILON, assume_dated: bool = False
) -> Traced:
    """Say which recipients' marks are in a suspect.

    Args:
        suspect: a weight file, a folder of shards, or a live module.
        key: a key for recipients.
        epsilon: the largest chance that any innocent one is named.
        assume_dated: the owner states that the key is older than the suspect; else whoever could
            have made it by trying fewer than 2^80 keys names nobody.

    Raises:
        SuspectError: the suspect cannot be read.
        ConfigError: a key of another kind.
    """
    scheme, p = _scheme_of(key), code_biases(key)
    with as_numbers(open_weights(suspect)) as weights:
        ways = assignments(weights, key.tensors, partial=scheme.partial)
        found = list(itertools.islice(ways, MOST_CANDIDATES + 1))
        if not 1 <= len(found) <= MOST_CANDIDATES:
            return _cannot(scheme, epsilon, "the suspect has not the tensors that this key reads")
        readings = [scheme.read_bits(scheme.read_from(weights, where, key), key) for where in found]
    found_scores = _scores(key, readings, p)  # (readings, n)
    chances = np.min(
        [log10_chance(each, read, p) for each, read in zip(found_scores, readings, strict=True)],
        axis=0,
    )
    corrections = applying(
        Correction("readings tried", len(found)), Correction("candidates", scheme.recipients)
    )
    corrected = np.minimum(0.0, chances + math.log10(total_factor(corrections)))
    order = np.argsort(corrected, kind="stable")
    named = [(int(j), float(corrected[j])) for j in order if corrected[j] <= math.log10(epsilon)]
    if key.test_key:
        return _cannot(scheme, epsilon, "this is a test key: anybody can make it again")
    best = float(corrected.min())
    bits = -(named[-1][1] if named else best) / math.log10(2)
    done = Traced(
        tuple(named), scheme.recipients, corrections, epsilon, best, bits, assume_dated,
        f"{len(named)} of {scheme.recipients} recipients are named",
    )  # fmt: skip
    return done if done.exit_code == 0 else replace(done, reason=_why_not(done))


def _why_not(done: Traced) -> str:
    if not done.named:
        return "cannot tell: no recipient's mark is there, or a larger coalition mixed theirs"
    return (
        "cannot tell: marks are there, but a key that names somebody could be found by trying "
        f"2^{done.forgery_bits:.0f} of them, fewer than 2^{LEAST_FORGERY_BITS:.0f}: a dated claim "
        "is needed (--assume-dated is the owner's own statement)"
    )


def _scores(key: Key, readings: Sequence[Bits], p: Biases) -> NDArray[np.float64]:
    """The score of each recipient by each reading (readings, n), some code words at a time."""
    count = _scheme_of(key).recipients
    step = max(1, _PLACES_AT_ONCE // len(p))
    parts = []
    for first in range(0, count, step):
        words = codewords(key, range(first, min(count, first + step)))
        parts.append([scores(words, read, p) for read in readings])
    return np.concatenate(parts, axis=1)


def codewords(key: Key, numbers: range) -> NDArray[np.uint8]:
    """The code words (n, m) of some recipients: each from the stream "code" of its number."""
    p = code_biases(key)
    rows = [keyed(key.stream("code", str(number)), len(p)) < p for number in numbers]
    return np.array(rows, dtype=np.uint8)  # (n, m)


def code_biases(key: Key) -> Biases:
    """The biases (m,) of a key's code, from the stream "biases"."""
    return biases(keyed(key.stream("biases"), key.bits), _scheme_of(key).coalition)


def _scheme_of(key: Key) -> Stamp:
    scheme = scheme_of(key)
    if not isinstance(scheme, Stamp) or not scheme.recipients:
        raise ConfigError("this key tells no recipients apart: expected one of `recipient new`")
    return scheme


def _cannot(scheme: Stamp, epsilon: float, reason: str) -> Traced:
    return Traced((), scheme.recipients, (), epsilon, 0.0, 0.0, False, f"cannot tell: {reason}")
