"""Parts that all host families share: He-initialised layers, scaled widths, checks of sizes."""

from __future__ import annotations

from torch import nn

from countermark.errors import ConfigError


def make_conv(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Make a convolution that keeps (H, W) at stride 1, with He-initialised weights.

    Its weight is (outside, inside, kernel, kernel).
    """
    # No bias: the norm layer beside each convolution has one.
    layer = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def make_linear(inside: int, classes: int) -> nn.Linear:
    """Make the last layer of a classifier: weight (classes, inside), bias zero at the start."""
    layer = nn.Linear(inside, classes)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def scale_widths(counts: tuple[int, ...], width: float, least: int = 8) -> list[int]:
    """Scale the numbers of filters by `width`; no layer gets fewer than `least` filters."""
    return [max(least, round(count * width)) for count in counts]


def require_whole(**sizes: object) -> None:
    """Check that every size is a whole number of at least 1.

    Raises:
        ConfigError: a size is not such a number.
    """
    for name, size in sizes.items():
        # A bool is an int in Python, but `--model-arg classes=true` is a mistake.
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {size!r}")


def require_positive(**sizes: object) -> None:
    """Check that every size is a finite number above 0.

    Raises:
        ConfigError: a size is not such a number.
    """
    for name, size in sizes.items():
        # NaN fails both comparisons, so it is refused too.
        if not isinstance(size, int | float) or not 0 < size < float("inf"):
            raise ConfigError(f"{name} must be a number above 0, got {size!r}")
