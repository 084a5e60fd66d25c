"""Parse pickle opcodes into plain values without importing or calling anything.

`pickletools` lists the opcodes one by one. A class becomes its name, and a call becomes a record of
the function and its arguments. Only the opcodes that occur in TorchScript archives are accepted.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A pickle of tensor names and shapes is far shorter; each opcode costs Python time and memory.
_MOST_STEPS = 1 << 22
_VALUES = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE",
}  # fmt: skip
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}


@dataclass(frozen=True)
class PickledName:
    """The name of a class or function in a pickle, as `module.name`."""

    name: str


@dataclass(frozen=True)
class PersistentReference:
    """A reference by persistent id to an object that is stored outside the pickle."""

    identity: Any


@dataclass(eq=False)
class PickledCall:
    """A call that the pickle asks for and that is not carried out.

    Attributes:
        by: the function or class that the pickle would call.
        given: its arguments.
        state: the state that the pickle would give to the new object afterwards.
    """

    by: Any
    given: tuple[Any, ...]
    state: dict[Any, Any] = field(default_factory=dict)


def parse_pickle(content: bytes) -> Any:
    """Parse a pickle into plain values, and records of names, stored objects and calls.

    Raises:
        ValueError: the pickle is damaged, has an unknown opcode, or has more than four million
            opcodes.
    """
    told = _PickleMachine()
    try:
        with warnings.catch_warnings():
            # `pickletools` decodes the argument of an opcode before the loop sees its name, and may
            # warn about invalid escapes in text.
            warnings.simplefilter("ignore", DeprecationWarning)
            for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
                if step >= _MOST_STEPS:
                    raise ValueError(f"it has more than {_MOST_STEPS:,} steps")
                if opcode.name == "STOP":
                    return told.pop_value()
                told.follow_opcode(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is no whole pickle ({type(error).__name__})") from None
    raise ValueError("it has no end")


class _PickleMachine:
    """The stack machine of a pickle: the current stack, the stacks below marks, and the memo."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop_value(self) -> Any:
        """Pop the value on top of the stack."""
        return self._stack.pop()

    def follow_opcode(self, name: str, argument: Any) -> None:
        """Follow one opcode.

        Args:
            name: of the opcode in `pickletools`.
            argument: its decoded argument.

        Raises:
            ValueError: the opcode is not known here.
        """
        if name in _VALUES:
            self._stack.append(_CONSTANTS.get(name, argument))
        elif name in _TUPLES:
            self._join_tuple(_TUPLES[name])
        elif name in {"BINPUT", "LONG_BINPUT"}:
            self._memo[argument] = self._stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            self._stack.append(self._memo[argument])
        elif name != "PROTO":
            # The methods below are named after their opcodes and are found here by that name.
            rule = getattr(self, f"_{name.lower()}", None)
            if rule is None:
                raise ValueError(f"its opcode {name} is not known here")
            rule(argument)

    def _join_tuple(self, count: int | None) -> None:
        """Join the last `count` values to a tuple; of None, all values above the last mark."""
        if count is None:
            # This call replaces `self._stack`, so it must run before `self._stack` is looked up.
            marked = self._pop_to_mark()
            self._stack.append(tuple(marked))
            return
        # A negative index would silently count from the end of the stack.
        at = len(self._stack) - count
        if at < 0:
            raise IndexError
        self._stack[at:] = [tuple(self._stack[at:])]

    def _pop_to_mark(self) -> list[Any]:
        """Pop all values above the last mark, and the mark."""
        found, self._stack = self._stack, self._below.pop()
        return found

    def _mark(self, _: object) -> None:
        """Begin a new stack above the current one."""
        self._below.append(self._stack)
        self._stack = []

    def _empty_list(self, _: object) -> None:
        """Push an empty list."""
        self._stack.append([])

    def _empty_dict(self, _: object) -> None:
        """Push an empty dict."""
        self._stack.append({})

    def _global(self, argument: str) -> None:
        """Push the name of a class or function, which is not imported."""
        self._stack.append(PickledName(argument.replace(" ", ".")))

    def _binpersid(self, _: object) -> None:
        """Replace the persistent id on top by a reference to the stored object."""
        self._stack.append(PersistentReference(self._stack.pop()))

    def _appends(self, _: object) -> None:
        """Append all values above the last mark to the list below."""
        found = self._pop_to_mark()
        self._require_list().extend(found)

    def _append(self, _: object) -> None:
        """Append the value on top to the list below."""
        found = self._stack.pop()
        self._require_list().append(found)

    def _require_list(self) -> list[Any]:
        """Return the list on top of the stack; raise `TypeError` for any other value."""
        if not isinstance(self._stack[-1], list):
            raise TypeError
        return self._stack[-1]

    def _setitems(self, _: object) -> None:
        """Set the pairs of keys and values above the last mark in the dict below."""
        found = self._pop_to_mark()
        if len(found) % 2:
            raise IndexError
        # Keys of other types name no tensor, and hashing nested tuples may take forever.
        pairs = zip(found[::2], found[1::2], strict=True)
        self._require_dict().update(
            {key: each for key, each in pairs if isinstance(key, str | int)}
        )

    def _setitem(self, _: object) -> None:
        """Set one pair of key and value in the dict below."""
        value, key = self._stack.pop(), self._stack.pop()
        if isinstance(key, str | int):
            self._require_dict()[key] = value

    def _require_dict(self) -> dict[Any, Any]:
        """Return the dict on top of the stack; raise `TypeError` for any other value."""
        if not isinstance(self._stack[-1], dict):
            raise TypeError
        return self._stack[-1]

    def _reduce(self, _: object) -> None:
        """Replace a function and its tuple of arguments by a record of the call."""
        given, by = self._stack.pop(), self._stack.pop()
        if not isinstance(given, tuple):
            raise TypeError
        self._stack.append(PickledCall(by, given))

    _newobj = _reduce

    def _build(self, _: object) -> None:
        """Pop a state and record it on the call below; drop a state that is no dict."""
        state = self._stack.pop()
        made = self._stack[-1]
        if isinstance(made, PickledCall) and isinstance(state, dict):
            made.state = state
