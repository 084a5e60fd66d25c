"""Import objects by name: parts of this package, and code that a user names as module:factory.

Use only names that the user trusts: importing a module runs its code.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from countermark.errors import ConfigError, make_printable

Arguments: TypeAlias = Sequence[Any] | Mapping[str, Any]


def load_object(place: str) -> Any:
    """Import a function or class by its place, module:name.

    Reading a mark must not load torch, and a layer does not know the layers above it. So a scheme
    names its training class and its embedding by their places, and they are imported on use.
    """
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def call_factory(what: str, place: str, expected: str, arguments: Arguments = ()) -> Any:
    """Import a factory, call it and return its result.

    Args:
        what: purpose of the result, such as "reader"; for the error message.
        place: module:factory.
        expected: description of the right kind of factory; for the error message.
        arguments: arguments of the factory, in order or by name.

    Raises:
        ConfigError: there is no such module or factory, or it fails; the message says which.
    """
    try:
        run = load_object(place)
        return run(**arguments) if isinstance(arguments, Mapping) else run(*arguments)
    except Exception as error:  # foreign code may raise anything
        # One line, since an error of foreign code may span several or hold escape sequences.
        said = make_printable(" ".join(str(error).split()), 200)
        raise ConfigError(
            f"{what} {place!r} cannot be made ({type(error).__name__}: {said}): expected "
            f"module:factory, {expected}; PYTHONPATH must hold its folder"
        ) from error
