"""Quantising: round weights to a few bits, with one scale for each tensor or channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from countermark.attacks.base import Attack, ChangeResult
from countermark.attacks.prune import select_tensors


@dataclass(frozen=True)
class Quantise(Attack):
    """An attack that rounds to 2^(bits−1) − 1 levels on each side of zero and stores floats.

    Attributes:
        bits: 2 to 8; 2 bits give three levels.
        per: one scale for each "tensor", or for each output "channel" (axis 0).
        layers: names of the tensors; all tensors of two dimensions or more when empty.
    """

    name: ClassVar[str] = "quantise"
    does: ClassVar[str] = "rounds weights to 8 to 2 bits, per tensor or channel"
    source: ClassVar[str] = "Lukas et al. 2022 (SoK), Weight Quantization"

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    per: Literal["tensor", "channel"] = "tensor"
    layers: tuple[str, ...] = field(default=(), kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Round the weights; data and training are not needed."""
        with torch.no_grad():
            for weight in select_tensors(dict(stolen.named_parameters()), self.layers).values():
                weight.copy_(self._round_weight(weight))
        return ChangeResult()

    def _round_weight(self, weight: Tensor) -> Tensor:
        """Return the weight rounded to multiples of its step."""
        # Axis 0 is left out per channel, so `most` keeps one value for each output channel.
        axes = tuple(range(1 if self.per == "channel" else 0, weight.dim()))
        most = weight.abs().amax(axes, keepdim=True)
        # The smallest normal number keeps a tensor of zeros from a division by zero.
        step = (most / (2 ** (self.bits - 1) - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
        rounded: Tensor = (weight / step).round() * step
        return rounded
