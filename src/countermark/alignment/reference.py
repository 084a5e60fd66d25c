"""What a suspect is aligned to: the owner's own model, and which of its neurons belong together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from countermark.errors import ConfigError
from countermark.units import Architecture, Units, blocks_of, chain_of
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
        units: its neurons, as `of_module` finds them; of None they are guessed, as those of a
            transformer or of a chain.
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

        return cls(model if weights is None else weights, units_of(model, residual=True))

    @classmethod
    def of(cls, model: Reference | Suspect) -> Reference:
        """A live model as reference, or a file whose layers are a transformer's or a chain."""
        if isinstance(model, Reference):
            return model
        return cls.of_module(model) if _is_module(model) else cls(model)

    def opened(self) -> tuple[Weights, Sequence[Units]]:
        """Its tensors, to be closed, and its neurons.

        Raises:
            SuspectError: the weights cannot be read.
            ConfigError: its layers are no plain chain and no transformer's, and nothing else says
                how they belong.
        """
        with ExitStack() as stack:
            weights = stack.enter_context(open_weights(self.weights))
            units = guess_units(weights) if self.units is None else self.units
            stack.pop_all()
        return weights, units


@dataclass(frozen=True)
class Disguised:
    """A suspect whose neurons may be in another order and scale than the owner's.

    It is read as it is and once more as it is after alignment, which is a test of its own.

    Attributes:
        suspect: a weight file or a live module.
        reference: the owner's model; a weight file alone if its layers are a plain chain or a
            transformer's.
    """

    suspect: Suspect
    reference: Reference | Suspect


def guess_units(weights: Weights) -> Sequence[Units]:
    """Units by names and shapes; how many heads there are the configuration beside a file says.

    The order in which a file lists its tensors decides nothing: no digest of a model fixes it.
    """
    shapes = {name: info.shape for name, info in sorted(weights.tensors.items())}
    path = Path(weights.name)
    architecture = Architecture.beside(path) if path.exists() else None
    if architecture and (found := blocks_of(shapes, architecture, residual=True)):
        return found
    try:
        return chain_of(shapes)
    except ConfigError:
        if found := blocks_of(shapes, None, residual=True):
            return found
        raise


def _is_module(model: Suspect) -> TypeGuard[nn.Module]:
    return hasattr(model, "named_parameters")
