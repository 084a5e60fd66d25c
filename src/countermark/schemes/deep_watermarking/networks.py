"""The networks of Zhang et al. 2020/2021: H hides an image, R reveals it, D tells marked images.

All take images of any size. H is a U-Net over the cover and the hidden image. R is a chain of
dilated residual blocks that paints the hidden image. D, a PatchGAN, tells marked images from
unmarked ones patch by patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AMPLITUDE = 0.2
"""The most that the residual form of H adds to an image with levels 0 to 1."""

# Dilation widens what a cell of R sees without further halvings.
_DILATIONS = 2, 2, 2, 2, 4, 4, 4, 4, 1


@dataclass(frozen=True)
class HidingSizes:
    """The widths and depths of H and R.

    Attributes:
        hider: filters of the first level of H; they double downwards, up to eightfold.
        downs: levels of H below the first.
        revealer: filters of R.
        blocks: residual blocks of R, the first of nine dilations 2, 2, 2, 2, 4, 4, 4, 4, 1.
        residual: true if H adds a bounded residual, with group norm; false if H paints the image,
            with batch norm and a sigmoid, and R ends in a ReLU, as published.
    """

    hider: int
    downs: int
    revealer: int
    blocks: int
    residual: bool


SIZES = {
    "tiny": HidingSizes(8, 3, 16, 2, residual=True),
    "cpu": HidingSizes(16, 5, 32, 4, residual=True),
    "published": HidingSizes(64, 7, 128, 9, residual=False),
}
"""The published one is that of the authors' public code, the next is for a CPU; tiny ones are for
tests and demonstrations."""


class Hider(nn.Module):
    """H: a network from covers and hidden images (N, C, H, W) to marked images, levels 0 to 1.

    Args:
        channels: C of the covers; the hidden image has as many.
        sizes: widths and depths of the network.
    """

    def __init__(self, channels: int, sizes: HidingSizes) -> None:
        super().__init__()
        self.sizes = sizes
        widths = [sizes.hider * min(8, 2**level) for level in range(sizes.downs + 1)]
        self.enter = nn.Conv2d(2 * channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            [_make_down_block(one, other, sizes.residual) for one, other in pairwise(widths)]
        )
        above = [*widths[:-1]]
        self.up = nn.ModuleList(
            [
                _make_up_block(below, beside, sizes.residual)
                for below, beside in zip(widths[:0:-1], above[::-1], strict=True)
            ]
        )
        self.leave = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, images: Tensor, pictures: Tensor) -> Tensor:
        """Return marked images (N, C, H, W)."""
        painted = self.paint_image(images, pictures)
        if not self.sizes.residual:
            return torch.sigmoid(painted)
        return images + AMPLITUDE * torch.tanh(painted)

    def paint_image(self, images: Tensor, pictures: Tensor) -> Tensor:
        """Return the last layer's output (N, C, H, W), before it becomes an image."""
        height, width = images.shape[2:]
        step = 2**self.sizes.downs
        # H halves the size `downs` times, so the image is padded to a multiple and cropped again.
        more = (0, -width % step, 0, -height % step)
        x = F.pad(torch.cat([images, pictures], 1), more, mode="replicate")
        x = F.leaky_relu(self.enter(x), 0.2)
        beside = []
        for layer in self.down:
            beside.append(x)
            x = layer(x)
        # Without skip connections the last layer would not see the fine detail of the cover.
        for layer, skip in zip(self.up, reversed(beside), strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return cast(Tensor, self.leave(x))[..., :height, :width]


class Revealer(nn.Module):
    """R: a network from images (N, C, H, W), marked or not, to hidden images, levels 0 to 1."""

    def __init__(self, channels: int, sizes: HidingSizes) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.revealer
        self.enter = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), _make_instance_norm(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), _make_instance_norm(width), nn.ReLU(),
            # R works at half the size; images with an odd side are padded by one pixel first.
            nn.Conv2d(width, width, 3, stride=2, padding=1), _make_instance_norm(width), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            [_make_dilated_block(width, each) for each in _DILATIONS[: sizes.blocks]]
        )
        self.leave = nn.Sequential(
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), _make_instance_norm(width), nn.ReLU(),
            nn.Conv2d(width, channels, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return hidden images (N, C, H, W)."""
        found = self.paint_image(images)
        # Differs from the paper: without the last ReLU, whose gradient dies on a dark image.
        return found if self.sizes.residual else F.relu(found)

    def paint_image(self, images: Tensor) -> Tensor:
        """Return the last layer's output (N, C, H, W), without a final ReLU."""
        height, width = images.shape[2:]
        x = self.enter(F.pad(images, (0, width % 2, 0, height % 2), mode="replicate"))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return cast(Tensor, self.leave(x))[..., :height, :width]


class Critic(nn.Module):
    """D: a network from images (N, C, H, W) to a score (N, 1, h, w) a patch, 1 for "not marked"."""

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
        """Return scores (N, 1, h, w)."""
        return cast(Tensor, self.layers(images))


def _make_down_block(inside: int, outside: int, residual: bool) -> nn.Sequential:
    """Make a level of the hiding network H that halves height and width."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 4, stride=2, padding=1), _make_norm(outside, residual),
        nn.LeakyReLU(0.2),
    )  # fmt: skip


def _make_up_block(below: int, beside: int, residual: bool) -> nn.Sequential:
    """Make a level of H that joins the upsampled level below with the skip connection."""
    return nn.Sequential(
        nn.Conv2d(below + beside, beside, 3, padding=1), _make_norm(beside, residual), nn.ReLU()
    )


def _make_norm(width: int, residual: bool) -> nn.Module:
    """Make the normalisation of H: group norm for a residual H, else batch norm."""
    # Group norm does not depend on the batch, neither in training nor after it.
    return nn.GroupNorm(4, width) if residual else nn.BatchNorm2d(width)


def _make_instance_norm(width: int) -> nn.Module:
    """Make an instance norm with learnt scale and shift."""
    return nn.InstanceNorm2d(width, affine=True)


def _make_dilated_block(width: int, dilation: int) -> nn.Sequential:
    """Make a residual block of R with two dilated convolutions."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), _make_instance_norm(width),
        nn.ReLU(), nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
        _make_instance_norm(width),
    )  # fmt: skip
