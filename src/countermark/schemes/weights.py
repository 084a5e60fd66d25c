"""Marks in the weights, read from named tensors: the steps that all weight schemes share.

A weight scheme implements `capacity` and `extract` (numpy) and, in its training file, `loss`
(torch).
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark._internal.plugins import load_object
from countermark.checkpoints import (
    MOST_CANDIDATES,
    Array,
    Suspect,
    Weights,
    derive_tensors,
    find_assignments,
)
from countermark.errors import CapacityError, ConfigError, suggest_nearest
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.key_place import KeyPlace, make_unfinished_key
from countermark.keys.messages import Bits
from countermark.results.null_hypotheses import (
    LEAST_FORGERY_BITS,
    FairCoin,
    FreshKeys,
    NullHypothesis,
    compute_forgery_bits,
)
from countermark.results.reading import Reading
from countermark.results.verdict import ALPHA
from countermark.schemes.base import Scheme
from countermark.schemes.key_limits import MOST_BITS, MOST_VALUES, Count, Factor

if TYPE_CHECKING:
    from torch import nn

    from countermark.embedding.base import Embedding


MASK = "mask"
"""First part of the names of frozen tensors that say which values carry the mark."""


@dataclass(frozen=True)
class WeightScheme(Scheme):
    """A mark in the weights, read white-box from named tensors.

    Attributes:
        layer: name of the tensor that carries the mark, several names, or "all" for every
            trainable tensor of two dimensions or more.
        bits: length T of the message.
        over_capacity: embed more bits than the tensors can hold, for benchmarks; the excess is
            recorded and not refused.
    """

    layer: tuple[str, ...] | str
    bits: Annotated[int, Field(ge=1, le=MOST_BITS)] = field(default=256)
    over_capacity: bool = field(default=False, kw_only=True)

    family: ClassVar[str] = "weights"
    threat_model: ClassVar[str] = "white-box: named tensors"
    linear: ClassVar[bool]
    most_values: ClassVar[int] = MOST_VALUES
    """How many values the tensors of a key may have together."""
    partial: ClassVar[bool] = False
    """Whether tensors that a suspect has not are left out, and the others read without them."""
    null: ClassVar[type[NullHypothesis]] = FairCoin

    @property
    def reading_length(self) -> int:
        """T, the length of the message."""
        return self.bits

    @property
    def needs_siblings(self) -> bool:
        """True where the reader is learnt: it may also read unmarked siblings of the host."""
        return not self.linear

    @abstractmethod
    def capacity(self, tensors: Mapping[str, tuple[int, ...]], selected: int | None) -> int:
        """Return how many bits tensors of these shapes can hold.

        Args:
            tensors: names and shapes of the tensors that carry the mark.
            selected: how many of the values that are read carry the mark; None for all of them.
        """

    @abstractmethod
    def extract(self, weights: Mapping[str, Array], key: Key) -> Reading:
        """Read the bits of a key out of the tensors that it names."""

    def read_bits(self, weights: Mapping[str, Array], key: Key) -> Bits:
        """Return only the raw bits (T,), as `extract` reads them, without payload."""
        return self.extract(weights, key).read.astype(np.uint8)

    @final
    def locate_tensors(self, weights: Weights, key: Key) -> tuple[Weights, list[dict[str, str]]]:
        """Find the tensors of a key in an open suspect, in whatever layout and under any names.

        Args:
            weights: the suspect.
            key: the key that will read the tensors.

        Returns: the suspect with the key's tensors made out of its own, and the ways to assign the
            suspect's names to the key's: each is one test. One way more than `MOST_CANDIDATES`
            says that there are too many.
        """
        before = None
        # A learnt reader needs to know which axes hold hidden units, which a layout may change.
        if self.linear:
            weights = derive_tensors(weights, key.tensors)
            before = self.get_original_values(key)
        ways = find_assignments(weights, key.tensors, partial=self.partial, before=before)
        return weights, list(islice(ways, MOST_CANDIDATES + 1))

    def read_suspect_tensors(
        self,
        weights: Weights,
        where: Mapping[str, str],
        key: Key,  # noqa: ARG002 - a scheme that reads parts of tensors needs it
    ) -> dict[str, Array]:
        """Read the tensors that `extract` needs from an open suspect: whole tensors by default.

        Args:
            weights: the suspect.
            where: from the key's name of each tensor to the suspect's name.
            key: the key that will read the tensors.
        """
        return {wanted: weights.read(name) for wanted, name in where.items()}

    def get_original_values(self, key: Key) -> dict[str, tuple[int, Array]]:  # noqa: ARG002 - overrides use it
        """Return the values that a key keeps of its tensors from before the mark.

        The result holds, for each tensor, the place of the first value and the values. They are
        frozen, hence older than the message, and replace the values of a reference model there.
        """
        return {}

    def get_unit_axes(self, key: Key) -> dict[str, int]:  # noqa: ARG002 - overrides use it
        """Return for each tensor the axis that a null hypothesis permutes, −1 for no axis.

        The result is {} where no null hypothesis permutes hidden units.
        """
        return {}

    def compare_unmarked_model(
        self,
        weights: Mapping[str, Array],  # noqa: ARG002 - a learnt reader reads them
        key: Key,  # noqa: ARG002
        suspect: Mapping[str, Array],  # noqa: ARG002
        draws: int,  # noqa: ARG002
    ) -> tuple[float, float]:
        """Read an unmarked model that the examiner supplied, unchanged and as loud as the suspect.

        Args:
            weights: the tensors that are read of the unmarked model.
            key: the key that reads them.
            suspect: the tensors that are read of the suspect.
            draws: how many permutations of the unmarked model's units are read at most.

        Returns: the smaller of the two losses, and log10 of the rank of the unmarked model among
        its
            permutations.

        Raises:
            ConfigError: the scheme is not judged by unmarked models.
        """
        raise ConfigError(
            f"a key of {self.name} is judged by no unmarked models: leave --unmarked out"
        )

    def nulls(
        self,
        weights: Mapping[str, Array],
        key: Key,
        draws: int,  # noqa: ARG002 - null hypotheses that rank by random draws use it
    ) -> dict[str, NullHypothesis]:
        """Return the null hypotheses that can judge this scheme; the scheme's own is first.

        Args:
            weights: the tensors that are read of the suspect.
            key: the key that reads them.
            draws: how many draws a rank needs to reach alpha, where no exact p exists.
        """
        found: dict[str, NullHypothesis] = {FairCoin.name: FairCoin()}
        if self.linear:
            # The rank is exact because a linear mark reads any key of the same form alike. A learnt
            # reader belongs to one message: a fresh key would need a reader of its own, trained on
            # the host.
            found[FreshKeys.name] = FreshKeys(
                redraw=lambda: self._count_fresh_matches(weights, key)
            )
        return found  # schemes with a learnt reader override this method

    def _count_fresh_matches(self, weights: Mapping[str, Array], key: Key) -> int:
        """Return how many of its own bits a fresh key of the same form reads in these tensors."""
        return self.extract(weights, replace(key, material=KeyMaterial.generate())).match_count

    def embedding_failure(self, evidence: Reading) -> str | None:
        """Return why verify would not find the mark in the owner's model; None if it would."""
        # A message of few bits cannot reach ALPHA or the forgery bits even when all its bits are
        # read. A perfect reading must pass all the same; `check_capacity` has warned of it.
        log10_p, floor = (
            self.null().compute_log10_p(evidence),
            self.null().compute_log10_floor(evidence),
        )
        if log10_p <= max(math.log10(ALPHA), floor) and compute_forgery_bits(evidence) >= min(
            LEAST_FORGERY_BITS, evidence.bits
        ):
            return None
        return (
            f"only {evidence.match_count} of {evidence.bits} bits are in the model "
            f"(log10 p {log10_p:.1f}): train longer, raise strength, or take fewer bits"
        )

    def resolve_parameters(self, parameters: Mapping[str, tuple[int, ...]]) -> Self:  # noqa: ARG002
        """Return this scheme with the fields filled in that depend on the model's parameters."""
        return self

    def with_calibration(
        self,
        key: Key,
        siblings: Sequence[Mapping[str, Array]],  # noqa: ARG002
        marked: Mapping[str, Array],  # noqa: ARG002
    ) -> Key:
        """Return the key with the losses of its finished reader on held-out unmarked models.

        Args:
            key: with its finished reader.
            siblings: tensors by name of unmarked relatives of the host that training never saw.
            marked: tensors by name of the marked model.
        """
        return key

    @final
    def choose_tensors(
        self, parameters: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Choose the tensors that carry the mark from a model's parameters (shapes by name).

        Raises:
            ConfigError: the model does not have a layer; the message suggests the nearest name.
        """
        # "all" means matrices and kernels. A vector, such as a bias, carries a mark only where the
        # caller names it.
        matrices = {name: shape for name, shape in parameters.items() if len(shape) > 1}
        if self.layer == "all":
            return matrices
        names = (self.layer,) if isinstance(self.layer, str) else self.layer
        for name in names:
            if name not in parameters:
                raise ConfigError(
                    f"the model has no trainable tensor {name!r}: {suggest_nearest(name, matrices)}"
                )
        return {name: parameters[name] for name in names}

    @final
    def generate_key(
        self,
        tensors: Mapping[str, tuple[int, ...]],
        *,
        owner: str,
        material: KeyMaterial | None = None,
        frozen: Mapping[str, NDArray[Any]] | None = None,
    ) -> Key:
        """Make a key for tensors of these names and shapes.

        Args:
            tensors: the tensors that carry the mark, as `choose_tensors` returns them.
            owner: the name that the payload contains.
            material: secret and nonce; drawn from the operating system when None.
            frozen: tensors that are fixed before the message is drawn; their digests enter the
                commitment.

        Raises:
            CapacityError: the bits do not fit the values that are read; names the limit.
            ConfigError: the tensors have more values than a key of this scheme may read; names the
                limit.
        """
        key = Key(
            scheme=self.name,
            fields=self.to_fields(),
            tensors=dict(tensors),
            owner=owner,
            material=material or KeyMaterial.generate(),
            frozen=dict(frozen or {}),
            trusted=self.reader_code,
        )
        self.require_readable(tensors)
        self.check_capacity(tensors, self.count_selected_values(key))
        return key

    @final
    def check_key(self, key: Key) -> None:
        """Raise `ConfigError` for a key that reads too much, or less than its bits need."""
        # The order matters: `count_selected_values` may expand a mask of all values, which a
        # hostile key could make too large for the memory.
        self.require_readable(key.tensors)
        self.require_capacity(key.tensors, self.count_selected_values(key))

    @final
    def require_readable(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ConfigError` for tensors that have more values than a key may read."""
        values = sum(math.prod(shape) for shape in tensors.values())
        if values > self.most_values:
            raise ConfigError(
                f"{self.name}: the tensors that are read have {values:,} values: expected 1 to "
                f"{self.most_values:,}"
            )

    @final
    def check_capacity(
        self, tensors: Mapping[str, tuple[int, ...]], selected: int | None = None
    ) -> None:
        """Raise `CapacityError` if T bits do not fit; warn if undated bits prove little."""
        self.require_capacity(tensors, selected)
        if self.bits < LEAST_FORGERY_BITS:
            # Whoever can try 2^T keys finds one that fits, unless a dated claim shows that the key
            # is older than the suspect.
            warnings.warn(
                f"even a perfect reading of {self.bits} bits cannot reach "
                f"{LEAST_FORGERY_BITS:.0f} forgery bits: without a dated claim verify will answer "
                "no_verdict; take 128 bits or more",
                stacklevel=2,
            )

    @final
    def require_capacity(
        self, tensors: Mapping[str, tuple[int, ...]], selected: int | None = None
    ) -> None:
        """Raise `CapacityError` when T bits do not fit, or when no value is read at all."""
        limit = self.capacity(tensors, selected)
        if self.bits > limit and not (self.over_capacity and limit):
            raise CapacityError(
                f"{self.bits} bits do not fit: what is read of {', '.join(tensors)} holds at most "
                f"{limit}; take fewer bits or more layers"
            )

    def count_selected_values(self, key: Key) -> int | None:  # noqa: ARG002 - overrides use it
        """Return how many of the values that are read carry the mark; None for all of them."""
        return None

    @final
    def embed(  # noqa: PLR0913 - all but the model are keyword-only
        self, model: nn.Module, *, owner: str, key: str | Path | KeyPlace | None = None,
        resume: bool = False, material: KeyMaterial | None = None,
        unmarked: Sequence[Suspect] = (), siblings: Sequence[Suspect] = (),
    ) -> Embedding:  # fmt: skip
        """Start to embed a mark while a model is trained; see `embedding.WeightEmbedding`.

        Args:
            model: the host.
            owner: the name of the owner of the mark.
            key: where the finished key is saved when the block ends; a path, or a `KeyPlace` with a
                passphrase. The place is checked at once: an existing key is never overwritten.
                While training runs, the secret lies in a private folder beside the place.
            resume: continue with the key that an interrupted training left at that place; if there
                is no such key, start with a new one.
            material: secret and nonce, where the caller keeps them; drawn if None.
            unmarked: models without the mark, from which a learnt reader is trained to read
                nothing.
            siblings: more unmarked models, which training never sees.

        Raises:
            KeyFileError: the key exists, an unfinished key exists and `resume` is false, or nothing
                can be written at the place.
            ConfigError: scheme and model do not fit.
        """
        # Imported here because it loads torch, which reading a mark does not need.
        start_embedding = load_object("countermark.embedding:WeightEmbedding")
        started: Embedding = start_embedding(
            self, model, owner=owner, material=material, unmarked=unmarked, siblings=siblings,
            place=make_unfinished_key(key, resume=resume),
        )  # fmt: skip
        return started


@dataclass(frozen=True)
class ConvergedScheme(WeightScheme):
    """A weight scheme that can mark only converged weights (Wang et al. 2020).

    Attributes:
        convergence_std, convergence_epochs, start_epoch: a weight has converged when the sample
            standard deviation of its last `convergence_epochs` epoch values is below
            `convergence_std`; the mark starts after `start_epoch` epochs.
    """

    convergence_std: Factor = field(default=0.01, kw_only=True)
    convergence_epochs: Count = field(default=5, kw_only=True)
    start_epoch: Count = field(default=6, kw_only=True)

    @final
    def check_start(self) -> None:
        """Raise `ConfigError` when the mark starts before convergence can be judged."""
        if self.start_epoch < self.convergence_epochs:
            raise ConfigError(
                f"start_epoch is {self.start_epoch}: convergence is judged on "
                f"{self.convergence_epochs} epochs, start at {self.convergence_epochs} or later"
            )
