"""Quantising: weights are rounded to a few bits, one scale for each tensor or channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from countermark.attacks.base import Attack, Done
from countermark.attacks.prune import victims


@dataclass(frozen=True)
class Quantise(Attack):
    """Symmetric rounding to 2^(bits−1) − 1 levels on each side of zero, kept as floats.

    Attributes:
        bits: 8 to 2; with 2 there are three levels.
        per: one scale for each "tensor", or for each output "channel" (axis 0).
        layers: names of the tensors; all of two dimensions or more when empty.
    """

    name: ClassVar[str] = "quantise"
    does: ClassVar[str] = "rounds weights to 8 to 2 bits, per tensor or channel"
    source: ClassVar[str] = "Lukas et al. 2022 (SoK), Weight Quantization"

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    per: Literal["tensor", "channel"] = "tensor"
    layers: tuple[str, ...] = field(default=(), kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Round the weights; no data and no training are needed."""
        with torch.no_grad():
            for weight in victims(dict(stolen.named_parameters()), self.layers).values():
                weight.copy_(self._rounded(weight))
        return Done()

    def _rounded(self, weight: Tensor) -> Tensor:
        axes = tuple(range(1 if self.per == "channel" else 0, weight.dim()))
        most = weight.abs().amax(axes, keepdim=True)
        step = (most / (2 ** (self.bits - 1) - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
        rounded: Tensor = (weight / step).round() * step
        return rounded
