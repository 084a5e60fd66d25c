"""Code that somebody names, module:factory; run only where whoever gives the name trusts it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from countermark.errors import ConfigError, printable

Arguments: TypeAlias = Sequence[Any] | Mapping[str, Any]


def made(what: str, place: str, expected: str, arguments: Arguments = ()) -> Any:
    """What a factory returns.

    Args:
        what: it is for, such as "reader".
        place: module:factory.
        expected: what that should have been, for the error.
        arguments: of the factory, in order or by name.

    Raises:
        ConfigError: there is no such module or factory, or it fails; says which.
    """
    module, _, factory = place.partition(":")
    try:
        run = getattr(importlib.import_module(module), factory)
        return run(**arguments) if isinstance(arguments, Mapping) else run(*arguments)
    except Exception as error:  # foreign code may raise anything
        said = printable(" ".join(str(error).split()), 200)
        raise ConfigError(
            f"{what} {place!r} cannot be made ({type(error).__name__}: {said}): expected "
            f"module:factory, {expected}; PYTHONPATH must hold its folder"
        ) from error
