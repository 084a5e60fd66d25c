"""Describe the owner's model that a suspect is aligned to, with its permutation groups."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from countermark.alignment.symmetries import (
    Architecture,
    PermutationGroup,
    find_block_groups,
    find_chain_groups,
)
from countermark.checkpoints import Suspect, Weights, open_weights
from countermark.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Reference:
    """The owner's model as a reference.

    The best reference is a model from before the message was drawn: the weights with which a
    fine-tuning or a stamp began. The marked model itself works too; then the null hypothesis is a
    simulated one.

    Attributes:
        weights: a weight file or a live module.
        units: its permutation groups, as found in a live model. If None, they are guessed from the
            names of a transformer's layers or as those of a plain chain of layers.
    """

    weights: Suspect
    units: Sequence[PermutationGroup] | None = None

    @classmethod
    def from_module(cls, model: nn.Module, weights: Suspect | None = None) -> Reference:
        """Make a reference of a live model, or of a weight file with the same architecture.

        Raises:
            ConfigError: the forward method of the model cannot be traced.
        """
        from countermark.alignment.symmetries.tracing import trace_permutation_groups

        return cls(
            model if weights is None else weights, trace_permutation_groups(model, residual=True)
        )

    @classmethod
    def from_source(cls, model: Reference | Suspect) -> Reference:
        """Make a reference of a live model, or of a file of a transformer or a plain chain.

        A reference is returned unchanged.
        """
        if isinstance(model, Reference):
            return model
        return cls.from_module(model) if _is_module(model) else cls(model)

    def open_reference(self) -> tuple[Weights, Sequence[PermutationGroup]]:
        """Open the weights and return them with the permutation groups; the caller closes them.

        Raises:
            SuspectError: the weights cannot be read.
            ConfigError: the layers are neither a plain chain nor those of a transformer, and the
                permutation groups were not given.
        """
        # The stack closes the weights if the guess fails, and otherwise leaves them open.
        with ExitStack() as stack:
            weights = stack.enter_context(open_weights(self.weights))
            units = guess_permutation_groups(weights) if self.units is None else self.units
            stack.pop_all()
        return weights, units


@dataclass(frozen=True)
class SuspectWithReference:
    """A suspect whose neurons may be in another order and scale than those of the owner's model.

    The suspect is read as it is, and once more after alignment, which is a separate test.

    Attributes:
        suspect: a weight file or a live module.
        reference: the owner's model; a weight file alone if its layers are a plain chain or a
            transformer's.
    """

    suspect: Suspect
    reference: Reference | Suspect


def guess_permutation_groups(weights: Weights) -> Sequence[PermutationGroup]:
    """Guess permutation groups from names, shapes and the configuration beside a weight file.

    Raises:
        ConfigError: the layers are neither a plain chain nor those of a transformer.
    """
    # Sorted, because the order of tensors in a file must decide nothing: no model digest fixes it.
    shapes = {name: info.shape for name, info in sorted(weights.tensors.items())}
    path = Path(weights.name)
    architecture = Architecture.load_beside(path) if path.exists() else None
    # With a configuration the names of a transformer win; otherwise a plain chain is tried first.
    if architecture and (found := find_block_groups(shapes, architecture, residual=True)):
        return found
    try:
        return find_chain_groups(shapes)
    except ConfigError:
        if found := find_block_groups(shapes, None, residual=True):
            return found
        raise


def _is_module(model: Suspect) -> TypeGuard[nn.Module]:
    """Return true if a model is a live torch module."""
    # torch is not imported here: a reference may be a file on a machine without torch.
    return hasattr(model, "named_parameters")
