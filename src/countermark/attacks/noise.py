"""Small changes of all weights: Gaussian noise, and shifts of whole filters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import nn

from countermark.attacks.base import Attack, ChangeResult
from countermark.attacks.prune import select_tensors


@dataclass(frozen=True)
class Noise(Attack):
    """An attack that adds Gaussian noise to every weight.

    Attributes:
        std: standard deviation of the noise, in standard deviations of each tensor's weights.
        layers: names of the tensors; all tensors of two dimensions or more when empty.
        seed: seed of the noise.
    """

    name: ClassVar[str] = "noise"
    does: ClassVar[str] = "adds Gaussian noise to the weights"
    source: ClassVar[str] = "Wang & Kerschbaum 2021 (RIGA), Lukas et al. 2022 (SoK)"

    std: NonNegativeFloat = 0.1
    layers: tuple[str, ...] = field(default=(), kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Add the noise; data and training are not needed."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in select_tensors(dict(stolen.named_parameters()), self.layers).values():
                # Drawn on the CPU, so that a seed means the same noise on every device.
                drawn = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(drawn, alpha=self.std * float(weight.std(correction=0)))
        return ChangeResult()


@dataclass(frozen=True)
class Shift(Attack):
    """An attack that subtracts the mean filter, which carries marks, from every filter.

    Uchida 2017 as published reads the mean over filters; with strength 1 this mean becomes zero.
    Fine-tuning afterwards recovers the accuracy.

    Attributes:
        strength: how many times the mean filter is subtracted from each filter.
        layers: names of the tensors; all tensors of two dimensions or more when empty.
    """

    name: ClassVar[str] = "shift"
    does: ClassVar[str] = "takes the mean filter off every filter of a layer"
    source: ClassVar[str] = "Lukas et al. 2022 (SoK), Weight Shifting, in a form of its own"

    strength: NonNegativeFloat = 1.0
    layers: tuple[str, ...] = field(default=(), kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Shift the filters; data and training are not needed."""
        with torch.no_grad():
            for weight in select_tensors(dict(stolen.named_parameters()), self.layers).values():
                # Axis 0 counts the filters of linear and convolutional layers.
                weight.sub_(weight.mean(0, keepdim=True), alpha=self.strength)
        return ChangeResult()
