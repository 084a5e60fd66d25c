"""A pickle as what it says, not as what it does: nothing is imported, called or built.

The opcodes are told one by one (`pickletools`); a class is its name, a call what was to be called
with what. Only the opcodes that TorchScript archives are written with are known.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MOST_STEPS = 1 << 22
_VALUES = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE",
}  # fmt: skip
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names, as `module.name`."""

    name: str


@dataclass(frozen=True)
class Kept:
    """What a pickle says lies elsewhere, by its persistent id."""

    identity: Any


@dataclass(eq=False)
class Made:
    """What would have been made by a call.

    Attributes:
        by: what would have been called.
        given: its arguments.
        state: what the object would have been given afterwards.
    """

    by: Any
    given: tuple[Any, ...]
    state: dict[Any, Any] = field(default_factory=dict)


def inert(content: bytes) -> Any:
    """The value that a pickle describes, of plain values, `Named`, `Kept` and `Made`.

    Raises:
        ValueError: it is damaged, has an opcode that is not known here, or more than four million.
    """
    told = _Told()
    try:
        with warnings.catch_warnings():
            # Python decodes the argument of an opcode before its name is looked at here, and warns
            # of odd escapes in text.
            warnings.simplefilter("ignore", DeprecationWarning)
            for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
                if step >= _MOST_STEPS:
                    raise ValueError(f"it has more than {_MOST_STEPS:,} steps")
                if opcode.name == "STOP":
                    return told.taken()
                told.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is no whole pickle ({type(error).__name__})") from None
    raise ValueError("it has no end")


class _Told:
    """The stack of values, the stacks below its marks, and what is remembered by number."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def taken(self) -> Any:
        """The value on top."""
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """Follow one opcode."""
        if name in _VALUES:
            self._stack.append(_CONSTANTS.get(name, argument))
        elif name in _TUPLES:
            self._tuple(_TUPLES[name])
        elif name in {"BINPUT", "LONG_BINPUT"}:
            self._memo[argument] = self._stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            self._stack.append(self._memo[argument])
        elif name != "PROTO":
            rule = getattr(self, f"_{name.lower()}", None)
            if rule is None:
                raise ValueError(f"its opcode {name} is not known here")
            rule(argument)

    def _tuple(self, count: int | None) -> None:
        if count is None:
            marked = self._marked()  # which changes the stack
            self._stack.append(tuple(marked))
            return
        at = len(self._stack) - count
        if at < 0:
            raise IndexError
        self._stack[at:] = [tuple(self._stack[at:])]

    def _marked(self) -> list[Any]:
        """The values above the last mark."""
        found, self._stack = self._stack, self._below.pop()
        return found

    def _mark(self, _: object) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _empty_list(self, _: object) -> None:
        self._stack.append([])

    def _empty_dict(self, _: object) -> None:
        self._stack.append({})

    def _global(self, argument: str) -> None:
        self._stack.append(Named(argument.replace(" ", ".")))

    def _binpersid(self, _: object) -> None:
        self._stack.append(Kept(self._stack.pop()))

    def _appends(self, _: object) -> None:
        found = self._marked()
        self._list().extend(found)

    def _append(self, _: object) -> None:
        found = self._stack.pop()
        self._list().append(found)

    def _list(self) -> list[Any]:
        if not isinstance(self._stack[-1], list):
            raise TypeError
        return self._stack[-1]

    def _setitems(self, _: object) -> None:
        found = self._marked()
        if len(found) % 2:
            raise IndexError
        # Keys of other kinds name no tensor, and to hash nested ones may take forever.
        pairs = zip(found[::2], found[1::2], strict=True)
        self._dict().update({key: each for key, each in pairs if isinstance(key, str | int)})

    def _setitem(self, _: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        if isinstance(key, str | int):
            self._dict()[key] = value

    def _dict(self) -> dict[Any, Any]:
        if not isinstance(self._stack[-1], dict):
            raise TypeError
        return self._stack[-1]

    def _reduce(self, _: object) -> None:
        given, by = self._stack.pop(), self._stack.pop()
        if not isinstance(given, tuple):
            raise TypeError
        self._stack.append(Made(by, given))

    _newobj = _reduce

    def _build(self, _: object) -> None:
        state = self._stack.pop()
        made = self._stack[-1]
        if isinstance(made, Made) and isinstance(state, dict):
            made.state = state
