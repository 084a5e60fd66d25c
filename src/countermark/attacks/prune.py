"""Magnitude pruning: set the smallest, random, or largest weights of each layer to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from countermark.attacks.base import Attack, ChangeResult, TrainingData
from countermark.errors import ConfigError, suggest_nearest


@dataclass(frozen=True)
class Prune(Attack):
    """An attack that zeroes single weights of each tensor; biases and norms stay unchanged.

    Attributes:
        fraction: share of each tensor's weights that is set to zero, rounded to the nearest count.
        order: "ascending" removes the smallest magnitudes first, "descending" the largest, "random"
            any.
        layers: names of the tensors; all tensors of two dimensions or more when empty.
        seed: seed of the random order.
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
    ) -> ChangeResult:
        """Set the weights to zero; data and training are not needed."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in select_tensors(dict(stolen.named_parameters()), self.layers).values():
                ranks = self._rank_weights(weight, generator)
                # Compare ranks and not magnitudes: exactly `fraction` of the weights go, ties
                # included.
                weight[ranks < round(self.fraction * weight.numel())] = 0
        return ChangeResult()

    def _rank_weights(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Return each weight's rank in the order of removal, from 0, in the weight's shape."""
        if self.order == "random":
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        else:
            magnitudes = weight.abs().flatten()  # (n,)
            # A stable sort gives equal magnitudes, such as zeros, the same order on every device.
            order = magnitudes.argsort(stable=True, descending=self.order == "descending")
        ranks = torch.empty_like(order)
        # Invert the permutation: from the weight at each rank to the rank of each weight.
        ranks[order] = torch.arange(len(order), device=weight.device)
        return ranks.reshape(weight.shape)  # the weight's own shape


def select_tensors(
    parameters: Mapping[str, nn.Parameter], layers: Sequence[str]
) -> dict[str, nn.Parameter]:
    """Return the named tensors, or all tensors of two dimensions or more if no name is given.

    Raises:
        ConfigError: the model lacks a named tensor; the message names the nearest.
    """
    matrices = {name: p for name, p in parameters.items() if p.dim() > 1}
    for name in layers:
        if name not in parameters:
            raise ConfigError(
                f"the model has no tensor {name!r}: {suggest_nearest(name, matrices)}"
            )
    return {name: parameters[name] for name in layers} or matrices
