"""Learnt readers: networks that read a message, and the permutations that their losses rank among.

A reader takes the weights w (M,) of a suspect to T logits. `Reading` holds one beside its message,
`Permuter` reorders the hidden units of w, or changes how loud they are, and `measured` sets the
sibling threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError, printable
from countermark.nulls import LEAST_SIBLINGS
from countermark.xof import Stream

SIBLINGS, THRESHOLD, LOUDNESS = "siblings", "sibling_threshold", "loudness"
"""Names of what is measured with the finished reader, and of the units of the marked model.

Held-out losses (n,), threshold (1,), and how loud the units are, see `Permuter.loudness`.
"""

MOST_SIBLINGS = 10_000
"""So that a rank among models that an owner says he has measured is never below 1e-4."""

LOOK = 256
"""Permutations for the rate of false reads, and where a rank can prove nothing."""

_BATCH, _VALUES = 2048, 1 << 21  # permutations read at a time, and weights in all of them
_FIRST_BITS = 32  # of the message, by which most permutations are known to read worse
_ROUNDING = 100.0  # units in the last place of what is summed: more than a sum of it loses


def measured(
    losses: NDArray[np.float64], loudness: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """What a key keeps of its reader's losses (n,) on held-out unmarked siblings.

    With a threshold it keeps how loud (G,) the units of the marked model are: a reader's logits
    grow with the weights, so that any model that is loud enough would be below it.

    The sibling threshold lies below the smallest of them by two standard deviations of their
    logarithms and by a factor of ten at least, and never above ½·ln 2, halfway to a reader that
    knows nothing.
    """
    if len(losses) < LEAST_SIBLINGS:
        return {SIBLINGS: losses}
    logs = np.log(np.maximum(losses, np.finfo(np.float64).tiny))
    margin = max(2 * logs.std(ddof=1), math.log(10))
    threshold = min(math.exp(logs.min() - margin), math.log(2) / 2)
    return {SIBLINGS: losses, THRESHOLD: np.array([threshold]), LOUDNESS: loudness}


def check_measured(learnt: Mapping[str, NDArray[Any]]) -> None:
    """Raise `ConfigError` for measurements that no reader gives: a key is hostile input."""
    siblings, threshold = learnt.get(SIBLINGS), learnt.get(THRESHOLD)
    loudness = learnt.get(LOUDNESS)
    sizes = ((SIBLINGS, siblings, None), (THRESHOLD, threshold, (1,)), (LOUDNESS, loudness, None))
    for name, each, size in sizes:
        if each is None:
            continue
        if each.dtype != np.float64 or each.ndim != 1 or size not in (None, each.shape):
            raise ConfigError(f"the key's {name} is {each.dtype} {each.shape}: not a measurement")
        if len(each) > MOST_SIBLINGS and name == SIBLINGS:
            raise ConfigError(
                f"the key says it was measured on {len(each):,} unmarked models: expected at most "
                f"{MOST_SIBLINGS:,}, since nobody can look at more"
            )
        if not (np.isfinite(each).all() and (each >= 0).all() and len(each)):
            raise ConfigError(f"the key's {name} holds values that none can have")
    if threshold is None:
        return
    losses = np.zeros(0) if siblings is None else siblings
    least = max(losses.min(initial=np.inf), np.finfo(np.float64).tiny)
    if len(losses) < LEAST_SIBLINGS or threshold[0] > least:
        raise ConfigError(
            f"the key's {THRESHOLD} does not follow from the losses of {len(losses)} siblings"
        )


@dataclass(frozen=True)
class Permuter:
    """The action of hidden-unit permutations on a vector w (M,) of joined tensors.

    Value j goes to unit `unit[j]`; under the permutation π it is taken from the place
    `offset[j] + stride[j]·π[unit[j]]`. Values of tensors without the units have stride 0.

    Attributes:
        size: U, how many hidden units.
        group: (M,) from 0 on, which values belong to the same unit in the same tensor; those of a
            tensor without the units are one group. There are G.
    """

    size: int
    unit: NDArray[np.intp]
    offset: NDArray[np.intp]
    stride: NDArray[np.intp]
    group: NDArray[np.intp]

    @classmethod
    def along(
        cls, tensors: Mapping[str, tuple[int, ...]], axes: Mapping[str, int], size: int
    ) -> Permuter:
        """Of tensors whose units lie along one axis each; −1 for none."""
        parts, start, groups = [], 0, 0
        for name, shape in tensors.items():
            at = np.arange(math.prod(shape), dtype=np.intp)  # (M_l,)
            stride = math.prod(shape[axes[name] + 1 :]) if axes[name] >= 0 else 0
            unit = at // stride % size if stride else np.zeros_like(at)
            offset = start + at - stride * unit
            parts.append((unit, offset, np.full_like(at, stride), groups + unit))
            start, groups = start + len(at), groups + (size if stride else 1)
        return cls(size, *(np.concatenate(each) for each in zip(*parts, strict=True)))

    def draw(self, stream: Stream, count: int) -> NDArray[np.intp]:
        """The stream's next permutations (count, U): the stable order of U words each."""
        words = stream.words(count * self.size).reshape(count, self.size)
        return np.argsort(words, axis=1, kind="stable")

    def apply(self, w: NDArray[np.float32], orders: NDArray[np.intp]) -> NDArray[np.float32]:
        """The vector w (M,) under permutations (n, U), as (n, M)."""
        permuted: NDArray[np.float32] = w[orders[:, self.unit] * self.stride + self.offset]
        return permuted

    def loudness(self, w: NDArray[np.float32]) -> NDArray[np.float64]:
        """The root mean square (G,) of each group of the vector w (M,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.bincount(self.group, w.astype(np.float64) ** 2)
            found: NDArray[np.float64] = np.sqrt(squares / np.bincount(self.group))
        return found

    def at(
        self, w: NDArray[np.float32], loudness: NDArray[np.float64], *, most: float = np.inf
    ) -> NDArray[np.float32]:
        """The vector w (M,) with its groups as loud as `loudness` (G,), as by positive scaling.

        Args:
            w: the vector; a group of zeros stays one.
            loudness: that of each group.
            most: the largest factor; with 1, louder groups alone are changed.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            factors = np.minimum(loudness / self.loudness(w), most)
            factors[~np.isfinite(factors)] = 1.0  # 0 / 0 and x / 0: zeros stay zeros
            scaled: NDArray[np.float32] = (w * factors[self.group]).astype(np.float32)
        return scaled

    def batches(
        self, w: NDArray[np.float32], stream: Stream, count: int
    ) -> Iterator[NDArray[np.float32]]:
        """The vector w (M,) under the stream's next permutations, (n, M) at a time.

        Few at first: most ranks stop early.
        """
        most, size = max(1, _VALUES // len(w)), LOOK
        while count:
            orders = self.draw(stream, min(size, most, count))
            yield self.apply(w, orders)
            count, size = count - len(orders), _BATCH


class Logits(Protocol):
    """A reader, whatever it is made of."""

    def __call__(self, vectors: NDArray[Any], bits: int | None = None) -> NDArray[Any]:
        """The logits (N, T) of weight vectors (N, M), or those of the first bits only."""


@dataclass(frozen=True)
class MlpReader:
    """The published reader: gate, ReLU units, outputs; no biases.

    Attributes:
        gate: (M,) factors of the weights; first: (H, M); last: (T, H).
    """

    gate: NDArray[np.float32]
    first: NDArray[np.float32]
    last: NDArray[np.float32]

    @classmethod
    def of(
        cls, tensors: Mapping[str, NDArray[Any]], *, width: int, hidden: int, bits: int
    ) -> MlpReader:
        """The reader of a key, from its learnt tensors.

        Raises:
            ConfigError: they are missing, of another shape, or not finite.
        """
        expected = {
            "reader.gate": (width,),
            "reader.first": (hidden, width),
            "reader.last": (bits, hidden),
        }
        found = {name: each.shape for name, each in tensors.items()}
        good = (e.dtype == np.float32 and np.isfinite(e).all() for e in tensors.values())
        if found != expected or not all(good):
            raise ConfigError(
                f"the key's reader has tensors {printable(str(found), 400)}: "
                f"expected finite float32 {expected}"
            )
        return cls(*(tensors[name] for name in expected))

    @property
    def gain(self) -> float:
        """What the terms of a logit come to at most, as a multiple of the length of its vector.

        However they cancel: by Cauchy and Schwarz, Σ|w_j·a_j| ≤ ‖w‖·‖a‖.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            gated = self.first.astype(np.float64) * self.gate
            reach = np.abs(self.last.astype(np.float64)) @ np.linalg.norm(gated, axis=1)  # (T,)
        return float(reach.max(initial=0.0))

    def __call__(self, vectors: NDArray[Any], bits: int | None = None) -> NDArray[Any]:
        """Logits (N, T) in the precision of the vectors."""
        kind = vectors.dtype
        hidden = np.maximum((vectors * self.gate.astype(kind)) @ self.first.T.astype(kind), 0)
        logits: NDArray[Any] = hidden @ self.last[:bits].T.astype(kind)  # (N, bits)
        return logits


@dataclass(frozen=True)
class Reading:
    """A reader with the message that it should read.

    Attributes:
        precision: in which the reader computes when it is given float64.
        gain: of `MlpReader`, by which rounding is bounded; 0 for code whose sums nobody knows.
    """

    logits: Logits
    message: NDArray[np.uint8]
    precision: type[np.floating[Any]] = np.float64
    gain: float = 0.0

    def scores(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logits (N, T) of vectors (N, M), in float64; 0, a coin, where they overflow."""
        with np.errstate(over="ignore", invalid="ignore"):
            scores = self.logits(vectors.astype(np.float64)).astype(np.float64)
        scores[~np.isfinite(scores)] = 0.0
        return scores

    def tied_loss(self, vector: NDArray[np.float32]) -> float:
        """L2 of one vector (M,), as large as a copy of it can come out in another batch.

        Sums of another batch size end in other digits; a copy must still tie.
        """
        scores = self.scores(vector[None])
        loss = mean_cross_entropy(scores, self.message)
        return float(_within_rounding(loss, self._summed(vector[None], scores), self.precision)[0])

    def losses(
        self, vectors: NDArray[np.float32], up_to: float | None = None
    ) -> NDArray[np.float64]:
        """L2 (N,) of vectors (N, M) in nats; ∞ for those certainly above `up_to`."""
        if up_to is None:
            return mean_cross_entropy(self.scores(vectors), self.message)
        bits = min(_FIRST_BITS, len(self.message))
        with np.errstate(over="ignore", invalid="ignore"):
            some = self.logits(vectors, bits)
        # All T bits lose at least what the first ones do; a margin covers float32.
        known = np.isfinite(some).all(axis=1)
        some[~known] = 0.0
        least = mean_cross_entropy(some, self.message[:bits]) * bits / len(self.message)
        largest = _within_rounding(up_to, self._summed(vectors, some), np.float32)
        near = np.flatnonzero((least <= largest) | ~known)
        found = np.full(len(vectors), np.inf)
        found[near] = self.losses(vectors[near])
        return found

    def _summed(self, vectors: NDArray[Any], scores: NDArray[Any]) -> NDArray[np.float64]:
        """How large (N,) the sums are that rounding is relative to: terms that cancel count."""
        summed: NDArray[np.float64] = np.abs(scores).max(axis=1).astype(np.float64)
        if self.gain:
            with np.errstate(over="ignore", invalid="ignore"):
                lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))  # no copy: it is hot
                np.fmax(summed, self.gain * lengths, out=summed)
        return summed


def _within_rounding(
    losses: float | NDArray[np.float64],
    summed: NDArray[np.float64],
    precision: type[np.floating[Any]],
) -> NDArray[np.float64]:
    """How large losses (N,) can come out when sums of that size (N,) are taken in another way.

    A logit that is off by e changes L2 by e at most, and by the factor exp(e) at most.
    """
    off = _ROUNDING * float(np.finfo(precision).eps) * (1 + summed)  # (N,)
    with np.errstate(over="ignore", invalid="ignore"):
        largest: NDArray[np.float64] = np.fmin(losses + off, losses * np.exp(off))
    return largest


def mean_cross_entropy(scores: NDArray[Any], message: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean −log P(bit) (N,) of logits (N, T): L2 of the paper, Eq. (1)."""
    against = (1.0 - 2.0 * message.astype(scores.dtype)) * scores
    losses: NDArray[np.float64] = np.logaddexp(0, against).mean(axis=1, dtype=np.float64)
    return losses
