"""Wang et al. 2020: a message read by a secret independent network. The reading half.

The weights of the host are the input of a small separate network: a gate (one factor for each
weight, trained in AUTO, a frozen choice of converged weights in MANU), 256 ReLU units, T outputs,
no biases. Bit t is sigmoid(y_t) > ½, and L2 is the mean binary cross-entropy over the bits.

A learnt reader has memorised its message and reads the bits even from models without the mark, so
that the bits prove nothing. A verdict judges L2: by its rank among hidden-unit permutations of the
suspect (`PermutedUnits`), and always by the sibling threshold as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark._internal.plugins import load_object
from countermark._internal.progress import show_progress
from countermark.checkpoints import Array
from countermark.errors import ConfigError
from countermark.keys.key import Key, digest_tensor
from countermark.keys.streams import KeyStream
from countermark.results.null_hypotheses import NullHypothesis, PermutedUnits, UnmarkedModels
from countermark.results.reading import ReaderFacts, Reading
from countermark.results.statistics import compute_sequential_log10_p
from countermark.schemes.base import Paper
from countermark.schemes.key_limits import MOST_BITS, Count, CountOrNone, Draws, Factor
from countermark.schemes.learnt_reader import (
    LOOK,
    LOUDNESS,
    SIBLINGS,
    THRESHOLD,
    MessageReader,
    MlpReader,
    UnitPermuter,
    calibrate_threshold,
    check_calibration,
)
from countermark.schemes.weights import MASK, ConvergedScheme

BUILT_IN = "mlp"


@dataclass(frozen=True)
class IndependentNetwork(ConvergedScheme):
    """MANU and AUTO: T bits learnt by a secret network whose input is the host's weights.

    Attributes:
        mode: "auto" trains the gate; "manu" freezes it to the weights converged at `start_epoch`.
        as_published: train on the marked host alone, and print the published criterion.
        reader: "mlp" as published, or a module:factory (inputs, bits) -> torch module from
            (N, inputs) to (N, bits) logits. A key that names code is read only if the caller trusts
            this code.
        hidden: ReLU units of the built-in reader.
        strength: λ; the host gets the gradient of L1 + λ·L2, the reader that of L2.
        reader_lr: learning rate of the reader's own Adam.
        negatives: unmarked weight vectors shown with each step, target ½ (hardened form).
        positives: copies of the host that lack hidden units, shown with each step, target the
            message (hardened form): a mark must not depend on a few units, least of all on dead
            ones. Half of the negatives then lack units, too.
        dropped: the largest share of the hidden units that a copy lacks.
        pruned: if not 0, every second copy lacks its smallest weights instead of units, up to this
            share of them.
        settling: steps that the reader takes alone on the finished host, at a rate that falls to 0
            (hardened form): L2 must not depend on where the last steps happened to leave it.
        l2_threshold: θ of the published criterion L2 ≤ θ; above it, the mark is not embedded.
        units: the axis of each tensor along which its hidden units lie, in reading order, −1 for a
            tensor without them; () lets the key choose by the model's layers.
        most_permutations: cap for the rank; where alpha needs more, there is no verdict.
    """

    name: ClassVar[str] = "independent_network"
    linear: ClassVar[bool] = False
    null: ClassVar[type[NullHypothesis]] = PermutedUnits
    paper: ClassVar[Paper] = Paper(
        authors="J. Wang, H. Wu, X. Zhang, Y. Yao",
        title="Watermarking in Deep Neural Networks via Error Back-propagation",
        venue="IS&T Electronic Imaging, Media Watermarking, Security, and Forensics",
        year=2020,
        doi="10.2352/ISSN.2470-1173.2020.4.MWSF-022",
    )

    bits: Annotated[int, Field(ge=1, le=MOST_BITS)] = field(default=512)
    mode: Literal["auto", "manu"] = field(default="auto", kw_only=True)
    as_published: bool = field(default=False, kw_only=True)
    reader: str = field(default=BUILT_IN, kw_only=True)
    hidden: Count = field(default=256, kw_only=True)
    strength: Factor = field(default=0.05, kw_only=True)
    reader_lr: Factor = field(default=1e-3, kw_only=True)
    negatives: Count = field(default=8, kw_only=True)
    positives: CountOrNone = field(default=4, kw_only=True)
    dropped: Annotated[float, Field(ge=0, lt=1)] = field(default=0.75, kw_only=True)
    pruned: Annotated[float, Field(ge=0, lt=1)] = field(default=0.0, kw_only=True)
    settling: CountOrNone = field(default=200, kw_only=True)
    l2_threshold: Factor = field(default=0.05, kw_only=True)
    units: tuple[Annotated[int, Field(ge=-1, le=64)], ...] = field(default=(), kw_only=True)
    most_permutations: Draws = field(default=10_000_000, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "manu":
            self.check_start()
        if self.reader != BUILT_IN and ":" not in self.reader:
            raise ConfigError(f"reader is {self.reader!r}: expected {BUILT_IN!r} or module:factory")

    @property
    def reader_code(self) -> str | None:
        """The module:factory of a reader other than the built-in one; None for the built-in one."""
        return None if self.reader == BUILT_IN else self.reader

    def resolve_parameters(self, parameters: Mapping[str, tuple[int, ...]]) -> Self:
        """Return this scheme with the axes of its hidden units found among the model's parameters.

        The hidden units are the outputs of the first tensor, or its inputs if it is the model's
        last matrix. If the layer that has them as outputs and the next layer are both read, both
        are permuted.

        Raises:
            ConfigError: a model of one layer has no hidden units, the units cannot be determined,
                or `units` does not fit.
        """
        read, matrices = (
            self.choose_tensors(parameters),
            [n for n, s in parameters.items() if len(s) > 1],
        )
        if self.units:
            self.make_permuter(read)  # raises for axes that do not fit
            return self
        if len(matrices) < 2:
            raise ConfigError(
                f"{self.name} needs a model with hidden units: this one has "
                f"{len(matrices)} layer(s) of two dimensions or more"
            )
        flat = [name for name in read if name not in matrices]
        if flat:
            raise ConfigError(
                f"which units {flat[0]} belongs to cannot be told from its one dimension: set "
                "units, or leave it out"
            )
        first = next(iter(read))
        before = matrices[-2] if first == matrices[-1] else first
        # The parameters are in the order of the layers: a matrix feeds the one that follows it.
        after = dict(pairwise(matrices))[before]
        given, taken = parameters[before], parameters[after]
        # A flattened feature map has several inputs for each unit, which no single axis can
        # permute.
        if after in read and taken[1] != given[0]:
            raise ConfigError(
                f"the units of {before} {list(given)} are not the inputs of {after} "
                f"{list(taken)} one by one: set units, or name another layer"
            )
        axes = {before: 0, after: 1}
        settled = replace(self, units=tuple(axes.get(name, -1) for name in read))
        settled.make_permuter(read)
        return settled

    @property
    def training_class(self) -> str:
        """The class that trains the mark, as module:class."""
        return "countermark.schemes.independent_network.training:IndependentNetworkTraining"

    def capacity(self, tensors: Mapping[str, tuple[int, ...]], selected: int | None) -> int:
        """Return `MOST_BITS`, since a reader memorises; 0 where no weight is selected."""
        return MOST_BITS if tensors and selected != 0 else 0

    def count_selected_values(self, key: Key) -> int | None:
        """Return how many weights the reader is fed in the mode "manu"; None in the mode "auto"."""
        return int(self.get_gate_mask(key).sum()) if self.mode == "manu" else None

    def get_gate_mask(self, key: Key) -> NDArray[np.uint8]:
        """Return the frozen gate of MANU (M,), 0 or 1, in reading order.

        Raises:
            ConfigError: a mask is missing, of another shape, or has other values.
        """
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

    def make_permuter(self, tensors: Mapping[str, tuple[int, ...]]) -> UnitPermuter:
        """Return how permutations of the hidden units act on the vector that is read.

        Raises:
            ConfigError: `units` does not fit the tensors.
        """
        axes = dict(zip(tensors, self.units, strict=False))
        sizes = {
            tensors[name][axis] for name, axis in axes.items() if -1 < axis < len(tensors[name])
        }
        beyond = any(axis >= len(tensors[name]) for name, axis in axes.items())
        # Fewer than two units have no permutation besides the identity.
        if len(self.units) != len(tensors) or len(sizes) != 1 or beyond or min(sizes) < 2:
            raise ConfigError(
                f"units is {list(self.units)}: expected an axis (or -1) for each of "
                f"{[list(shape) for shape in tensors.values()]}, all of one length of 2 or more"
            )
        return UnitPermuter.from_axes(tensors, axes, sizes.pop())

    def read_vector(self, weights: Mapping[str, Array], key: Key) -> NDArray[np.float32]:
        """Return the vector w (M,): the tensors in C order, joined.

        Raises:
            ConfigError: a tensor has another shape than in the key.
        """
        for name, shape in key.tensors.items():
            if weights[name].shape != shape:
                raise ConfigError(f"{name} has shape {weights[name].shape}, the key reads {shape}")
        with np.errstate(over="ignore"):
            parts = [weights[name].reshape(-1).astype(np.float32) for name in key.tensors]
        return np.concatenate(parts)  # (M,)

    def extract(self, weights: Mapping[str, Array], key: Key) -> Reading:
        """Read T bits, and count the permutations of the suspect that read as many of them."""
        w, reading = self.read_vector(weights, key), self._make_message_reader(key)
        scores = reading.compute_scores(w[None])[0]  # (T,)
        read = (scores > 0).astype(np.uint8)
        permuter, stream = (
            self.make_permuter(key.tensors),
            self._make_stream(weights, key, "false reads"),
        )
        matched = int((read == key.message).sum())
        false_reads = 0
        for others in permuter.generate_permuted_batches(w, stream, LOOK):
            found = (reading.compute_scores(others) > 0) == key.message  # (n, T)
            false_reads += int((found.sum(axis=1) >= matched).sum())
        threshold = key.learnt.get(THRESHOLD)
        return Reading(
            read,
            key.message,
            committed=False,
            payload=key.check_payload(read),
            scores=scores,
            reader=ReaderFacts(
                siblings=len(key.learnt.get(SIBLINGS, ())),
                threshold=None if threshold is None else float(threshold[0]),
                quiet_loss=_compute_quiet_loss(w, key.learnt.get(LOUDNESS), permuter, reading),
                permuted=LOOK,
                false_reads=false_reads,
                published=self.l2_threshold if self.as_published else None,
            ),
        )

    def nulls(
        self, weights: Mapping[str, Array], key: Key, draws: int
    ) -> dict[str, NullHypothesis]:
        """Return `PermutedUnits`, and `UnmarkedModels` where the key holds their losses."""
        # If the cap forbids the draws that alpha needs, no number of draws can help: a few suffice.
        capped = draws if draws <= self.most_permutations else min(LOOK, self.most_permutations)
        found: dict[str, NullHypothesis] = {
            PermutedUnits.name: self._make_permutation_null(weights, key, capped)
        }
        if SIBLINGS in key.learnt:
            found[UnmarkedModels.name] = UnmarkedModels(key.learnt[SIBLINGS])
        return found

    def get_unit_axes(self, key: Key) -> dict[str, int]:
        """Return the axis of the hidden units in each tensor, as the key states it."""
        self.make_permuter(key.tensors)  # raises for axes that do not exist
        return dict(zip(key.tensors, self.units, strict=True))

    def compare_unmarked_model(
        self,
        weights: Mapping[str, Array],
        key: Key,
        suspect: Mapping[str, Array],
        draws: int,
    ) -> tuple[float, float]:
        """Return the smaller loss of an unmarked model, plain or rescaled, and its plain rank.

        Rescaling makes each of its tensors as loud as that of the suspect.
        """
        # Axis −1 makes each whole tensor one group.
        whole = UnitPermuter.from_axes(key.tensors, dict.fromkeys(key.tensors, -1), 1)
        # Loudness is matched by tensor, because hidden units of two models do not correspond.
        w, own = self.read_vector(weights, key), self.read_vector(suspect, key)
        loud = whole.scale_to_loudness(w, whole.compute_loudness(own))
        losses = self._make_message_reader(key).compute_losses(np.stack([w, loud]))
        ranked = self._make_permutation_null(weights, key, draws)
        return float(losses.min()), compute_sequential_log10_p(
            *ranked.count_exceedances(), ranked.stop_at
        )

    def _make_permutation_null(
        self, weights: Mapping[str, Array], key: Key, draws: int
    ) -> PermutedUnits:
        """Make the null hypothesis that ranks a suspect's loss among its permutations."""
        w, reading = self.read_vector(weights, key), self._make_message_reader(key)
        permuter, stream = self.make_permuter(key.tensors), self._make_stream(weights, key, "units")
        loss = reading.compute_tied_loss(w)

        def generate_losses(count: int) -> Iterator[NDArray[np.float64]]:
            """Generate the losses of `count` permutations in batches, with a progress bar."""
            with show_progress("ranking among permutations", count) as advance:
                for vectors in permuter.generate_permuted_batches(w, stream, count):
                    # The rank only needs to know which losses are at most the suspect's.
                    yield reading.compute_losses(vectors, up_to=loss)
                    advance(len(vectors))

        return PermutedUnits(generate_losses, loss, draws)

    def embedding_failure(self, evidence: Reading) -> str | None:
        """Return why verify would not find the mark in the owner's model; None if it would.

        The reason may be the bits, θ, or the sibling threshold. The published form has no siblings:
        only a verdict says whether the model differs from them.
        """
        loss, reader = evidence.cross_entropy, evidence.reader
        if loss is None or reader is None:
            raise AssertionError("a learnt reader reads scores")
        siblings = None if self.as_published else reader.threshold
        most = self.l2_threshold if siblings is None else min(self.l2_threshold, siblings)
        if evidence.match_count == evidence.bits and loss <= most:
            return None
        return (
            f"{evidence.match_count} of {evidence.bits} bits are in the model, L2 is {loss:.2g} "
            f"(expected all of them and at most {most:.2g}): train longer, or raise strength"
        )

    def with_calibration(
        self, key: Key, siblings: Sequence[Mapping[str, Array]], marked: Mapping[str, Array]
    ) -> Key:
        """Return the key with its sibling threshold, see `learnt_reader.calibrate_threshold`.

        The loss of a sibling is the smaller of two losses: with no group louder than in the marked
        model, and with every group exactly as loud.
        """
        if not siblings:
            return key
        permuter, reading = self.make_permuter(key.tensors), self._make_message_reader(key)
        loudness = permuter.compute_loudness(self.read_vector(marked, key))
        vectors = [self.read_vector(each, key) for each in siblings]
        losses = [
            reading.compute_losses(
                np.stack([permuter.scale_to_loudness(w, loudness, most=most) for w in vectors])
            )
            for most in (1.0, np.inf)
        ]
        found = calibrate_threshold(np.minimum(*losses), loudness)
        return replace(key, learnt={**key.learnt, **found})

    def _make_message_reader(self, key: Key) -> MessageReader:
        """Make the reader of a key, together with the key's message.

        Raises:
            ConfigError: the measurements or tensors of the reader are damaged.
        """
        check_calibration(key.learnt)
        tensors = {
            n: each for n, each in key.learnt.items() if n not in (SIBLINGS, THRESHOLD, LOUDNESS)
        }
        width = sum(math.prod(shape) for shape in key.tensors.values())
        mask = self.get_gate_mask(key) if self.mode == "manu" else None
        if self.reader_code is not None:
            make_logits = load_object(
                "countermark.schemes.independent_network.readers:make_module_logits"
            )
            logits = make_logits(self, width, tensors, mask)
            # Without a gain: nothing is known of the sums in foreign code except their precision.
            return MessageReader(logits, key.message, np.float32)
        reader = MlpReader.from_tensors(tensors, width=width, hidden=self.hidden, bits=self.bits)
        # In MANU the gate is stored twice. A learnt gate that differs from the committed mask could
        # have been fitted to a suspect.
        if mask is not None and not np.array_equal(reader.gate, mask):
            raise ConfigError("the key's gate is not the mask that its commitment fixed")
        return MessageReader(reader, key.message, gain=reader.gain)

    @staticmethod
    def _make_stream(weights: Mapping[str, Array], key: Key, purpose: str) -> KeyStream:
        """Return a stream that depends on key and suspect, so that p can be reproduced."""
        digests = b"".join(digest_tensor(name, weights[name]) for name in key.tensors)
        # The digests stand in place of a tensor name: each suspect has permutations of its own.
        return KeyStream(key.material.secret, key.c1 or key.c0, purpose, digests.hex())


def _compute_quiet_loss(
    w: NDArray[np.float32],
    loudness: NDArray[np.float64] | None,
    permuter: UnitPermuter,
    reading: MessageReader,
) -> float | None:
    """Return L2 of the vector w (M,) with no unit louder than in the marked model.

    Returns None where the key does not hold the loudness of the marked model.

    Raises:
        ConfigError: the key holds another number of loudness values than there are groups.
    """
    if loudness is None:
        return None
    groups = int(permuter.group.max()) + 1
    if loudness.shape != (groups,):
        raise ConfigError(
            f"the key's {LOUDNESS} is {list(loudness.shape)}: expected {[groups]}, one for each "
            "hidden unit of each tensor"
        )
    return float(reading.compute_losses(permuter.scale_to_loudness(w, loudness, most=1.0)[None])[0])
