"""Pruning by use: zero the weights that the thief's images never use, or use least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from countermark._internal.progress import show_progress
from countermark.attacks.base import (
    Attack,
    ChangeResult,
    TrainingData,
    compute_first_scores,
    compute_scores,
    resolve_row_count,
)
from countermark.attacks.prune import select_tensors


@dataclass(frozen=True)
class PruneUnused(Attack):
    """An attack that removes weights without influence on any answer, where a mark may lie.

    It costs no accuracy on the thief's images. The use of a weight is w²·Σ(∂s/∂w)², summed over the
    batches, where s is the sum of all scores of a batch, each with a random sign: in expectation
    the sum over every single score. Before and behind a unit that never fires, the use is exactly
    zero. Labels are not used.

    Attributes:
        fraction: share of each tensor that is removed at least, the least used first; weights
            without any use are always removed.
        layers: names of the tensors; all tensors of two dimensions or more when empty.
        rows: number of training images used, from the first; None for all.
        batch_size: images at a time.
        seed: seed of the signs.
    """

    name: ClassVar[str] = "prune_unused"
    does: ClassVar[str] = "sets weights to zero that the thief's images never make use of"
    source: ClassVar[str] = (
        "Molchanov et al. 2019 (importance of a weight), Theis et al. 2018 (Fisher pruning)"
    )
    needs_data: ClassVar[bool] = True

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    layers: tuple[str, ...] = field(default=(), kw_only=True)
    rows: PositiveInt | None = field(default=None, kw_only=True)
    batch_size: PositiveInt = field(default=64, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Measure the use of every weight, and zero the least used.

        Raises:
            ConfigError: the model lacks a layer, more rows are wanted than available, or the model
                does not answer the images with scores.
        """
        there = len(data.train_images)
        rows = resolve_row_count(self.name, self.rows, there)
        weights = list(select_tensors(dict(stolen.named_parameters()), self.layers).values())
        used = self._measure_use(stolen, weights, data, rows)
        with torch.no_grad():
            for weight, use in zip(weights, used, strict=True):
                removed = use.flatten().argsort(stable=True)[: round(self.fraction * use.numel())]
                unused = use == 0
                unused.view(-1)[removed] = True
                weight[unused] = 0
        return ChangeResult(data_share=rows / there)

    def _measure_use(
        self, stolen: nn.Module, weights: list[nn.Parameter], data: TrainingData, rows: int
    ) -> list[Tensor]:
        """Return the use of each weight on the first images, float32 in the weights' shapes."""
        for weight in weights:
            weight.requires_grad_()
        device = compute_first_scores(stolen, data).device
        generator = torch.Generator().manual_seed(self.seed)
        used = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        with torch.enable_grad(), show_progress(f"{self.name}, images", rows) as advance:
            for first in range(0, rows, self.batch_size):
                batch = torch.arange(first, min(first + self.batch_size, rows))
                answer = compute_scores(
                    stolen, data.normalised(data.train_images[batch]).to(device)
                )
                # Random signs make cross terms between scores vanish in expectation, so a single
                # backward pass per batch is enough.
                signs = torch.randint(0, 2, answer.shape, generator=generator) * 2 - 1
                found = torch.autograd.grad(answer, weights, signs.to(answer), allow_unused=True)
                for use, gradient, weight in zip(used, found, weights, strict=True):
                    # None means that the weight has no part in the answer: its use stays zero.
                    if gradient is not None:
                        use.add_((weight.detach() * gradient).float().square())
                advance(len(batch))
        return used
