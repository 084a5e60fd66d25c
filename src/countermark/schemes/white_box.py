"""Marks in the weights, read from named tensors: the steps that all such schemes share.

A weight scheme writes `capacity` and `extract` (numpy) and, in its training half, `loss` (torch).
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark.errors import CapacityError, ConfigError, nearest
from countermark.evidence import Evidence
from countermark.key import Key, KeyMaterial
from countermark.message import Bits
from countermark.nulls import LEAST_FORGERY_BITS, FairCoin, FreshKeys, Null, forgery_bits
from countermark.schemes.base import Scheme
from countermark.schemes.bounds import MOST_BITS, MOST_VALUES, Count, Factor
from countermark.verdict import ALPHA
from countermark.weights import Array, Suspect, Weights

if TYPE_CHECKING:
    from torch import nn

    from countermark.embedding import KeyPlace, WeightEmbedding
    from countermark.schemes.training.base import WeightTraining


MASK = "mask"
"""First part of the names of frozen tensors that say which values carry the mark."""


@dataclass(frozen=True)
class WeightScheme(Scheme):
    """A mark in the weights, read white-box from named tensors.

    Attributes:
        layer: name of the tensor that carries the mark, several names, or "all" for every
            trainable tensor of two dimensions or more.
        bits: length T of the message.
        over_capacity: embed more bits than can be held, for benchmarks; recorded, not refused.
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
    null: ClassVar[type[Null]] = FairCoin

    @property
    def size(self) -> int:
        """T, the length of the message."""
        return self.bits

    @property
    def needs_siblings(self) -> bool:
        """Whether a reader is learnt, which has to be told from unmarked siblings."""
        return not self.linear

    @abstractmethod
    def capacity(self, tensors: Mapping[str, tuple[int, ...]], selected: int | None) -> int:
        """How many bits tensors of these shapes can hold.

        Args:
            tensors: names and shapes of what carries the mark.
            selected: how many of the values that are read carry it; None for all of them.
        """

    @abstractmethod
    def extract(self, weights: Mapping[str, Array], key: Key) -> Evidence:
        """Read the key's bits out of the tensors it names."""

    def read_bits(self, weights: Mapping[str, Array], key: Key) -> Bits:
        """The raw bits (T,) alone, as `extract` reads them, without payload."""
        return self.extract(weights, key).read.astype(np.uint8)

    def read_from(
        self,
        weights: Weights,
        where: Mapping[str, str],
        key: Key,  # noqa: ARG002 - a scheme that reads parts of tensors needs it
    ) -> dict[str, Array]:
        """What `extract` needs of an open suspect: whole tensors, if a scheme says no more.

        Args:
            weights: the suspect.
            where: the key's name of each tensor to the suspect's.
            key: the key that will read it.
        """
        return {wanted: weights.read(name) for wanted, name in where.items()}

    def before(self, key: Key) -> dict[str, tuple[int, Array]]:  # noqa: ARG002 - most keep nothing
        """What a key keeps of its tensors from before the mark: each one's first place and values.

        It is frozen, hence older than the message, and takes the place of what a reference has.
        """
        return {}

    def unit_axes(self, key: Key) -> dict[str, int]:  # noqa: ARG002 - most permute nothing
        """For each tensor the axis that a null permutes, −1 for none; {} where no null does."""
        return {}

    def compare_unmarked(
        self,
        weights: Mapping[str, Array],  # noqa: ARG002 - a learnt reader reads them
        key: Key,  # noqa: ARG002
        suspect: Mapping[str, Array],  # noqa: ARG002
        draws: int,  # noqa: ARG002
    ) -> tuple[float, float]:
        """Read an unmarked model that the examiner supplied, as it is and as loud as the suspect.

        Args:
            weights: what is read of the unmarked model.
            key: the key that reads it.
            suspect: what is read of the suspect.
            draws: how many permutations of the unmarked model's units are read at most.

        Returns: the smaller loss, and log10 of the rank of the model among its permutations.

        Raises:
            ConfigError: the scheme has no use for it.
        """
        raise ConfigError(
            f"a key of {self.name} is judged by no unmarked models: leave --unmarked out"
        )

    def nulls(
        self,
        weights: Mapping[str, Array],
        key: Key,
        draws: int,  # noqa: ARG002 - for ranks
    ) -> dict[str, Null]:
        """The null hypotheses that this scheme can be judged by; its own one first.

        Args:
            weights: what is read of the suspect.
            key: the key that reads it.
            draws: how many draws a rank needs to reach alpha, where nothing is exact.
        """
        found: dict[str, Null] = {FairCoin.name: FairCoin()}
        if self.linear:
            found[FreshKeys.name] = FreshKeys(redraw=lambda: self._fresh_match(weights, key))
        return found  # a scheme whose reader is learnt has others

    def _fresh_match(self, weights: Mapping[str, Array], key: Key) -> int:
        """How many of its own bits a new key of the same form finds in these tensors."""
        return self.extract(weights, replace(key, material=KeyMaterial.fresh())).matched

    def not_taken(self, evidence: Evidence) -> str | None:
        """Why a mark would not be found in the owner's own model; None when it would."""
        log10_p, floor = self.null().log10_p(evidence), self.null().log10_floor(evidence)
        if log10_p <= max(math.log10(ALPHA), floor) and forgery_bits(evidence) >= min(
            LEAST_FORGERY_BITS, evidence.bits
        ):
            return None
        return (
            f"only {evidence.matched} of {evidence.bits} bits are in the model "
            f"(log10 p {log10_p:.1f}): train longer, raise strength, or take fewer bits"
        )

    def settled(self, parameters: Mapping[str, tuple[int, ...]]) -> Self:  # noqa: ARG002
        """This scheme with the fields filled in that depend on the model's parameters."""
        return self

    def calibrated(
        self,
        key: Key,
        siblings: Sequence[Mapping[str, Array]],  # noqa: ARG002
        marked: Mapping[str, Array],  # noqa: ARG002
    ) -> Key:
        """The key with what its finished reader gives on unmarked relatives that it never saw.

        Args:
            key: with its finished reader.
            siblings: tensors by name.
            marked: those of the marked model.
        """
        return key

    @final
    def choose(self, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The tensors that carry the mark, out of a model's parameters by name and shape.

        Raises:
            ConfigError: a layer that the model does not have; names the nearest.
        """
        matrices = {name: shape for name, shape in parameters.items() if len(shape) > 1}
        if self.layer == "all":
            return matrices
        names = (self.layer,) if isinstance(self.layer, str) else self.layer
        for name in names:
            if name not in parameters:
                raise ConfigError(
                    f"the model has no trainable tensor {name!r}: {nearest(name, matrices)}"
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
            tensors: what carries the mark, as `choose` gives it.
            owner: the name that the payload speaks of.
            material: secret and nonce; drawn from the operating system when None.
            frozen: what was fixed before the message is drawn; its digests enter the commitment.

        Raises:
            CapacityError: too many bits for what is read; names the limit.
            ConfigError: more values than a key of this scheme may read; likewise.
        """
        key = Key(
            scheme=self.name,
            fields=self.to_fields(),
            tensors=dict(tensors),
            owner=owner,
            material=material or KeyMaterial.fresh(),
            frozen=dict(frozen or {}),
            trusted=self.code,
        )
        self.require_readable(tensors)
        self.check_capacity(tensors, self.selected(key))
        return key

    @final
    def check_key(self, key: Key) -> None:
        """Raise `ConfigError` for a key that reads too much, or less than its bits need."""
        self.require_readable(key.tensors)  # first: what a scheme selects may be expanded for that
        self.require_capacity(key.tensors, self.selected(key))

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
        """Raise `CapacityError` when T bits do not fit; warn when T bits prove little undated."""
        self.require_capacity(tensors, selected)
        if self.bits < LEAST_FORGERY_BITS:
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
        """Raise `CapacityError` when T bits do not fit, or when nothing at all is read."""
        limit = self.capacity(tensors, selected)
        if self.bits > limit and not (self.over_capacity and limit):
            raise CapacityError(
                f"{self.bits} bits do not fit: what is read of {', '.join(tensors)} holds at most "
                f"{limit}; take fewer bits or more layers"
            )

    def selected(self, key: Key) -> int | None:  # noqa: ARG002 - a scheme that selects overrides
        """How many of the values that are read carry the mark; None for all of them."""
        return None

    @final
    def embed(  # noqa: PLR0913 - what is stated stands by its name
        self, model: nn.Module, *, owner: str, key: str | Path | KeyPlace | None = None,
        resume: bool = False, material: KeyMaterial | None = None,
        unmarked: Sequence[Suspect] = (), siblings: Sequence[Suspect] = (),
    ) -> WeightEmbedding:  # fmt: skip
        """Start to mark a model while it is trained; see `embedding.WeightEmbedding`.

        Args:
            model: the host.
            owner: whose mark it is.
            key: where the finished key is saved when the block ends; a path, or a `KeyPlace` with a
                passphrase. It is looked at now: a key that exists is never overwritten. While
                training runs, the secret lies in a private folder beside it.
            resume: go on with the key that an interrupted training left at that place; without one
                begin anew.
            material: secret and nonce, where the caller keeps them; else drawn.
            unmarked: models without the mark that a learnt reader is taught to know nothing of.
            siblings: more of them, which training never sees.

        Raises:
            KeyFileError: the key exists, an unfinished one does and `resume` is false, or nothing
                can be written there.
            ConfigError: scheme and model do not fit.
        """
        from countermark.embedding import WeightEmbedding, place_for

        return WeightEmbedding(
            self, model, owner=owner, material=material, unmarked=unmarked, siblings=siblings,
            place=place_for(key, resume=resume),
        )  # fmt: skip

    @final
    def training(self) -> type[WeightTraining]:
        """The training half of this scheme, loaded with torch when somebody trains."""
        half: type[WeightTraining] = self.half()
        return half


@dataclass(frozen=True)
class ConvergedScheme(WeightScheme):
    """A weight scheme that can be told to mark only what has converged (Wang et al. 2020).

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
