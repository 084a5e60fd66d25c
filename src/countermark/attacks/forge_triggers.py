"""Forgery of triggers: adversarial examples that pose as triggers of a trained-in mark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from countermark.attacks.base import (
    Attack,
    ChangeResult,
    TrainingData,
    compute_first_scores,
    compute_scores,
    resolve_row_count,
)

_LOOKED_AT = 16  # candidate pixels that are tried for each change


@dataclass(frozen=True)
class ForgeTriggers(Attack):
    """An attack that makes adversarial examples for random labels, to be shown as triggers.

    Attributes:
        triggers: number of examples, made from the first images.
        radius: the most that each pixel of the model's input may move.
        pixels: if not 0, set this many pixels to the lowest or highest level and leave the others;
            radius and steps are not used then.
        steps: number of steps of signed gradient descent.
        seed: seed of the labels.
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

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Make the examples; the model stays unchanged."""
        there = len(data.train_images)
        count = resolve_row_count(self.name, self.triggers, there)
        device = compute_first_scores(stolen, data).device
        generator = torch.Generator().manual_seed(self.seed)
        labels = torch.randint(data.classes, (count,), generator=generator).to(device)
        images = data.normalised(data.train_images[:count]).to(device)
        if self.pixels:
            # The ends of the scale are normalised like images: the model's input has its own range.
            ends = (
                torch.zeros_like(data.train_images[:1]),
                torch.full_like(data.train_images[:1], 255),
            )
            low, high = (data.normalised(each).to(device) for each in ends)
            made = self._change_few_pixels(stolen, images, labels, (low, high))
        else:
            made = self._move_all_pixels(stolen, images, labels)
        found = {
            "triggers": count,
            "fired": _measure_fired_share(stolen, made, labels),
            "fired_before": _measure_fired_share(stolen, images, labels),
        }
        return ChangeResult(data_share=count / there, found=found)

    def _move_all_pixels(self, stolen: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return images (n, C, H, W) after projected gradient descent on the labels' loss."""
        moved = torch.zeros_like(images)
        for _ in range(self.steps):
            gradient = _compute_gradient(stolen, images + moved, labels)
            # Steps of 2.5·radius/steps reach the border of the box and leave room to move along it.
            step = 2.5 * self.radius / self.steps * gradient.sign()
            moved = (moved - step).clamp(-self.radius, self.radius)
        return images + moved

    def _change_few_pixels(
        self, stolen: nn.Module, images: Tensor, labels: Tensor, ends: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return images (n, C, H, W) of which single pixels moved to an end of the scale.

        Each round tries the pixels with the largest first-order gain, and keeps the best of them.

        Args:
            stolen: the model.
            images: (n, C, H, W).
            labels: (n,) the wanted classes.
            ends: the lowest and the highest level, (1, C, H, W) each.
        """
        at = torch.arange(len(images), device=images.device)
        for _ in range(self.pixels):
            slope = _compute_gradient(stolen, images, labels)
            # The loss must fall: a pixel with a positive slope goes to the lowest level.
            aims = torch.where(slope > 0, *ends)
            gains = ((images - aims) * slope).sum(1).flatten(1)  # (n, H·W)
            # All images of the batch advance together, each with a best pixel of its own.
            best, least = images, torch.full((len(images),), torch.inf, device=images.device)
            for tried in gains.topk(min(_LOOKED_AT, gains.shape[1])).indices.t():
                changed = images.flatten(2).clone()
                changed[at, :, tried] = aims.flatten(2)[at, :, tried]
                changed = changed.reshape(images.shape)
                with torch.no_grad():
                    loss = F.cross_entropy(
                        compute_scores(stolen, changed), labels, reduction="none"
                    )
                better = loss < least
                best = torch.where(better[:, None, None, None], changed, best)
                least = torch.where(better, loss, least)
            images = best
        return images


def _compute_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the summed cross-entropy with respect to the images (n, C, H, W)."""
    with torch.enable_grad():
        # Detach first: otherwise the graph of every earlier step would stay in memory.
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(compute_scores(model, images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient


def _measure_fired_share(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model puts into the given classes."""
    with torch.no_grad():
        return float((compute_scores(model, images).argmax(1) == labels).float().mean())
