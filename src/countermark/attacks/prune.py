"""Magnitude pruning: set the smallest, random, or largest weights of each layer to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from countermark.attacks.base import Attack, Done, TrainingData
from countermark.errors import ConfigError, nearest


@dataclass(frozen=True)
class Prune(Attack):
    """Unstructured pruning, each weight tensor by itself; biases and norms are left alone.

    Attributes:
        fraction: share of each tensor's weights that is set to zero, rounded to the nearest count.
        order: "ascending" removes the smallest magnitudes, "descending" the largest.
        layers: names of the tensors; all of two dimensions or more when empty.
        seed: draws the random order.
    """

    name: ClassVar[str] = "prune"
    does: ClassVar[str] = "sets a share of each layer's weights to zero"
    source: ClassVar[str] = "Wang et al. 2020, Model Compression; Uchida et al. 2017"

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    order: Literal["ascending", "random", "descending"] = "ascending"
    layers: tuple[str, ...] = field(default=(), kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(
        self,
        stolen: nn.Module,
        data: TrainingData | None = None,  # noqa: ARG002 - another attack trains
    ) -> Done:
        """Zero the weights; no data and no training are needed."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in victims(dict(stolen.named_parameters()), self.layers).values():
                ranks = self._ranks(weight, generator)
                weight[ranks < round(self.fraction * weight.numel())] = 0
        return Done()

    def _ranks(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Each weight's place (same shape) in the order of removal, 0 first."""
        if self.order == "random":
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        else:
            magnitudes = weight.abs().flatten()  # (n,)
            order = magnitudes.argsort(stable=True, descending=self.order == "descending")
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order), device=weight.device)
        return ranks.reshape(weight.shape)  # the weight's own shape


def victims(
    parameters: Mapping[str, nn.Parameter], layers: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The tensors that are pruned: the named ones, or all of two dimensions or more.

    Raises:
        ConfigError: one is not there; names the nearest.
    """
    matrices = {name: p for name, p in parameters.items() if p.dim() > 1}
    for name in layers:
        if name not in parameters:
            raise ConfigError(f"the model has no tensor {name!r}: {nearest(name, matrices)}")
    return {name: parameters[name] for name in layers} or matrices
