"""Host models by name, and model factories for `--model NAME|module:factory --model-arg K=V`."""

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

from countermark.errors import ConfigError, CountermarkError, suggest_nearest
from countermark.training.hosts.resnet import resnet18, resnet50
from countermark.training.hosts.small import lenet, mlp
from countermark.training.hosts.unet import unet
from countermark.training.hosts.vgg import vgg16, vgg19
from countermark.training.hosts.wideresnet import wrn_10_4

Value: TypeAlias = str | int | float | bool
Factory: TypeAlias = Callable[..., nn.Module]


@dataclass(frozen=True)
class Recipe:
    """Training settings of a host model.

    They hold unless the command line or an experiment changes them. `momentum` and `nesterov` apply
    to sgd only. `milestones` are fractions of the epochs at which the learning rate is multiplied
    by `gamma`.
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


# Pydantic checks the changed fields of a recipe; `Recipe` itself stays a plain dataclass.
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
# Only classifiers have a recipe; `unet` makes images.
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
    """Return the default training recipe of the host model called `name`.

    A `module:factory` gets the recipe of vgg16.

    Args:
        name: as `build` takes it.
        changes: new values of fields by name, in the types that JSON or TOML give.

    Raises:
        ConfigError: no host model has this name, or the model is no classifier; a change names no
            field of a recipe, or has a wrong value.
    """
    fields = asdict(_find_default_recipe(name))
    # pydantic ignores unknown fields of a dataclass, so that they are refused here.
    for field in changes or {}:
        if field not in fields:
            raise ConfigError(f"a recipe has no field {field!r}: {suggest_nearest(field, fields)}")
    try:
        return _RECIPE.validate_python(fields | dict(changes or {}))
    except ValidationError as error:
        wrong = error.errors()[0]
        where, given = wrong["loc"][0], wrong["input"]
        raise ConfigError(f"recipe of {name}: {where} is {given!r}: {wrong['msg']}") from None


def _find_default_recipe(name: str) -> Recipe:
    """Return the recipe of a model before any changes; raise `ConfigError` without a recipe."""
    if ":" in name:
        return _DEFAULT
    if _check_model_name(name) not in _RECIPES:
        way_out = "train it in your own loop, or take a classifier"
        raise ConfigError(f"model {name!r} makes images and cannot learn classes: {way_out}")
    return _RECIPES[name]


def build(name: str, arguments: Mapping[str, Value]) -> nn.Module:
    """Build a freshly initialised host model; seed torch before the call to repeat the weights.

    Args:
        name: a name in `MODELS`, or `module:factory`. The module is imported, which runs its
            code: never pass a name that came with somebody else's file.
        arguments: keyword arguments of the factory; a string that is valid JSON is parsed (`"10"`
            becomes 10).

    Raises:
        ConfigError: the name is unknown, the factory does not take an argument, the factory fails,
            or it returns no module.
    """
    factory = _import_factory(name) if ":" in name else MODELS[_check_model_name(name)]
    # Values of --model-arg arrive as strings; factories expect numbers and booleans.
    typed = {key: _parse_argument(value) for key, value in arguments.items()}
    _check_arguments(name, factory, typed)
    try:
        model: object = factory(**typed)
    # An error of this package already has a message for the user.
    except CountermarkError:
        raise
    except Exception as error:  # a factory is foreign code and may raise anything
        raise ConfigError(f"model {name!r} could not be built: {_format_error(error)}") from error
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise ConfigError(f"{name!r} must return a torch.nn.Module, got {found}: return the model")
    return model


def _check_model_name(name: str) -> str:
    """Return `name` if `MODELS` holds it, else raise `ConfigError` with the nearest name."""
    if name not in MODELS:
        way_out = f"{suggest_nearest(name, MODELS)}, or pass module:factory"
        raise ConfigError(f"unknown model {name!r}: {way_out}")
    return name


def _import_factory(name: str) -> Factory:
    """Import the factory that `module:factory` names; raise `ConfigError` if that fails."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs foreign code, which may raise anything
        message = f"model {name!r}: cannot import {module_name!r} ({_format_error(error)})"
        raise ConfigError(f"{message}: PYTHONPATH must hold its folder") from error
    factory: object = getattr(module, attribute, None)
    if not callable(factory):
        # Suggest only functions and classes that the module itself defines, not its imports.
        own = {
            name for name, kept in vars(module).items()
            if callable(kept) and getattr(kept, "__module__", "") == module.__name__
        }  # fmt: skip
        public = sorted(name for name in own if not name.startswith("_"))
        way_out = suggest_nearest(attribute, public)
        raise ConfigError(f"module {module_name!r} has no factory {attribute!r}: {way_out}")
    return factory


def _parse_argument(value: Value) -> Any:
    """Parse a string argument as JSON if it is JSON; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        # JSON wants a digit before the point, hands on a keyboard do not: width=.25
        return json.loads(re.sub(r"^(-?)\.", r"\g<1>0.", value))
    except ValueError:
        return value


def _check_arguments(name: str, factory: Factory, arguments: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if the factory does not take these keyword arguments."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # a factory in C may have no signature; the call itself raises then
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no arguments"
        raise ConfigError(f"model {name!r}: {error}; it takes {takes}") from error


def _format_error(error: Exception) -> str:
    """Return type and first line of a foreign error, for a message of one line."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
