"""What the families of hosts share: He-initialised layers, scaled widths, checked sizes."""

from __future__ import annotations

from torch import nn

from countermark.errors import ConfigError


def conv(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps (H, W) at stride 1; its weight is (outside, inside, kernel, kernel).

    It has no bias: the norm layer beside each convolution has one.
    """
    layer = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def linear(inside: int, classes: int) -> nn.Linear:
    """The last layer of a classifier; its weight is (classes, inside), its bias starts at zero."""
    layer = nn.Linear(inside, classes)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def scaled(counts: tuple[int, ...], width: float, least: int = 8) -> list[int]:
    """The filters of layers made `width` times as wide, none with fewer than `least`."""
    return [max(least, round(count * width)) for count in counts]


def whole(**sizes: object) -> None:
    """Refuse a size that counts nothing.

    Raises:
        ConfigError: a size is not a whole number of at least 1.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {size!r}")


def positive(**sizes: object) -> None:
    """Refuse a size that scales nothing.

    Raises:
        ConfigError: a size is not a finite number above 0.
    """
    for name, size in sizes.items():
        if not isinstance(size, int | float) or not 0 < size < float("inf"):
            raise ConfigError(f"{name} must be a number above 0, got {size!r}")
