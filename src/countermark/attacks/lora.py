"""Low-rank fine-tuning: train small factors beside frozen weights, then merge them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from countermark.attacks.base import ChangeResult, TrainingData
from countermark.attacks.fine_tune import FineTune
from countermark.errors import ConfigError


@dataclass(frozen=True)
class LoRA(FineTune):
    """An attack that trains low-rank factors: a matrix W becomes W + (alpha / rank)·B·A.

    W is frozen, and the product is merged at the end. Convolutions count as matrices (out,
    in·kh·kw). Biases and norms stay unchanged; running statistics move.

    Attributes:
        lr: learning rate of the factors.
        rank: columns of B and rows of A.
        alpha: scale of the product.
    """

    name: ClassVar[str] = "lora"
    does: ClassVar[str] = "fine-tunes low-rank factors beside the weights and merges them"
    source: ClassVar[str] = "Hu et al. 2022 (LoRA)"

    lr: PositiveFloat = 0.001
    rank: PositiveInt = field(default=4, kw_only=True)
    alpha: PositiveFloat = field(default=4.0, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Train the factors and merge them.

        Raises:
            ConfigError: as for fine-tuning; or `layers` or `new_classes` are set.
        """
        if self.layers != "all" or self.new_classes is not None:
            raise ConfigError(f"{self.name} adapts every matrix: leave layers and new_classes out")
        with add_low_rank_terms(stolen, self.rank, scale=self.alpha / self.rank, seed=self.seed):
            share = self.tune(stolen, data)
        return ChangeResult(float(self.epochs), share)

    def select_parameters(self, stolen: nn.Module) -> list[nn.Parameter]:
        """Return the low-rank factors, the only parameters that are trained."""
        return _list_factors(stolen)


@contextmanager
def add_low_rank_terms(
    model: nn.Module, rank: int, *, scale: float = 1.0, seed: int = 0
) -> Iterator[list[nn.Parameter]]:
    """Put a low-rank term beside every linear and convolutional weight, in any training loop.

    Args:
        model: changed in place. When the block ends, the terms are merged into the weights and the
            model has its original structure.
        rank: rank of the terms.
        scale: scale of the product of the two factors.
        seed: seed of the first factors; the second factors start at zero.

    Yields: the factors, which are the parameters to train.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[Any] = [
        module for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        or type(module).__name__ == "Conv1D"  # GPT-2's linear layers
    ]  # fmt: skip
    for module in layers:
        # A parametrization computes the weight on every access, so any forward method uses the
        # term.
        product = _LowRankTerm(module.weight, rank, scale, generator)
        parametrize.register_parametrization(module, "weight", product)
    try:
        yield _list_factors(model)
    # Merge after an error too: the caller's model must not keep parametrizations.
    finally:
        for module in layers:
            parametrize.remove_parametrizations(module, "weight")


def _list_factors(model: nn.Module) -> list[nn.Parameter]:
    """Return the factors of all low-rank terms in a model."""
    return [
        factor for module in model.modules() if isinstance(module, _LowRankTerm)
        for factor in module.parameters()
    ]  # fmt: skip


class _LowRankTerm(nn.Module):
    """A low-rank term that is added to a frozen weight."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        out, inside = weight.shape[0], weight[0].numel()
        drawn = torch.randn(rank, inside, generator=generator) / inside**0.5
        self.a = nn.Parameter(drawn.to(weight))
        # B starts at zero, so training starts from the stolen weights exactly (Hu et al. 2022).
        self.b = nn.Parameter(weight.new_zeros(out, rank))
        self._scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight plus the term, in the shape of the weight."""
        return weight.detach() + self._scale * (self.b @ self.a).view_as(weight)
