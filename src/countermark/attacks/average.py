"""Averaging: merge the stolen weights with the weights of other models of the same architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from countermark.attacks.base import Attack, ChangeResult
from countermark.checkpoints import load_state
from countermark.errors import ConfigError


@dataclass(frozen=True)
class Average(Attack):
    """An attack that replaces each tensor by a weighted mean over the stolen and other models.

    The other models can be copies for other buyers, the base model, or fine-tuned versions.
    Models that were trained from different starting weights have no common coordinates, and their
    average classifies nothing.

    Attributes:
        others: weight files with the same tensor names and shapes; they get equal weights.
        share: the weight of the stolen model in the mean, 0 to 1.
    """

    name: ClassVar[str] = "average"
    does: ClassVar[str] = "averages the weights with those of other models (merging, collusion)"
    source: ClassVar[str] = "Wortsman et al. 2022 (model soups); Boneh & Shaw 1998 (collusion)"

    others: Annotated[tuple[str, ...], Field(min_length=1)]
    share: Annotated[float, Field(ge=0, le=1)] = field(default=0.5, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Average all floating-point tensors, batch norm's running statistics included.

        Raises:
            ConfigError: another model lacks a tensor, or has the tensor in another shape.
            SuspectError: a file cannot be read.
        """
        states = [load_state(Path(other)) for other in self.others]
        # The other models share the remaining weight equally, so all weights sum to 1.
        rest = (1 - self.share) / len(states)
        with torch.no_grad():
            for name, tensor in stolen.state_dict().items():
                for path, state in zip(self.others, states, strict=True):
                    if name not in state or state[name].shape != tensor.shape:
                        raise ConfigError(
                            f"{self.name}: {path} has no {name} of shape {list(tensor.shape)}: "
                            "expected a model of the same architecture"
                        )
                # Integer tensors, such as batch norm's step counter, have no meaningful mean: keep
                # them.
                if tensor.is_floating_point():
                    tensor.mul_(self.share)
                    for state in states:
                        tensor.add_(state[name].to(tensor), alpha=rest)
        return ChangeResult()
