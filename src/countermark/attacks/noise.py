"""Small changes of all weights: Gaussian noise, and shifts of whole filters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import nn

from countermark.attacks.base import Attack, Done
from countermark.attacks.prune import victims


@dataclass(frozen=True)
class Noise(Attack):
    """Gaussian noise on every weight.

    Attributes:
        std: of the noise, in standard deviations of each tensor's weights.
        layers: names of the tensors; all of two dimensions or more when empty.
        seed: draws the noise.
    """

    name: ClassVar[str] = "noise"
    does: ClassVar[str] = "adds Gaussian noise to the weights"
    source: ClassVar[str] = "Wang & Kerschbaum 2021 (RIGA), Lukas et al. 2022 (SoK)"

    std: NonNegativeFloat = 0.1
    layers: tuple[str, ...] = field(default=(), kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Add the noise; no data and no training are needed."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in victims(dict(stolen.named_parameters()), self.layers).values():
                drawn = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(drawn, alpha=self.std * float(weight.std(correction=0)))
        return Done()


@dataclass(frozen=True)
class Shift(Attack):
    """Every filter is moved by the same amount: away from the mean filter, which carries marks.

    The mean over filters is what Uchida 2017 reads as published; with strength 1 it is zero
    afterwards. Fine-tuning is run behind it to win back accuracy.

    Attributes:
        strength: how many times the mean filter is taken off each filter.
        layers: names of the tensors; all of two dimensions or more when empty.
    """

    name: ClassVar[str] = "shift"
    does: ClassVar[str] = "takes the mean filter off every filter of a layer"
    source: ClassVar[str] = "Lukas et al. 2022 (SoK), Weight Shifting, in a form of its own"

    strength: NonNegativeFloat = 1.0
    layers: tuple[str, ...] = field(default=(), kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Shift the filters; no data and no training are needed."""
        with torch.no_grad():
            for weight in victims(dict(stolen.named_parameters()), self.layers).values():
                weight.sub_(weight.mean(0, keepdim=True), alpha=self.strength)
        return Done()
