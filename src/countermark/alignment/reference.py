"""What a suspect is aligned to: the owner's own model, and which of its neurons belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from countermark.units import Units, chain_of
from countermark.weights import Suspect, Weights, open_weights

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Reference:
    """The owner's model as a reference.

    Best is one from before the message was drawn: the weights that a fine-tuning or a stamp began
    with. The marked model itself will do; then the null hypothesis is a simulated one.

    Attributes:
        weights: a weight file or a live module.
        units: its neurons, as `of_module` finds them; of None they are guessed as those of a chain.
    """

    weights: Suspect
    units: Sequence[Units] | None = None

    @classmethod
    def of_module(cls, model: nn.Module, weights: Suspect | None = None) -> Reference:
        """A live model as reference, or a weight file of a model like this one.

        Raises:
            ConfigError: its forward cannot be traced.
        """
        from countermark.units.tracing import units_of

        return cls(model if weights is None else weights, units_of(model))

    @classmethod
    def of(cls, model: Reference | Suspect) -> Reference:
        """A weight file, whose layers are a plain chain, or a live model as reference."""
        if isinstance(model, Reference):
            return model
        return cls.of_module(model) if _is_module(model) else cls(model)

    def opened(self) -> tuple[Weights, Sequence[Units]]:
        """Its tensors, to be closed, and its neurons.

        Raises:
            SuspectError: the weights cannot be read.
            ConfigError: its layers are no plain chain, and nothing else says how they belong.
        """
        weights = open_weights(self.weights)
        if self.units is not None:
            return weights, self.units
        return weights, chain_of({name: info.shape for name, info in weights.tensors.items()})


@dataclass(frozen=True)
class Disguised:
    """A suspect whose neurons may be in another order and scale than the owner's.

    It is read as it is and once more as it is after alignment, which is a test of its own.

    Attributes:
        suspect: a weight file or a live module.
        reference: the owner's model; a weight file alone if its layers are a plain chain.
    """

    suspect: Suspect
    reference: Reference | Suspect


def _is_module(model: Suspect) -> TypeGuard[nn.Module]:
    return hasattr(model, "named_parameters")
