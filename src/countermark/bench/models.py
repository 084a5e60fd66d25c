"""Host models by name, and the factories behind `--model NAME|module:factory --model-arg K=V`."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from countermark.errors import ConfigError, CountermarkError, nearest

Value: TypeAlias = str | int | float | bool
Factory: TypeAlias = Callable[..., nn.Module]

# Filters of the thirteen convolutions of VGG16, group by group; a pooling ends each group.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class FlatSequential(nn.Sequential):
    """A Sequential that takes images as (N, C, H, W) or as rows (N, C*H*W).

    A Flatten layer would shift the indices: the papers' tensor is called `2.weight`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        """Class scores (N, classes) of images (N, C, H, W) or rows (N, C*H*W)."""
        rows = input.flatten(1)  # (N, C*H*W)
        scores: Tensor = super().forward(rows)  # type: ignore[no-untyped-call]
        return scores


class Vgg16(nn.Module):
    """VGG16 for small images: thirteen convolutions with batch norm, one linear layer."""

    def __init__(self, channels: int, filters: list[list[int]], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for group in filters:
            for width in group:
                layers += [_conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            # Rounding up leaves 28x28 one pixel after five poolings and 32x32 as it is.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = _linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (N, classes) of images (N, C, H, W)."""
        scores: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return scores


class Block(nn.Module):
    """A pre-activation residual block: BN-ReLU-conv-BN-ReLU-conv beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = _conv(inside, outside, 3, stride)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = _conv(outside, outside, 3)
        changes = inside != outside or stride != 1
        self.shortcut = _conv(inside, outside, 1, stride) if changes else None

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, outside, H/stride, W/stride) of features (N, inside, H, W)."""
        active = F.relu(self.bn1(images))
        # A shortcut that changes the shape starts from the activated input (Zagoruyko 2016).
        skip: Tensor = images if self.shortcut is None else self.shortcut(active)
        change: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return skip + change


class WideResNet10(nn.Module):
    """The pre-activation Wide ResNet of depth 10: one residual block in each of three groups."""

    def __init__(self, channels: int, widen: int, classes: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, 16, 3)
        self.conv2 = nn.Sequential(Block(16, 16 * widen, 1))
        self.conv3 = nn.Sequential(Block(16 * widen, 32 * widen, 2))
        self.conv4 = nn.Sequential(Block(32 * widen, 64 * widen, 2))
        self.bn = nn.BatchNorm2d(64 * widen)
        self.fc = _linear(64 * widen, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (N, classes) of images (N, C, H, W)."""
        features = self.conv4(self.conv3(self.conv2(self.conv1(images))))
        scores: Tensor = self.fc(F.relu(self.bn(features)).mean((2, 3)))
        return scores


def mlp(in_features: int = 784, hidden: int = 64, classes: int = 10) -> nn.Module:
    """The multilayer perceptron of Wang 2020; its marked tensor is `2.weight` (classes, hidden).

    Raises:
        ConfigError: a size is not a whole number of at least 1.
    """
    _whole(in_features=in_features, hidden=hidden, classes=classes)
    return FlatSequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def vgg16(classes: int = 10, width: float = 1.0, channels: int = 3) -> nn.Module:
    """VGG16 with batch norm; `features.0.weight` (64, channels, 3, 3) is the first convolution.

    Args:
        classes: classes of the data set.
        width: scales the filters of every layer but the first, to at least 8.
        channels: 3 for colour images, 1 for grey ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1, or the width not above 0.
    """
    _whole(classes=classes, channels=channels)
    _positive(width=width)
    filters = [[max(8, round(count * width)) for count in group] for group in VGG16]
    filters[0][0] = 64
    return Vgg16(channels, filters, classes)


def wrn_10_4(classes: int = 10, widen: int = 4, channels: int = 3) -> nn.Module:
    """The host of Uchida 2017; its marked tensor is `conv2.0.conv2.weight` (64, 64, 3, 3).

    Args:
        classes: classes of the data set.
        widen: the factor k on the widths 16, 32, 64 of the three groups.
        channels: 3 for colour images, 1 for grey ones.

    Raises:
        ConfigError: a size is not a whole number of at least 1.
    """
    _whole(classes=classes, widen=widen, channels=channels)
    return WideResNet10(channels, widen, classes)


@dataclass(frozen=True)
class Recipe:
    """How a host is trained when the command line says nothing.

    `momentum` and `nesterov` belong to sgd. `milestones` are fractions of the epochs at which
    the learning rate is multiplied by `gamma`.
    """

    optimizer: Literal["adam", "sgd"]
    lr: float
    batch_size: int
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    augment: bool = False
    milestones: tuple[float, ...] = ()
    gamma: float = 0.2


MODELS: Mapping[str, Factory] = {"mlp": mlp, "vgg16": vgg16, "wrn-10-4": wrn_10_4}

_DEFAULT = Recipe(
    "sgd", 0.05, 128, weight_decay=5e-4, augment=True, milestones=(0.5, 0.75), gamma=0.1
)
_UCHIDA = Recipe("sgd", 0.1, 64, weight_decay=5e-4, augment=True, milestones=(0.3, 0.6, 0.8))
_RECIPES: Mapping[str, Recipe] = {
    "mlp": Recipe("adam", 1e-3, 32),
    "vgg16": _DEFAULT,
    "wrn-10-4": _UCHIDA,
}


def recipe(name: str) -> Recipe:
    """How the host called `name` is trained by default; a `module:factory` gets that of vgg16.

    Raises:
        ConfigError: no host model has this name.
    """
    return _DEFAULT if ":" in name else _RECIPES[_known(name)]


def build(name: str, arguments: Mapping[str, Value]) -> nn.Module:
    """A freshly initialised host model; seed torch before the call to repeat it.

    Args:
        name: a name in `MODELS`, or `module:factory`. The module is imported, which runs its
            code: never pass a name that came with somebody else's file.
        arguments: for the factory; a string is read as JSON where it is JSON (`"10"` is 10).

    Raises:
        ConfigError: the name, an argument or the factory's result cannot be right.
    """
    factory = _imported(name) if ":" in name else MODELS[_known(name)]
    typed = {key: _converted(value) for key, value in arguments.items()}
    _check_arguments(name, factory, typed)
    try:
        model: object = factory(**typed)
    except CountermarkError:
        raise
    except Exception as error:  # a factory is foreign code and may raise anything
        raise ConfigError(f"model {name!r} could not be built: {_line(error)}") from error
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise ConfigError(f"{name!r} must return a torch.nn.Module, got {found}: return the model")
    return model


def _known(name: str) -> str:
    if name not in MODELS:
        way_out = f"{nearest(name, MODELS)}, or pass module:factory"
        raise ConfigError(f"unknown model {name!r}: {way_out}")
    return name


def _imported(name: str) -> Factory:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs foreign code, which may raise anything
        message = f"model {name!r}: cannot import {module_name!r} ({_line(error)})"
        raise ConfigError(f"{message}: PYTHONPATH must hold its folder") from error
    factory: object = getattr(module, attribute, None)
    if not callable(factory):
        public = [key for key, kept in vars(module).items() if callable(kept) and key[0] != "_"]
        way_out = nearest(attribute, public)
        raise ConfigError(f"module {module_name!r} has no factory {attribute!r}: {way_out}")
    return factory


def _converted(value: Value) -> Any:
    if not isinstance(value, str):
        return value
    try:
        # JSON wants a digit before the point, hands on a keyboard do not: width=.25
        return json.loads(re.sub(r"^(-?)\.", r"\g<1>0.", value))
    except ValueError:
        return value


def _check_arguments(name: str, factory: Factory, arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # written in C, without a signature: the call itself will tell
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no arguments"
        raise ConfigError(f"model {name!r}: {error}; it takes {takes}") from error


def _whole(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {size!r}")


def _positive(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int | float) or not 0 < size < float("inf"):
            raise ConfigError(f"{name} must be a number above 0, got {size!r}")


def _conv(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    # No bias: the batch norm behind each convolution has one.
    conv = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def _linear(inside: int, classes: int) -> nn.Linear:
    linear = nn.Linear(inside, classes)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return linear


def _line(error: Exception) -> str:
    """The first line of a foreign error, for a message of one line."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
