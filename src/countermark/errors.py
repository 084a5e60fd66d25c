"""What can go wrong, drawn as a tree.

    CountermarkError                  every error this library raises on purpose
    ├── ConfigError                   a field, name or option that cannot be right
    │   └── CapacityError             more bits than the weights that are read can hold
    ├── KeyFileError                  a key folder or opening: missing, damaged, forged, in the way
    ├── ClaimError                    a claim, time stamp or tree head: damaged, forged, in the way
    ├── LedgerError                   a ledger that is missing, of another kind, or in the way
    ├── SuspectError                  a suspect that cannot be read: truncated, hostile, non-finite
    │   └── AlignmentError            its neurons cannot be put into the order of a reference
    ├── DataError                     a data set that is missing or cannot be read
    ├── LoopError                     a training loop and a mark that do not fit together
    ├── MarkNotTakenError             training ended and the mark is not in the model
    └── MissingExtraError             an optional dependency that is not installed

A message is one line: what was expected, what came, and the way out; names out of hostile files
cannot break it. "Not owned" is no error: it is a value of `Verdict.outcome`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

_Value = TypeVar("_Value")


class CountermarkError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line, exit 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ConfigError(CountermarkError):
    """A field, a name or an option that cannot be right."""


class CapacityError(ConfigError):
    """More bits than the weights that are read can hold."""


class KeyFileError(CountermarkError):
    """A key folder, or what was opened of one, that is missing, damaged, forged or in the way."""


class ClaimError(CountermarkError):
    """A claim, a time stamp or a tree head that is damaged, forged or in the way."""


class LedgerError(CountermarkError):
    """A ledger that is missing, of another kind or version, or in the way."""


class SuspectError(CountermarkError):
    """A suspect that cannot be read."""


class AlignmentError(SuspectError):
    """A suspect whose neurons cannot be put into the order of a reference."""


class DataError(CountermarkError):
    """A data set that is missing or cannot be read."""


class LoopError(CountermarkError):
    """A training loop and a mark that do not fit together."""


class MarkNotTakenError(CountermarkError):
    """Training ended and the mark is not in the model."""


class MissingExtraError(CountermarkError):
    """An optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'countermark[{extra}]'")


def printable(text: str, longest: int = 2000) -> str:
    """Text as one line that a terminal shows as it is: control characters escaped, cut if long."""
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in text[: longest + 1]
    )
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def nearest(name: str, known: Iterable[str]) -> str:
    """The way out of a misspelt name: the nearest known one, or the list when none is near.

    Returns: a clause for the end of an error message, at most six names long.
    """
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"the nearest is {close[0]!r}"
    shown = ", ".join(choices[:6]) + (", …" if len(choices) > 6 else "")
    return f"there are: {shown}" if choices else "there are none"


def named(kind: str, name: str, known: Mapping[str, _Value]) -> _Value:
    """What is known by that name.

    Raises:
        ConfigError: nothing is; says what kind of thing was sought, and the nearest.
    """
    if name not in known:
        raise ConfigError(f"there is no {kind} {name!r}: {nearest(name, known)}")
    return known[name]
