"""Averaging: the stolen weights are merged with those of other models of the same form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from countermark.attacks.base import Attack, Done
from countermark.errors import ConfigError
from countermark.weights import load_state


@dataclass(frozen=True)
class Average(Attack):
    """A weighted mean of the stolen model and others: copies for other buyers, a base, fine-tunes.

    Models that share no start have no common coordinates; merged, they answer nothing.

    Attributes:
        others: weight files with the same names and shapes, equally weighted.
        share: the weight of the stolen one.
    """

    name: ClassVar[str] = "average"
    does: ClassVar[str] = "averages the weights with those of other models (merging, collusion)"
    source: ClassVar[str] = "Wortsman et al. 2022 (model soups); Boneh & Shaw 1998 (collusion)"

    others: Annotated[tuple[str, ...], Field(min_length=1)]
    share: Annotated[float, Field(ge=0, le=1)] = field(default=0.5, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Average all floating-point tensors, running statistics included.

        Raises:
            ConfigError: another model lacks a tensor, or has it in another shape.
            SuspectError: a file cannot be read.
        """
        states = [load_state(Path(other)) for other in self.others]
        rest = (1 - self.share) / len(states)
        with torch.no_grad():
            for name, tensor in stolen.state_dict().items():
                for path, state in zip(self.others, states, strict=True):
                    if name not in state or state[name].shape != tensor.shape:
                        raise ConfigError(
                            f"{self.name}: {path} has no {name} of shape {list(tensor.shape)}: "
                            "expected a model of the same architecture"
                        )
                if tensor.is_floating_point():
                    tensor.mul_(self.share)
                    for state in states:
                        tensor.add_(state[name].to(tensor), alpha=rest)
        return Done()
