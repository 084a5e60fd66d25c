"""The wide residual network of depth 10 that Uchida 2017 marked."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from countermark.training.hosts.parts import make_conv, make_linear, require_whole


class PreActivationBlock(nn.Module):
    """A pre-activation residual block: BN-ReLU-conv-BN-ReLU-conv beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = make_conv(inside, outside, 3, stride)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = make_conv(outside, outside, 3)
        changes = inside != outside or stride != 1
        self.shortcut = make_conv(inside, outside, 1, stride) if changes else None

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (N, outside, H/stride, W/stride) of features (N, inside, H, W)."""
        active = F.relu(self.bn1(images))
        # A shortcut that changes the shape starts from the activated input (Zagoruyko 2016).
        skip: Tensor = images if self.shortcut is None else self.shortcut(active)
        change: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return skip + change


class WideResNet10(nn.Module):
    """The pre-activation Wide ResNet of depth 10: one residual block in each of three groups."""

    def __init__(self, channels: int, widen: int, classes: int) -> None:
        super().__init__()
        # Names as in Uchida 2017. A group is a Sequential of one block: `conv2.0.conv2.weight`.
        self.conv1 = make_conv(channels, 16, 3)
        self.conv2 = nn.Sequential(PreActivationBlock(16, 16 * widen, 1))
        self.conv3 = nn.Sequential(PreActivationBlock(16 * widen, 32 * widen, 2))
        self.conv4 = nn.Sequential(PreActivationBlock(32 * widen, 64 * widen, 2))
        self.bn = nn.BatchNorm2d(64 * widen)
        self.fc = make_linear(64 * widen, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute class scores (N, classes) of images (N, C, H, W)."""
        features = self.conv4(self.conv3(self.conv2(self.conv1(images))))
        scores: Tensor = self.fc(F.relu(self.bn(features)).mean((2, 3)))
        return scores


def wrn_10_4(classes: int = 10, widen: int = 4, channels: int = 3) -> nn.Module:
    """Build the host of Uchida 2017, marked in `conv2.0.conv2.weight` (64, 64, 3, 3).

    Args:
        classes: classes of the data set.
        widen: the factor k on the widths 16, 32, 64 of the three groups.
        channels: 3 for colour images, 1 for grey ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1.
    """
    require_whole(classes=classes, widen=widen, channels=channels)
    return WideResNet10(channels, widen, classes)
