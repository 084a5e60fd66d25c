"""The small hosts for grey images: the multilayer perceptron of Wang 2020 and LeNet-5."""

from __future__ import annotations

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from countermark.errors import ConfigError
from countermark.training.hosts.parts import require_positive, require_whole, scale_widths


class FlatSequential(nn.Sequential):
    """A Sequential that takes images as (N, C, H, W) or as rows (N, C*H*W).

    A Flatten layer would shift the indices of the layers: the papers' tensor is called `2.weight`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        """Compute class scores (N, classes) of images (N, C, H, W) or rows (N, C*H*W)."""
        rows = input.flatten(1)  # (N, C*H*W)
        scores: Tensor = super().forward(rows)  # type: ignore[no-untyped-call]
        return scores


class LeNet5(nn.Module):
    """LeNet-5 (LeCun 1998) with ReLU and max pooling: two convolutions, three linear layers."""

    def __init__(self, channels: int, sizes: list[int], classes: int) -> None:
        super().__init__()
        first, second, third, fourth = sizes
        self.conv1 = nn.Conv2d(channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        # 32 - 4 = 28, pooled to 14; 14 - 4 = 10, pooled to 5: maps of 5x5 remain.
        self.fc1 = nn.Linear(second * 5 * 5, third)
        self.fc2 = nn.Linear(third, fourth)
        self.fc3 = nn.Linear(fourth, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute class scores (N, classes) of images (N, C, 28, 28) or (N, C, 32, 32).

        Raises:
            ConfigError: the images have another size.
        """
        features = F.max_pool2d(F.relu(self.conv1(_framed(images))), 2)  # (N, first, 14, 14)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)  # (N, second, 5, 5)
        hidden = F.relu(self.fc2(F.relu(self.fc1(features.flatten(1)))))  # (N, fourth)
        scores: Tensor = self.fc3(hidden)
        return scores


def mlp(in_features: int = 784, hidden: int = 64, classes: int = 10) -> nn.Module:
    """Build the multilayer perceptron of Wang 2020, marked in `2.weight` (classes, hidden).

    Raises:
        ConfigError: a size is not a whole number of at least 1.
    """
    require_whole(in_features=in_features, hidden=hidden, classes=classes)
    return FlatSequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def lenet(classes: int = 10, width: float = 1.0, channels: int = 1) -> nn.Module:
    """Build a LeNet-5; `conv2.weight` is (16, 6, 5, 5) and `fc1.weight` (120, 400).

    Args:
        classes: classes of the data set.
        width: scales the sizes 6, 16, 120, 84 of all layers but the last, to at least 4.
        channels: 1 for grey images, 3 for colour ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1, or the width not above 0.
    """
    require_whole(classes=classes, channels=channels)
    require_positive(width=width)
    return LeNet5(channels, scale_widths((6, 16, 120, 84), width, least=4), classes)


def _framed(images: Tensor) -> Tensor:
    """Return images (N, C, 32, 32); images of 28x28 get a frame of zeros, as in LeCun 1998."""
    height, width = images.shape[-2:]
    if height != width or height not in {28, 32}:
        raise ConfigError(f"lenet takes images of 28x28 or 32x32, got {height}x{width}")
    return images if height == 32 else F.pad(images, (2, 2, 2, 2))


# `_framed` branches on the size, which torch.fx cannot trace; wrapped, it is a single step of the
# trace. torch.fx finds it by this string.
torch.fx.wrap("_framed")
