"""Pruning by use: set weights to zero that the thief's images never make use of, or use least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from countermark.attacks.base import Attack, Done, TrainingData, first_scores, row_count, scores
from countermark.attacks.prune import victims
from countermark.progress import progress


@dataclass(frozen=True)
class PruneUnused(Attack):
    """Weights that change no answer are removed: it costs nothing, and a mark may lie in them.

    A weight's use is w²·Σ(∂s/∂w)², over the batches and s the sum of all their scores, each with a
    random sign: in expectation the sum over every single score. Behind a unit that never fires,
    and before it, the use is exactly zero. Labels are not looked at.

    Attributes:
        fraction: share of each tensor that goes at least, the least used first; weights of no use
            at all go in any case.
        layers: names of the tensors; all of two dimensions or more when empty.
        rows: how many of the training images are looked at, from the first; None for all.
        batch_size: images at a time.
        seed: draws the signs.
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

    def change(self, stolen: nn.Module, data: TrainingData) -> Done:
        """Measure the use of every weight, and zero the least used.

        Raises:
            ConfigError: a layer or so many rows are not there, or the model does not take the
                images or does not answer them with scores.
        """
        there = len(data.train_images)
        rows = row_count(self.name, self.rows, there)
        weights = list(victims(dict(stolen.named_parameters()), self.layers).values())
        used = self._use(stolen, weights, data, rows)
        with torch.no_grad():
            for weight, use in zip(weights, used, strict=True):
                removed = use.flatten().argsort(stable=True)[: round(self.fraction * use.numel())]
                unused = use == 0
                unused.view(-1)[removed] = True
                weight[unused] = 0
        return Done(data_share=rows / there)

    def _use(
        self, stolen: nn.Module, weights: list[nn.Parameter], data: TrainingData, rows: int
    ) -> list[Tensor]:
        """How much the scores of the first images hang on each weight, in the weights' shapes."""
        for weight in weights:
            weight.requires_grad_()
        device = first_scores(stolen, data).device
        generator = torch.Generator().manual_seed(self.seed)
        used = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        with torch.enable_grad(), progress(f"{self.name}, images", rows) as advance:
            for first in range(0, rows, self.batch_size):
                batch = torch.arange(first, min(first + self.batch_size, rows))
                answer = scores(stolen, data.normalised(data.train_images[batch]).to(device))
                signs = torch.randint(0, 2, answer.shape, generator=generator) * 2 - 1
                found = torch.autograd.grad(answer, weights, signs.to(answer), allow_unused=True)
                for use, gradient, weight in zip(used, found, weights, strict=True):
                    if gradient is not None:
                        use.add_((weight.detach() * gradient).float().square())
                advance(len(batch))
        return used
