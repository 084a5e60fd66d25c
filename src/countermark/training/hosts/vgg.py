"""VGG for small images, with batch norm: sixteen or nineteen layers of weights in the original."""

from __future__ import annotations

from torch import Tensor, nn

from countermark.training.hosts.parts import (
    make_conv,
    make_linear,
    require_positive,
    require_whole,
    scale_widths,
)

# Filters of the convolutions, group by group; a pooling ends each group.
VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class Vgg(nn.Module):
    """VGG for small images: convolutions with batch norm in five groups, one linear layer."""

    def __init__(self, channels: int, filters: list[list[int]], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for group in filters:
            for width in group:
                layers += [make_conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            # Rounding up leaves 28x28 one pixel after five poolings and 32x32 as it is.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = make_linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute class scores (N, classes) of images (N, C, H, W)."""
        scores: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return scores


def vgg16(classes: int = 10, width: float = 1.0, channels: int = 3) -> nn.Module:
    """Build VGG16 with batch norm; `features.0.weight` (64, channels, 3, 3) is its first layer.

    Args:
        classes: classes of the data set.
        width: scales the filters of every layer but the first, to at least 8.
        channels: 3 for colour images, 1 for grey ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1, or the width not above 0.
    """
    return _make_vgg(VGG16, classes, width, channels)


def vgg19(classes: int = 10, width: float = 1.0, channels: int = 3) -> nn.Module:
    """Build VGG19 with batch norm; `features.0.weight` (64, channels, 3, 3) is its first layer.

    Args:
        classes: classes of the data set.
        width: scales the filters of every layer but the first, to at least 8.
        channels: 3 for colour images, 1 for grey ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1, or the width not above 0.
    """
    return _make_vgg(VGG19, classes, width, channels)


def _make_vgg(
    groups: tuple[tuple[int, ...], ...], classes: int, width: float, channels: int
) -> Vgg:
    """Check the sizes and build a VGG with these groups of filters."""
    require_whole(classes=classes, channels=channels)
    require_positive(width=width)
    filters = [scale_widths(group, width) for group in groups]
    # The first layer keeps its 64 filters at every width.
    filters[0][0] = 64
    return Vgg(channels, filters, classes)
