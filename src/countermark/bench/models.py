"""Host models by name, and the factories behind `--model NAME|module:factory --model-arg K=V`."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from torch import nn

from countermark.bench.hosts.resnet import resnet18, resnet50
from countermark.bench.hosts.small import lenet, mlp
from countermark.bench.hosts.unet import unet
from countermark.bench.hosts.vgg import vgg16, vgg19
from countermark.bench.hosts.wideresnet import wrn_10_4
from countermark.errors import ConfigError, CountermarkError, suggest_nearest

Value: TypeAlias = str | int | float | bool
Factory: TypeAlias = Callable[..., nn.Module]


@dataclass(frozen=True)
class Recipe:
    """How a host is trained when the command line says nothing.

    `momentum` and `nesterov` belong to sgd. `milestones` are fractions of the epochs at which
    the learning rate is multiplied by `gamma`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    optimizer: Literal["adam", "sgd"]
    lr: PositiveFloat
    batch_size: PositiveInt
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    augment: bool = False
    milestones: tuple[float, ...] = ()
    gamma: float = 0.2


_RECIPE = TypeAdapter(Recipe)

MODELS: Mapping[str, Factory] = {
    "mlp": mlp,
    "lenet": lenet,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "wrn-10-4": wrn_10_4,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "unet": unet,
}

_DEFAULT = Recipe(
    "sgd", 0.05, 128, weight_decay=5e-4, augment=True, milestones=(0.5, 0.75), gamma=0.1
)
_UCHIDA = Recipe("sgd", 0.1, 64, weight_decay=5e-4, augment=True, milestones=(0.3, 0.6, 0.8))
_RESNET = replace(_DEFAULT, lr=0.1)
# Classifiers only: `unet` has none.
_RECIPES: Mapping[str, Recipe] = {
    "mlp": Recipe("adam", 1e-3, 32),
    "lenet": Recipe("adam", 1e-3, 64),
    "vgg16": _DEFAULT,
    "vgg19": _DEFAULT,
    "wrn-10-4": _UCHIDA,
    "resnet18": _RESNET,
    "resnet50": _RESNET,
}


def recipe(name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """How the host called `name` is trained by default; a `module:factory` gets that of vgg16.

    Args:
        name: as `build` takes it.
        changes: fields that are to be others, as JSON or TOML gives them.

    Raises:
        ConfigError: no host model has this name, or it has and is no classifier; a change names no
            field, or has a wrong value.
    """
    fields = asdict(_default(name))
    for field in changes or {}:
        if field not in fields:
            raise ConfigError(f"a recipe has no field {field!r}: {suggest_nearest(field, fields)}")
    try:
        return _RECIPE.validate_python(fields | dict(changes or {}))
    except ValidationError as error:
        wrong = error.errors()[0]
        where, given = wrong["loc"][0], wrong["input"]
        raise ConfigError(f"recipe of {name}: {where} is {given!r}: {wrong['msg']}") from None


def _default(name: str) -> Recipe:
    if ":" in name:
        return _DEFAULT
    if _known(name) not in _RECIPES:
        way_out = "train it in your own loop, or take a classifier"
        raise ConfigError(f"model {name!r} makes images and cannot learn classes: {way_out}")
    return _RECIPES[name]


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
        way_out = f"{suggest_nearest(name, MODELS)}, or pass module:factory"
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
        own = {
            name for name, kept in vars(module).items()
            if callable(kept) and getattr(kept, "__module__", "") == module.__name__
        }  # fmt: skip
        public = sorted(name for name in own if not name.startswith("_"))
        way_out = suggest_nearest(attribute, public)
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


def _line(error: Exception) -> str:
    """The first line of a foreign error, for a message of one line."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
