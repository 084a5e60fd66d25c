"""What a suspect is aligned to: the owner's own model, and which of its neurons belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
