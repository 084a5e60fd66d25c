"""Forgery of triggers: adversarial examples, shown as if a model had been taught them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from countermark.attacks.base import Attack, Done, TrainingData, first_scores, row_count, scores

_LOOKED_AT = 16  # pixels that are tried before one is changed


@dataclass(frozen=True)
class ForgeTriggers(Attack):
    """Adversarial examples for labels of the thief's choice, shown as if they were triggers.

    Attributes:
        triggers: how many, of the first images.
        radius: how far each pixel of the model's input may move, in as many steps.
        pixels: where it is not 0, so many pixels take the lowest or highest level, and the others
            stay; radius and steps say nothing then.
        steps: of signed gradient.
        seed: draws the labels.
    """

    name: ClassVar[str] = "forge_triggers"
    does: ClassVar[str] = "makes adversarial examples that get labels of the thief's choice"
    source: ClassVar[str] = (
        "Liu et al. 2024 (false claims, USENIX Security); Madry et al. 2018; of few pixels, Su et "
        "al. 2019, by gradient in place of evolution"
    )
    needs_data: ClassVar[bool] = True

    triggers: PositiveInt = 100
    radius: PositiveFloat = field(default=1.0, kw_only=True)
    pixels: NonNegativeInt = field(default=0, kw_only=True)
    steps: PositiveInt = field(default=20, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> Done:
        """Make the examples; the model stays as it is."""
        there = len(data.train_images)
        count = row_count(self.name, self.triggers, there)
        device = first_scores(stolen, data).device
        generator = torch.Generator().manual_seed(self.seed)
        labels = torch.randint(data.classes, (count,), generator=generator).to(device)
        images = data.normalised(data.train_images[:count]).to(device)
        if self.pixels:
            ends = (
                torch.zeros_like(data.train_images[:1]),
                torch.full_like(data.train_images[:1], 255),
            )
            low, high = (data.normalised(each).to(device) for each in ends)
            made = self._few_pixels(stolen, images, labels, (low, high))
        else:
            made = self._all_pixels(stolen, images, labels)
        found = {
            "triggers": count,
            "fired": _fired(stolen, made, labels),
            "fired_before": _fired(stolen, images, labels),
        }
        return Done(data_share=count / there, found=found)

    def _all_pixels(self, stolen: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Images (n, C, H, W) that moved by projected gradient descent."""
        moved = torch.zeros_like(images)
        for _ in range(self.steps):
            gradient = _gradient(stolen, images + moved, labels)
            step = 2.5 * self.radius / self.steps * gradient.sign()
            moved = (moved - step).clamp(-self.radius, self.radius)
        return images + moved

    def _few_pixels(
        self, stolen: nn.Module, images: Tensor, labels: Tensor, ends: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Images (n, C, H, W) of which single pixels went to the ends of the scale, (1, C, H, W).

        Each time the pixels that promise most to first order are tried, and the best is kept.
        """
        at = torch.arange(len(images), device=images.device)
        for _ in range(self.pixels):
            slope = _gradient(stolen, images, labels)
            aims = torch.where(slope > 0, *ends)
            gains = ((images - aims) * slope).sum(1).flatten(1)  # (n, H·W)
            best, least = images, torch.full((len(images),), torch.inf, device=images.device)
            for tried in gains.topk(min(_LOOKED_AT, gains.shape[1])).indices.t():
                changed = images.flatten(2).clone()
                changed[at, :, tried] = aims.flatten(2)[at, :, tried]
                changed = changed.reshape(images.shape)
                with torch.no_grad():
                    loss = F.cross_entropy(scores(stolen, changed), labels, reduction="none")
                better = loss < least
                best = torch.where(better[:, None, None, None], changed, best)
                least = torch.where(better, loss, least)
            images = best
        return images


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of the summed cross-entropy by the images (n, C, H, W)."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(scores(model, images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient


def _fired(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((scores(model, images).argmax(1) == labels).float().mean())
