"""Learnt readers, and the hidden-unit permutations among which their losses rank.

A reader is a network that maps the weights w (M,) of a suspect to T logits. `MessageReader` holds a
reader beside its message, `UnitPermuter` reorders the hidden units of w or changes their loudness, and
`calibrate_threshold` sets the sibling threshold. The loudness of a hidden unit is the root mean square of its
weights in one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError, make_printable
from countermark.keys.streams import KeyStream
from countermark.results.null_hypotheses import LEAST_SIBLINGS

SIBLINGS, THRESHOLD, LOUDNESS = "siblings", "sibling_threshold", "loudness"
"""Names of what is measured with the finished reader, and of the units of the marked model.

Held-out losses (n,), threshold (1,), and how loud the units are, see `Permuter.compute_loudness`.
"""

MOST_SIBLINGS = 10_000
"""So that a rank among models that an owner says he has measured is never below 1e-4."""

LOOK = 256
"""Permutations for the rate of false reads, and where a rank can prove nothing."""

_BATCH, _VALUES = 2048, 1 << 21  # most permutations read at a time, and weights in all of them
_FIRST_BITS = 32  # message bits that suffice to rule out most permutations
_ROUNDING = 100.0  # in units in the last place of a sum: more than its rounding loses


def calibrate_threshold(
    losses: NDArray[np.float64], loudness: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Return the measurements that a key keeps of its reader, by tensor name.

    The sibling threshold lies below the smallest loss by two standard deviations of the logarithms
    of the losses, and by a factor of ten at least. It is never above ½·ln 2, halfway to a reader
    that knows nothing.

    With a threshold, the key also keeps the loudness of the units of the marked model. The logits
    of a reader grow with the weights, so that any model with large enough weights would pass the
    threshold.

    Args:
        losses: (n,) losses on held-out unmarked siblings.
        loudness: (G,) loudness of the units of the marked model.
    """
    if len(losses) < LEAST_SIBLINGS:
        return {SIBLINGS: losses}
    # A loss of 0 has no logarithm; the smallest float stands in for it.
    logs = np.log(np.maximum(losses, np.finfo(np.float64).tiny))
    margin = max(2 * logs.std(ddof=1), math.log(10))
    threshold = min(math.exp(logs.min() - margin), math.log(2) / 2)
    return {SIBLINGS: losses, THRESHOLD: np.array([threshold]), LOUDNESS: loudness}


def check_calibration(learnt: Mapping[str, NDArray[Any]]) -> None:
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
    # A threshold above the smallest loss would accept an unmarked sibling as marked.
    least = max(losses.min(initial=np.inf), np.finfo(np.float64).tiny)
    if len(losses) < LEAST_SIBLINGS or threshold[0] > least:
        raise ConfigError(
            f"the key's {THRESHOLD} does not follow from the losses of {len(losses)} siblings"
        )


@dataclass(frozen=True)
class UnitPermuter:
    """The action of hidden-unit permutations on a vector w (M,) of joined tensors.

    Value j belongs to unit `unit[j]`. Under the permutation π it is taken from the place
    `offset[j] + stride[j]·π[unit[j]]`. Values of tensors without the units have stride 0.

    Attributes:
        size: U, the number of hidden units.
        group: (M,) numbers from 0 on; values of one unit in one tensor have the same number, and so
            have all values of a tensor without the units. There are G groups.
    """

    size: int
    unit: NDArray[np.intp]
    offset: NDArray[np.intp]
    stride: NDArray[np.intp]
    group: NDArray[np.intp]

    @classmethod
    def from_axes(
        cls, tensors: Mapping[str, tuple[int, ...]], axes: Mapping[str, int], size: int
    ) -> UnitPermuter:
        """Make a permuter for tensors whose units lie along one axis each.

        Args:
            tensors: shapes by name, in reading order.
            axes: axis of the units in each tensor; −1 for a tensor without the units.
            size: U, the number of hidden units.
        """
        parts, start, groups = [], 0, 0
        for name, shape in tensors.items():
            at = np.arange(math.prod(shape), dtype=np.intp)  # (M_l,)
            stride = math.prod(shape[axes[name] + 1 :]) if axes[name] >= 0 else 0
            unit = at // stride % size if stride else np.zeros_like(at)
            # The place of the value that unit 0 has in place of this value.
            offset = start + at - stride * unit
            parts.append((unit, offset, np.full_like(at, stride), groups + unit))
            start, groups = start + len(at), groups + (size if stride else 1)
        return cls(size, *(np.concatenate(each) for each in zip(*parts, strict=True)))

    def draw_permutations(self, stream: KeyStream, count: int) -> NDArray[np.intp]:
        """Draw the stream's next permutations (count, U), each the stable order of U words."""
        words = stream.take_words(count * self.size).reshape(count, self.size)
        # A stable sort makes the result the same on every machine, also for equal words.
        return np.argsort(words, axis=1, kind="stable")

    def permute_vector(
        self, w: NDArray[np.float32], orders: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Return the vector w (M,) under permutations (n, U), as (n, M)."""
        permuted: NDArray[np.float32] = w[orders[:, self.unit] * self.stride + self.offset]
        return permuted

    def compute_loudness(self, w: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the loudness (G,) of each group of the vector w (M,): its root mean square."""
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.bincount(self.group, w.astype(np.float64) ** 2)
            found: NDArray[np.float64] = np.sqrt(squares / np.bincount(self.group))
        return found

    def scale_to_loudness(
        self, w: NDArray[np.float32], loudness: NDArray[np.float64], *, most: float = np.inf
    ) -> NDArray[np.float32]:
        """Return the vector w (M,) rescaled to `compute_loudness` (G,) by a positive factor for each group.

        Args:
            w: the vector; a group of zeros remains zero.
            loudness: the wanted loudness of each group.
            most: the largest factor; with 1, only groups that are louder are changed.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            factors = np.minimum(loudness / self.compute_loudness(w), most)
            factors[~np.isfinite(factors)] = 1.0  # 0 / 0 and x / 0: zeros remain zeros
            scaled: NDArray[np.float32] = (w * factors[self.group]).astype(np.float32)
        return scaled

    def generate_permuted_batches(
        self, w: NDArray[np.float32], stream: KeyStream, count: int
    ) -> Iterator[NDArray[np.float32]]:
        """Generate the vector w (M,) under the stream's next permutations, (n, M) at a time.

        The first batch is small, because most ranks stop early.
        """
        # Batches are bounded by their values, so that memory does not grow with the host.
        most, size = max(1, _VALUES // len(w)), LOOK
        while count:
            orders = self.draw_permutations(stream, min(size, most, count))
            yield self.permute_vector(w, orders)
            count, size = count - len(orders), _BATCH


class LogitFunction(Protocol):
    """A reader of any make, as a function from weight vectors to logits."""

    def __call__(self, vectors: NDArray[Any], bits: int | None = None) -> NDArray[Any]:
        """Return the logits (N, T) of weight vectors (N, M), or those of the first bits only."""


@dataclass(frozen=True)
class MlpReader:
    """The published reader: a gate, ReLU units, and outputs, without biases.

    Attributes:
        gate: (M,) factors of the weights.
        first: (H, M) weights of the ReLU units.
        last: (T, H) weights of the outputs.
    """

    gate: NDArray[np.float32]
    first: NDArray[np.float32]
    last: NDArray[np.float32]

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, NDArray[Any]], *, width: int, hidden: int, bits: int
    ) -> MlpReader:
        """Make the reader of a key from its learnt tensors.

        Raises:
            ConfigError: tensors are missing, of another shape, or not finite.
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
                f"the key's reader has tensors {make_printable(str(found), 400)}: "
                f"expected finite float32 {expected}"
            )
        return cls(*(tensors[name] for name in expected))

    @property
    def gain(self) -> float:
        """The largest sum of absolute terms in a logit, as a multiple of the length of its vector.

        By Cauchy and Schwarz, Σ|w_j·a_j| ≤ ‖w‖·‖a‖, however the terms cancel.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            gated = self.first.astype(np.float64) * self.gate
            reach = np.abs(self.last.astype(np.float64)) @ np.linalg.norm(gated, axis=1)  # (T,)
        return float(reach.max(initial=0.0))

    def __call__(self, vectors: NDArray[Any], bits: int | None = None) -> NDArray[Any]:
        """Return the logits (N, T) in the precision of the vectors."""
        kind = vectors.dtype
        hidden = np.maximum((vectors * self.gate.astype(kind)) @ self.first.T.astype(kind), 0)
        logits: NDArray[Any] = hidden @ self.last[:bits].T.astype(kind)  # (N, bits)
        return logits


@dataclass(frozen=True)
class MessageReader:
    """A reader with the message that it should read.

    Attributes:
        precision: in which the reader computes when it is given float64.
        gain: of `MlpReader`, which bounds rounding errors; 0 for foreign code, whose sums are not
            known.
    """

    logits: LogitFunction
    message: NDArray[np.uint8]
    precision: type[np.floating[Any]] = np.float64
    gain: float = 0.0

    def compute_scores(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the logits (N, T) of vectors (N, M) in float64; logits that overflow become 0."""
        with np.errstate(over="ignore", invalid="ignore"):
            scores = self.logits(vectors.astype(np.float64)).astype(np.float64)
        # A logit of 0 is a fair coin: a suspect gains nothing from weights that overflow.
        scores[~np.isfinite(scores)] = 0.0
        return scores

    def compute_tied_loss(self, vector: NDArray[np.float32]) -> float:
        """Return L2 of one vector (M,), at its largest when a copy is computed in another batch.

        Sums in a batch of another size are rounded in another way; a copy must still count as a
        tie.
        """
        scores = self.compute_scores(vector[None])
        loss = compute_cross_entropy(scores, self.message)
        return float(
            _add_rounding_margin(loss, self._bound_sums(vector[None], scores), self.precision)[0]
        )

    def compute_losses(
        self, vectors: NDArray[np.float32], up_to: float | None = None
    ) -> NDArray[np.float64]:
        """Return L2 (N,) of vectors (N, M) in nats; ∞ for those certainly above `up_to`."""
        if up_to is None:
            return compute_cross_entropy(self.compute_scores(vectors), self.message)
        # Most permutations read far worse than the suspect. A float32 pass over a few bits rules
        # them out; only the others are computed in full.
        bits = min(_FIRST_BITS, len(self.message))
        with np.errstate(over="ignore", invalid="ignore"):
            some = self.logits(vectors, bits)
        # The sum of all T losses is at least that of the first bits, because no loss is negative.
        # The margin covers the rounding of float32.
        known = np.isfinite(some).all(axis=1)
        some[~known] = 0.0
        least = compute_cross_entropy(some, self.message[:bits]) * bits / len(self.message)
        largest = _add_rounding_margin(up_to, self._bound_sums(vectors, some), np.float32)
        near = np.flatnonzero((least <= largest) | ~known)
        found = np.full(len(vectors), np.inf)
        found[near] = self.compute_losses(vectors[near])
        return found

    def _bound_sums(self, vectors: NDArray[Any], scores: NDArray[Any]) -> NDArray[np.float64]:
        """Return the size (N,) of the sums in a logit, to which its rounding is relative.

        Terms that cancel count with their absolute values.
        """
        summed: NDArray[np.float64] = np.abs(scores).max(axis=1).astype(np.float64)
        if self.gain:
            with np.errstate(over="ignore", invalid="ignore"):
                lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))  # no copy: a hot path
                np.fmax(summed, self.gain * lengths, out=summed)
        return summed


def _add_rounding_margin(
    losses: float | NDArray[np.float64],
    summed: NDArray[np.float64],
    precision: type[np.floating[Any]],
) -> NDArray[np.float64]:
    """Return how large losses (N,) can be when sums of these sizes (N,) are rounded in another way.

    An error e of a logit changes L2 by e at most, and by the factor exp(e) at most.
    """
    off = _ROUNDING * float(np.finfo(precision).eps) * (1 + summed)  # (N,)
    with np.errstate(over="ignore", invalid="ignore"):
        largest: NDArray[np.float64] = np.fmin(losses + off, losses * np.exp(off))
    return largest


def compute_cross_entropy(scores: NDArray[Any], message: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute the mean −log P(bit) (N,) of logits (N, T): L2 of the paper, Eq. (1)."""
    # −log sigmoid(±y) = log(1 + exp(∓y)), which logaddexp computes without overflow.
    against = (1.0 - 2.0 * message.astype(scores.dtype)) * scores
    losses: NDArray[np.float64] = np.logaddexp(0, against).mean(axis=1, dtype=np.float64)
    return losses
