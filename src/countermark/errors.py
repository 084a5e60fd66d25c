"""All errors that this library raises on purpose, as a tree.

    CountermarkError                  every error this library raises on purpose
    ├── ConfigError                   a field, name or option that cannot be right
    │   └── CapacityError             more bits than the weights that are read can hold
    ├── KeyFileError                  a key or disclosure: missing, damaged, forged, in the way
    ├── ClaimError                    a claim, timestamp or tree head: damaged, forged, in the way
    ├── LedgerError                   a ledger that is missing, of another kind, or in the way
    ├── SuspectError                  a suspect that cannot be read: truncated, hostile, non-finite
    │   └── AlignmentError            its neurons cannot be put into the order of a reference
    ├── DataError                     a data set that is missing or cannot be read
    ├── LoopError                     a training loop and a mark that do not fit together
    ├── MarkNotTakenError             training ended and the mark is not in the model
    └── MissingExtraError             an optional dependency that is not installed

"In the way" means that the name of a file to be written is taken. A message is one line: the
expected value, the value that came, and how to mend it. Names out of hostile files cannot break the
line. "Not owned" is no error but a value of `Verdict.outcome`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

_Value = TypeVar("_Value")


class CountermarkError(Exception):
    """Base class of all errors raised on purpose; the command line prints one line, exit 2."""

    def __init__(self, message: str = "") -> None:
        # Messages quote names out of hostile files, which may hold terminal escape sequences.
        super().__init__(make_printable(message))


class ConfigError(CountermarkError):
    """A field, a name or an option cannot be right."""


class CapacityError(ConfigError):
    """A mark has more bits than the weights that are read can hold."""


class KeyFileError(CountermarkError):
    """A key folder, or a disclosure of its triggers, is missing, damaged, forged or in the way."""


class ClaimError(CountermarkError):
    """A claim, a timestamp or a tree head is damaged, forged or in the way."""


class LedgerError(CountermarkError):
    """A ledger is missing, of another kind or version, or in the way."""


class SuspectError(CountermarkError):
    """A suspect cannot be read."""


class AlignmentError(SuspectError):
    """A suspect's neurons cannot be put into the order of a reference."""


class DataError(CountermarkError):
    """A data set is missing or cannot be read."""


class LoopError(CountermarkError):
    """A training loop and a mark do not fit together."""


class MarkNotTakenError(CountermarkError):
    """Training ended and the mark is not in the model."""


class MissingExtraError(CountermarkError):
    """An optional dependency is not installed.

    Args:
        feature: the feature that needs the dependency, as the subject of a sentence.
        extra: name of the extra that installs the dependency.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'countermark[{extra}]'")


def make_printable(text: str, longest: int = 2000) -> str:
    """Return a text as one line that a terminal shows unchanged.

    Control characters are escaped, and a text of more than `longest` characters is cut.
    """
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        # Cut before escaping: a hostile text may be gigabytes long. One character more than allowed
        # shows that something was cut.
        for each in text[: longest + 1]
    )
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def suggest_nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known name for a misspelt name, or list known names if none is near.

    Returns: a clause for the end of an error message, at most six names long.
    """
    choices = list(known)
    # A cutoff a little below the default of 0.6, so that short misspelt names are found too.
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"the nearest is {close[0]!r}"
    shown = ", ".join(choices[:6]) + (", …" if len(choices) > 6 else "")
    return f"there are: {shown}" if choices else "there are none"


def find_by_name(kind: str, name: str, known: Mapping[str, _Value]) -> _Value:
    """Look up a value by its name.

    Args:
        kind: the kind of thing that is looked up, for the error message.
        name: the name that the user gave.
        known: all values by name.

    Raises:
        ConfigError: the name is unknown; the message suggests the nearest known name.
    """
    if name not in known:
        raise ConfigError(f"there is no {kind} {name!r}: {suggest_nearest(name, known)}")
    return known[name]
