"""Wang et al. 2020: a message read by a secret independent network. The reading half.

The weights of the host are the input of a small network of its own: a gate (one factor for each
weight, trained in AUTO, a frozen choice of converged weights in MANU), 256 ReLU units, T outputs,
no biases; bit t is sigmoid(y_t) > ½ and L2 is the mean binary cross-entropy over the bits.

A learnt reader has memorised its message and reads the bits of models that never had them, so the
bits prove nothing. What is judged is L2: its rank among hidden-unit permutations of the suspect
(`PermutedUnits`), and the sibling threshold, always.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt

from countermark.errors import ConfigError
from countermark.key import Key, tensor_digest
from countermark.nulls import LEAST_SIBLINGS, Evidence, Null, PermutedUnits, Reader, UnmarkedModels
from countermark.progress import progress
from countermark.schemes.base import MASK, MOST_BITS, Paper, WeightScheme
from countermark.weights import Array
from countermark.xof import Stream

BUILT_IN = "mlp"
SIBLINGS, THRESHOLD = "siblings", "sibling_threshold"
"""Names of what is measured with the finished reader: held-out losses (n,), threshold (1,)."""

_LOOK = 256  # permutations for the rate of false reads, and where a rank can prove nothing
_BATCH = 2048  # permutations read at a time
_FIRST_BITS = 32  # of the message, by which most permutations are known to read worse


@dataclass(frozen=True)
class IndependentNetwork(WeightScheme):
    """MANU and AUTO: T bits learnt by a secret network that is fed with the host's weights.

    Attributes:
        mode: "auto" trains the gate; "manu" freezes it to the weights converged at `start_epoch`.
        as_published: train on the marked host alone, and print the published criterion.
        reader: "mlp" as published, or a module:factory (inputs, bits) -> torch module from
            (N, inputs) to (N, bits) logits. A key that names code is read only when told to.
        hidden: ReLU units of the built-in reader.
        strength: λ; the host gets the gradient of L1 + λ·L2, the reader that of L2.
        reader_lr: learning rate of the reader's own Adam.
        negatives: unmarked weight vectors shown with each step, target ½ (hardened form).
        l2_threshold: θ of the published criterion L2 ≤ θ; a mark above it has not taken.
        units: the axis of each tensor along which its hidden units lie, in reading order, −1 where
            it has none of them; () lets the key choose by the model's layers.
        most_permutations: cap for the rank; where alpha needs more, there is no verdict.
        convergence_std, convergence_epochs, start_epoch: as in `Uchida`, for "manu".
    """

    name: ClassVar[str] = "independent_network"
    linear: ClassVar[bool] = False
    null: ClassVar[type[Null]] = PermutedUnits
    paper: ClassVar[Paper] = Paper(
        authors="J. Wang, H. Wu, X. Zhang, Y. Yao",
        title="Watermarking in Deep Neural Networks via Error Back-propagation",
        venue="IS&T Electronic Imaging, Media Watermarking, Security, and Forensics",
        year=2020,
        doi="10.2352/ISSN.2470-1173.2020.4.MWSF-022",
    )

    bits: int = field(default=512)
    mode: Literal["auto", "manu"] = field(default="auto", kw_only=True)
    as_published: bool = field(default=False, kw_only=True)
    reader: str = field(default=BUILT_IN, kw_only=True)
    hidden: PositiveInt = field(default=256, kw_only=True)
    strength: PositiveFloat = field(default=0.05, kw_only=True)
    reader_lr: PositiveFloat = field(default=1e-3, kw_only=True)
    negatives: PositiveInt = field(default=4, kw_only=True)
    l2_threshold: PositiveFloat = field(default=0.05, kw_only=True)
    units: tuple[Annotated[int, Field(ge=-1)], ...] = field(default=(), kw_only=True)
    most_permutations: PositiveInt = field(default=10_000_000, kw_only=True)
    convergence_std: PositiveFloat = field(default=0.01, kw_only=True)
    convergence_epochs: PositiveInt = field(default=5, kw_only=True)
    start_epoch: PositiveInt = field(default=6, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "manu" and self.start_epoch < self.convergence_epochs:
            raise ConfigError(
                f"start_epoch is {self.start_epoch}: convergence is judged on "
                f"{self.convergence_epochs} epochs, start at {self.convergence_epochs} or later"
            )
        if self.reader != BUILT_IN and ":" not in self.reader:
            raise ConfigError(f"reader is {self.reader!r}: expected {BUILT_IN!r} or module:factory")

    @property
    def code(self) -> str | None:
        """The module:factory of a reader that is not the built-in one."""
        return None if self.reader == BUILT_IN else self.reader

    def settled(self, parameters: Mapping[str, tuple[int, ...]]) -> Self:
        """This scheme with its hidden units found among the model's parameters.

        One tensor: its outputs, or its inputs where it is the model's last matrix. Several: the
        outputs of the first one, with the next layer's inputs where that is read, too.

        Raises:
            ConfigError: a model of one layer has no hidden units, or they cannot be told.
        """
        if self.units:
            return self
        read, matrices = self.choose(parameters), [n for n, s in parameters.items() if len(s) > 1]
        if len(matrices) < 2:
            raise ConfigError(
                f"{self.name} needs a model with hidden units: this one has "
                f"{len(matrices)} layer(s) of two dimensions or more"
            )
        first, *others = read
        if first == matrices[-1]:
            return replace(self, units=(1, *(-1 for _ in others)))
        follower = dict(pairwise(matrices)).get(first)
        if follower in others and read[follower][1] != read[first][0]:
            raise ConfigError(
                f"the units of {first} {list(read[first])} are not the inputs of {follower} "
                f"{list(read[follower])} one by one: set units, or name one layer"
            )
        return replace(self, units=(0, *(1 if name == follower else -1 for name in others)))

    def capacity(self, tensors: Mapping[str, tuple[int, ...]], selected: int | None) -> int:
        """A reader that memorises has no limit in the weights; 0 where none was selected."""
        return MOST_BITS if tensors and selected != 0 else 0

    def selected(self, key: Key) -> int | None:
        """How many weights MANU feeds to the reader."""
        return int(self.mask(key).sum()) if self.mode == "manu" else None

    def mask(self, key: Key) -> NDArray[np.uint8]:
        """The frozen gate of MANU (M,), 0 or 1, in reading order."""
        parts = []
        for name, shape in key.tensors.items():
            mask = key.frozen.get(f"{MASK}.{name}", np.zeros(0, dtype=np.uint8))
            if mask.shape != (math.prod(shape),) or not np.isin(mask, (0, 1)).all():
                raise ConfigError(
                    f"the key's mask of {name} has shape {mask.shape}, its {mask.dtype} values are "
                    f"not 0 or 1, or it is missing: expected {math.prod(shape)} of them"
                )
            parts.append(mask.astype(np.uint8))
        return np.concatenate(parts)  # (M,)

    def permuter(self, tensors: Mapping[str, tuple[int, ...]]) -> Permuter:
        """How permutations of the hidden units act on the vector that is read.

        Raises:
            ConfigError: `units` does not fit the tensors.
        """
        axes = dict(zip(tensors, self.units, strict=False))
        sizes = {
            tensors[name][axis] for name, axis in axes.items() if -1 < axis < len(tensors[name])
        }
        beyond = any(axis >= len(tensors[name]) for name, axis in axes.items())
        if len(self.units) != len(tensors) or len(sizes) != 1 or beyond or min(sizes) < 2:
            raise ConfigError(
                f"units is {list(self.units)}: expected an axis (or -1) for each of "
                f"{[list(shape) for shape in tensors.values()]}, all of one length of 2 or more"
            )
        return Permuter.along(tensors, axes, sizes.pop())

    def vector(self, weights: Mapping[str, Array], key: Key) -> NDArray[np.float32]:
        """The vector w (M,): the tensors in C order, joined."""
        for name, shape in key.tensors.items():
            if weights[name].shape != shape:
                raise ConfigError(f"{name} has shape {weights[name].shape}, the key reads {shape}")
        with np.errstate(over="ignore"):
            parts = [weights[name].reshape(-1).astype(np.float32) for name in key.tensors]
        return np.concatenate(parts)  # (M,)

    def extract(self, weights: Mapping[str, Array], key: Key) -> Evidence:
        """Read T bits, and how many permutations of the suspect read as many of them."""
        w, reading = self.vector(weights, key), self._reading(key)
        scores = reading.scores(w[None])[0]  # (T,)
        read = (scores > 0).astype(np.uint8)
        permuter, stream = self.permuter(key.tensors), self._stream(weights, key, "false reads")
        others = reading.scores(permuter.apply(w, permuter.draw(stream, _LOOK))) > 0  # (n, T)
        matched = int((read == key.message).sum())
        threshold = key.learnt.get(THRESHOLD)
        return Evidence(
            read,
            key.message,
            committed=False,
            payload=key.payload_in(read),
            scores=scores,
            reader=Reader(
                siblings=len(key.learnt.get(SIBLINGS, ())),
                threshold=None if threshold is None else float(threshold[0]),
                permuted=_LOOK,
                false_reads=int(((others == key.message).sum(axis=1) >= matched).sum()),
                published=self.l2_threshold if self.as_published else None,
            ),
        )

    def nulls(self, weights: Mapping[str, Array], key: Key, draws: int) -> dict[str, Null]:
        """`PermutedUnits`, and `UnmarkedModels` where the key holds losses of some."""
        w, reading = self.vector(weights, key), self._reading(key)
        permuter, stream = self.permuter(key.tensors), self._stream(weights, key, "units")
        loss = float(reading.losses(w[None])[0])

        def losses(count: int) -> Iterator[NDArray[np.float64]]:
            left, size = count, _LOOK
            with progress("ranking among permutations", count) as advance:
                while left:
                    orders = permuter.draw(stream, min(size, left))
                    yield reading.losses(permuter.apply(w, orders), up_to=loss)
                    left, size = left - len(orders), _BATCH
                    advance(len(orders))

        capped = draws if draws <= self.most_permutations else _LOOK
        found: dict[str, Null] = {PermutedUnits.name: PermutedUnits(losses, loss, capped)}
        if SIBLINGS in key.learnt:
            found[UnmarkedModels.name] = UnmarkedModels(key.learnt[SIBLINGS])
        return found

    def not_taken(self, evidence: Evidence) -> str | None:
        """Why the owner's own model would not be recognised: bits, θ, or the sibling threshold.

        The published form knows no siblings: whether it is told from them, a verdict says.
        """
        loss, reader = evidence.cross_entropy, evidence.reader
        if loss is None or reader is None:
            raise AssertionError("a learnt reader reads scores")
        siblings = None if self.as_published else reader.threshold
        most = self.l2_threshold if siblings is None else min(self.l2_threshold, siblings)
        if evidence.matched == evidence.bits and loss <= most:
            return None
        return (
            f"{evidence.matched} of {evidence.bits} bits are in the model, L2 is {loss:.2g} "
            f"(expected all of them and at most {most:.2g}): train longer, or raise strength"
        )

    def calibrated(self, key: Key, siblings: Sequence[Mapping[str, Array]]) -> Key:
        """The key with its sibling threshold.

        It lies below the smallest loss of a held-out unmarked sibling by two standard deviations
        of their logarithms and by a factor of ten at least, and never above ½·ln 2, halfway to a
        reader that knows nothing.

        Args:
            key: with its finished reader.
            siblings: unmarked relatives that training never saw; tensors by name.
        """
        if not siblings:
            return key
        reading = self._reading(key)
        vectors = np.stack([self.vector(each, key) for each in siblings])  # (n, M)
        losses = reading.losses(vectors)
        measured = {SIBLINGS: losses}
        if len(losses) >= LEAST_SIBLINGS:
            logs = np.log(np.maximum(losses, np.finfo(np.float64).tiny))
            margin = max(2 * logs.std(ddof=1), math.log(10))
            measured[THRESHOLD] = np.array([min(math.exp(logs.min() - margin), math.log(2) / 2)])
        return replace(key, learnt={**key.learnt, **measured})

    def _reading(self, key: Key) -> _Reading:
        self._check_measured(key)
        tensors = {n: each for n, each in key.learnt.items() if n not in (SIBLINGS, THRESHOLD)}
        logits: Logits
        if self.code is None:
            logits = MlpReader.of(self, key, tensors)
        else:
            from countermark.schemes.training.independent_network import module_logits

            width = sum(math.prod(shape) for shape in key.tensors.values())
            mask = self.mask(key) if self.mode == "manu" else None
            logits = module_logits(self, width, tensors, mask)
        return _Reading(logits, key.message)

    def _check_measured(self, key: Key) -> None:
        siblings, threshold = key.learnt.get(SIBLINGS), key.learnt.get(THRESHOLD)
        for name, each, size in ((SIBLINGS, siblings, None), (THRESHOLD, threshold, (1,))):
            if each is None:
                continue
            if each.dtype != np.float64 or each.ndim != 1 or size not in (None, each.shape):
                raise ConfigError(
                    f"the key's {name} is {each.dtype} {each.shape}: not a measurement"
                )
            if not (np.isfinite(each).all() and (each >= 0).all() and len(each)):
                raise ConfigError(f"the key's {name} holds values that no loss has")

    @staticmethod
    def _stream(weights: Mapping[str, Array], key: Key, purpose: str) -> Stream:
        """Random permutations that follow from key and suspect, so that p is reproducible."""
        digests = b"".join(tensor_digest(name, weights[name]) for name in key.tensors)
        return Stream(key.material.secret, key.c1 or key.c0, purpose, digests.hex())


@dataclass(frozen=True)
class Permuter:
    """The action of hidden-unit permutations on a vector w (M,) of joined tensors.

    Value j goes to unit `unit[j]`; under the permutation π it is taken from the place
    `offset[j] + stride[j]·π[unit[j]]`. Values of tensors without the units have stride 0.

    Attributes:
        size: U, how many hidden units.
    """

    size: int
    unit: NDArray[np.intp]
    offset: NDArray[np.intp]
    stride: NDArray[np.intp]

    @classmethod
    def along(
        cls, tensors: Mapping[str, tuple[int, ...]], axes: Mapping[str, int], size: int
    ) -> Permuter:
        """Of tensors whose units lie along one axis each; −1 for none."""
        parts, start = [], 0
        for name, shape in tensors.items():
            at = np.arange(math.prod(shape), dtype=np.intp)  # (M_l,)
            stride = math.prod(shape[axes[name] + 1 :]) if axes[name] >= 0 else 0
            unit = at // stride % size if stride else np.zeros_like(at)
            parts.append((unit, start + at - stride * unit, np.full_like(at, stride)))
            start += len(at)
        return cls(size, *(np.concatenate(each) for each in zip(*parts, strict=True)))

    def draw(self, stream: Stream, count: int) -> NDArray[np.intp]:
        """The stream's next permutations (count, U): the stable order of U words each."""
        words = stream.words(count * self.size).reshape(count, self.size)
        return np.argsort(words, axis=1, kind="stable")

    def apply(self, w: NDArray[np.float32], orders: NDArray[np.intp]) -> NDArray[np.float32]:
        """The vector w (M,) under permutations (n, U), as (n, M)."""
        permuted: NDArray[np.float32] = w[orders[:, self.unit] * self.stride + self.offset]
        return permuted


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
        cls, scheme: IndependentNetwork, key: Key, tensors: Mapping[str, NDArray[Any]]
    ) -> MlpReader:
        """The reader of a key.

        Raises:
            ConfigError: its tensors are missing, of another shape, or not finite.
        """
        width = sum(math.prod(shape) for shape in key.tensors.values())
        expected = {
            "reader.gate": (width,),
            "reader.first": (scheme.hidden, width),
            "reader.last": (scheme.bits, scheme.hidden),
        }
        found = {name: each.shape for name, each in tensors.items()}
        good = (e.dtype == np.float32 and np.isfinite(e).all() for e in tensors.values())
        if found != expected or not all(good):
            raise ConfigError(
                f"the key's reader has tensors {found}: expected finite float32 {expected}"
            )
        if scheme.mode == "manu" and not np.array_equal(tensors["reader.gate"], scheme.mask(key)):
            raise ConfigError("the key's gate is not the mask that its commitment fixed")
        return cls(*(tensors[name] for name in expected))

    def __call__(self, vectors: NDArray[Any], bits: int | None = None) -> NDArray[Any]:
        """Logits (N, T) in the precision of the vectors."""
        kind = vectors.dtype
        hidden = np.maximum((vectors * self.gate.astype(kind)) @ self.first.T.astype(kind), 0)
        logits: NDArray[Any] = hidden @ self.last[:bits].T.astype(kind)  # (N, bits)
        return logits


@dataclass(frozen=True)
class _Reading:
    """A reader with the message that it should read."""

    logits: Logits
    message: NDArray[np.uint8]

    def scores(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logits (N, T) of vectors (N, M), in float64; 0, a coin, where they overflow."""
        with np.errstate(over="ignore", invalid="ignore"):
            scores = self.logits(vectors.astype(np.float64)).astype(np.float64)
        scores[np.isnan(scores)] = 0.0
        return scores

    def losses(
        self, vectors: NDArray[np.float32], up_to: float | None = None
    ) -> NDArray[np.float64]:
        """L2 (N,) of vectors (N, M) in nats; ∞ for those certainly above `up_to`."""
        if up_to is None:
            return _mean_cross_entropy(self.scores(vectors), self.message)
        bits = min(_FIRST_BITS, len(self.message))
        with np.errstate(over="ignore", invalid="ignore"):
            some = np.nan_to_num(self.logits(vectors, bits), nan=0.0)
        # All T bits lose at least what the first ones do; a margin covers float32.
        least = _mean_cross_entropy(some, self.message[:bits]) * bits / len(self.message)
        near = np.flatnonzero(least <= 1.01 * up_to + 1e-9)
        found = np.full(len(vectors), np.inf)
        found[near] = self.losses(vectors[near])
        return found


def _mean_cross_entropy(scores: NDArray[Any], message: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean −log P(bit) (N,) of logits (N, T): L2 of the paper, Eq. (1)."""
    against = (1.0 - 2.0 * message.astype(scores.dtype)) * scores
    losses: NDArray[np.float64] = np.logaddexp(0, against).mean(axis=1, dtype=np.float64)
    return losses
