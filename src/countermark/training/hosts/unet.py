"""A small U-Net from images to images: a host for marks in networks that do not classify."""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark.errors import ConfigError
from countermark.training.hosts.parts import make_conv, require_whole


class UNetStage(nn.Module):
    """Two 3x3 convolutions, each with group norm and ReLU."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        # At most 8 groups; their number has to divide the number of channels.
        groups = gcd(8, outside)
        self.conv1 = make_conv(inside, outside, 3)
        self.norm1 = nn.GroupNorm(groups, outside)
        self.conv2 = make_conv(outside, outside, 3)
        self.norm2 = nn.GroupNorm(groups, outside)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (N, outside, H, W) of features (N, inside, H, W)."""
        features = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(features)))


class UNet(nn.Module):
    """Three stages down, one in the middle, three up beside shortcuts; adds to its input."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        one, two, four, eight = (width * factor for factor in (1, 2, 4, 8))
        self.down = nn.ModuleList(
            [UNetStage(channels, one), UNetStage(one, two), UNetStage(two, four)]
        )
        self.middle = UNetStage(four, eight)
        self.up = nn.ModuleList(
            [UNetStage(eight + four, four), UNetStage(four + two, two), UNetStage(two + one, one)]
        )
        self.out = nn.Conv2d(one, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute images (N, C, H, W) of images (N, C, H, W), H and W multiples of 8.

        Raises:
            ConfigError: a side of the images is no multiple of 8.
        """
        # Three poolings halve the sides; odd sides would not fit their shortcuts on the way up.
        if images.shape[-2] % 8 or images.shape[-1] % 8:
            sides = f"{images.shape[-2]}x{images.shape[-1]}"
            raise ConfigError(f"unet takes images whose sides are multiples of 8, got {sides}")
        features = images
        skips: list[Tensor] = []
        for stage in self.down:
            skips.append(stage(features))
            features = F.max_pool2d(skips[-1], 2)
        features = self.middle(features)
        for stage, skip in zip(self.up, reversed(skips), strict=True):
            larger = F.interpolate(features, scale_factor=2.0)  # each pixel becomes 2x2
            features = stage(torch.cat((larger, skip), 1))
        change: Tensor = self.out(features)
        return images + change


def unet(width: int = 16, channels: int = 3) -> nn.Module:
    """Build a U-Net with as many channels out as in; `middle.conv2.weight` is (128, 128, 3, 3).

    A U-Net is no classifier, so there is no recipe for it: users train it in their own loop.

    Args:
        width: filters of the first stage, doubled at each of three halvings of the image.
        channels: 3 for colour images, 1 for grey ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1.
    """
    require_whole(width=width, channels=channels)
    return UNet(channels, width)
