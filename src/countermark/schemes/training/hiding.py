"""The networks of Zhang et al. 2020/2021: H hides a picture in an image, R reveals it, D tells.

All take images of any size. H is a U-Net over image and picture; R is a chain of dilated residual
blocks that paints the picture; D, a PatchGAN, tells marked images from others patch by patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AMPLITUDE = 0.2
"""Of what the residual form of H adds to an image with levels 0 to 1, at the most."""

_DILATIONS = 2, 2, 2, 2, 4, 4, 4, 4, 1


@dataclass(frozen=True)
class Sizes:
    """How large the networks are.

    Attributes:
        hider: filters of the first level of H; they double downwards, up to eightfold.
        downs: levels of H below the first.
        revealer: filters of R.
        blocks: residual blocks of R, the first of nine dilations 2, 2, 2, 2, 4, 4, 4, 4, 1.
        residual: H adds a bounded residual, with group norm; else it paints the image, with batch
            norm and a sigmoid, and R ends in a ReLU, as published.
    """

    hider: int
    downs: int
    revealer: int
    blocks: int
    residual: bool


SIZES = {
    "tiny": Sizes(8, 3, 16, 2, residual=True),
    "cpu": Sizes(16, 5, 32, 4, residual=True),
    "published": Sizes(64, 7, 128, 9, residual=False),
}
"""The published one is that of the authors' public code, the next is for a CPU; tiny ones are for
tests and demonstrations."""


class Hider(nn.Module):
    """H: marked images (N, C, H, W) of images and pictures (N, C, H, W), levels 0 to 1.

    Args:
        channels: C of the images; the picture has as many.
        sizes: of the network.
    """

    def __init__(self, channels: int, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        widths = [sizes.hider * min(8, 2**level) for level in range(sizes.downs + 1)]
        self.enter = nn.Conv2d(2 * channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            [_down(one, other, sizes.residual) for one, other in pairwise(widths)]
        )
        above = [*widths[:-1]]
        self.up = nn.ModuleList(
            [
                _up(below, beside, sizes.residual)
                for below, beside in zip(widths[:0:-1], above[::-1], strict=True)
            ]
        )
        self.leave = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, images: Tensor, pictures: Tensor) -> Tensor:
        """Marked images (N, C, H, W)."""
        painted = self.painted(images, pictures)
        if not self.sizes.residual:
            return torch.sigmoid(painted)
        return images + AMPLITUDE * torch.tanh(painted)

    def painted(self, images: Tensor, pictures: Tensor) -> Tensor:
        """What the last layer says (N, C, H, W), before it becomes an image."""
        height, width = images.shape[2:]
        step = 2**self.sizes.downs
        more = (0, -width % step, 0, -height % step)
        x = F.pad(torch.cat([images, pictures], 1), more, mode="replicate")
        x = F.leaky_relu(self.enter(x), 0.2)
        beside = []
        for layer in self.down:
            beside.append(x)
            x = layer(x)
        for layer, skip in zip(self.up, reversed(beside), strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return cast(Tensor, self.leave(x))[..., :height, :width]


class Revealer(nn.Module):
    """R: a picture (N, C, H, W) in every image (N, C, H, W), marked or not, levels 0 to 1."""

    def __init__(self, channels: int, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.revealer
        self.enter = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), _instance(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), _instance(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1), _instance(width), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList([_dilated(width, each) for each in _DILATIONS[: sizes.blocks]])
        self.leave = nn.Sequential(
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), _instance(width), nn.ReLU(),
            nn.Conv2d(width, channels, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, C, H, W)."""
        found = self.painted(images)
        # Differs from the paper: without the last ReLU, whose gradient dies on a dark picture.
        return found if self.sizes.residual else F.relu(found)

    def painted(self, images: Tensor) -> Tensor:
        """The same before any last ReLU."""
        height, width = images.shape[2:]
        x = self.enter(F.pad(images, (0, width % 2, 0, height % 2), mode="replicate"))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return cast(Tensor, self.leave(x))[..., :height, :width]


class Critic(nn.Module):
    """D: a score (N, 1, h, w) for each patch of images (N, C, H, W): 1 for "not marked"."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for one, other in pairwise(widths):
            layers += [nn.Conv2d(one, other, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(4 * width, 8 * width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(8 * width, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, 1, h, w)."""
        return cast(Tensor, self.layers(images))


def _down(inside: int, outside: int, residual: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 4, stride=2, padding=1), _norm(outside, residual),
        nn.LeakyReLU(0.2),
    )  # fmt: skip


def _up(below: int, beside: int, residual: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(below + beside, beside, 3, padding=1), _norm(beside, residual), nn.ReLU()
    )


def _norm(width: int, residual: bool) -> nn.Module:
    return nn.GroupNorm(4, width) if residual else nn.BatchNorm2d(width)


def _instance(width: int) -> nn.Module:
    return nn.InstanceNorm2d(width, affine=True)


def _dilated(width: int, dilation: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), _instance(width),
        nn.ReLU(), nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
        _instance(width),
    )  # fmt: skip
