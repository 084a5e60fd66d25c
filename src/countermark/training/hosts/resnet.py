"""The residual networks of He 2016 for small images, under the tensor names of torchvision.

The stem is a 3x3 convolution without pooling, so that the groups work at 32, 16, 8 and 4 pixels for
images of 32x32.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from countermark.training.hosts.parts import (
    make_conv,
    make_linear,
    require_positive,
    require_whole,
    scale_widths,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut."""

    # Output channels are `expansion` times the width of the block.
    expansion: ClassVar[int] = 1

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = make_conv(inside, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = make_conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _make_shortcut(inside, width, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (N, width, H/stride, W/stride) of features (N, inside, H, W)."""
        skip = images if self.downsample is None else self.downsample(images)
        change = F.relu(self.bn1(self.conv1(images)))
        return F.relu(skip + self.bn2(self.conv2(change)))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with batch norm beside a shortcut.

    The stride is that of the 3x3 convolution, as in torchvision.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = width * self.expansion
        self.conv1 = make_conv(inside, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = make_conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = make_conv(width, outside, 1)
        self.bn3 = nn.BatchNorm2d(outside)
        self.downsample = _make_shortcut(inside, outside, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (N, 4*width, H/stride, W/stride) of features (N, inside, H, W)."""
        skip = images if self.downsample is None else self.downsample(images)
        change = F.relu(self.bn1(self.conv1(images)))
        change = F.relu(self.bn2(self.conv2(change)))
        return F.relu(skip + self.bn3(self.conv3(change)))


_Kind: TypeAlias = type[BasicBlock | Bottleneck]


class ResNet(nn.Module):
    """A stem, four groups of residual blocks, one linear layer."""

    def __init__(
        self, block: _Kind, depths: tuple[int, ...], widths: list[int], channels: int, classes: int
    ) -> None:
        super().__init__()
        outputs = [width * block.expansion for width in widths]
        # torchvision's attribute names: alignment and keys find tensors by them.
        self.conv1 = make_conv(channels, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _make_group(block, depths[0], widths[0], widths[0], 1)
        self.layer2 = _make_group(block, depths[1], outputs[0], widths[1], 2)
        self.layer3 = _make_group(block, depths[2], outputs[1], widths[2], 2)
        self.layer4 = _make_group(block, depths[3], outputs[2], widths[3], 2)
        self.fc = make_linear(outputs[3], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute class scores (N, classes) of images (N, C, H, W)."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        # The mean over all pixels lets the network take images of any size.
        scores: Tensor = self.fc(features.mean((2, 3)))
        return scores


def resnet18(classes: int = 10, width: float = 1.0, channels: int = 3) -> nn.Module:
    """Build a ResNet-18; `layer4.1.conv2.weight` (512, 512, 3, 3) is the last convolution.

    Args:
        classes: classes of the data set.
        width: scales the widths 64, 128, 256, 512 of stem and groups, to at least 8.
        channels: 3 for colour images, 1 for grey ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1, or the width not above 0.
    """
    return _make_resnet(BasicBlock, (2, 2, 2, 2), classes, width, channels)


def resnet50(classes: int = 10, width: float = 1.0, channels: int = 3) -> nn.Module:
    """Build a ResNet-50; `layer4.2.conv3.weight` (2048, 512, 1, 1) is the last convolution.

    Args:
        classes: classes of the data set.
        width: scales the widths 64, 128, 256, 512 of stem and groups, to at least 8.
        channels: 3 for colour images, 1 for grey ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1, or the width not above 0.
    """
    return _make_resnet(Bottleneck, (3, 4, 6, 3), classes, width, channels)


def _make_resnet(
    block: _Kind, depths: tuple[int, ...], classes: int, width: float, channels: int
) -> ResNet:
    """Check the sizes and build a residual network of these blocks."""
    require_whole(classes=classes, channels=channels)
    require_positive(width=width)
    return ResNet(block, depths, scale_widths((64, 128, 256, 512), width), channels, classes)


def _make_group(block: _Kind, depth: int, inside: int, width: int, stride: int) -> nn.Sequential:
    """Build the blocks of one group; only the first changes size and number of features."""
    blocks = [block(inside, width, stride)]
    blocks += [block(width * block.expansion, width, 1) for _ in range(1, depth)]
    return nn.Sequential(*blocks)


def _make_shortcut(inside: int, outside: int, stride: int) -> nn.Sequential | None:
    """Build a projection for a block that changes the shape; None for a block that keeps it."""
    # He 2016, option B: identity wherever the shapes allow it.
    if inside == outside and stride == 1:
        return None
    return nn.Sequential(make_conv(inside, outside, 1, stride), nn.BatchNorm2d(outside))
