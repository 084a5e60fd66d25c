"""Parse pickle opcodes into plain values without importing or calling anything.

`pickletools` lists the opcodes one by one. A class becomes its name, and a call becomes a record of
the function and its arguments. All opcodes of protocols 0 to 5 are known but those that need an
object from outside: registered extensions, and buffers that are not in the stream.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

# A pickle of tensor names and shapes is far shorter; each opcode costs Python time and memory.
_MOST_STEPS = 1 << 21
_LONGEST_KEY = 4096  # letters of a key in a dict; comparing longer keys may take forever
_MOST_LETTERS = 1 << 24  # letters of all names that are put together from two texts
_VALUES = {
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT",
    "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINUNICODE", "BINBYTES", "BINBYTES8", "SHORT_BINBYTES", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
_IGNORED = {"PROTO", "FRAME"}


@dataclass(frozen=True, slots=True)
class PickledName:
    """The name of a class or function in a pickle, as `module.name`."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PersistentReference:
    """A reference by persistent id to an object that is stored outside the pickle."""

    identity: Any


_ORDERED = PickledName("collections.OrderedDict")


class PickledCall:
    """A call that the pickle asks for and that is not carried out.

    Attributes:
        by: the function or class that the pickle would call.
        given: its arguments.
        state: the state that the pickle would give to the new object afterwards.
        items: the keys and values that the pickle would set in the new object.
        parts: the values that the pickle would append to the new object.
    """

    # A pickle may hold millions of calls, so nothing is allocated before it is needed.
    __slots__ = ("by", "given", "items", "parts", "state")

    def __init__(self, by: Any, given: tuple[Any, ...]) -> None:
        self.by, self.given = by, given
        self.state: Any = None
        self.items: dict[Any, Any] | None = None
        self.parts: list[Any] | None = None


def parse_pickle(
    content: bytes | BinaryIO, references: list[PersistentReference] | None = None
) -> Any:
    """Parse a pickle into plain values, and records of names, stored objects and calls.

    Args:
        content: the pickle, or an open file, which is read up to the end of the pickle.
        references: takes every reference to a stored object, in the order of the pickle.

    Raises:
        ValueError: the pickle is damaged, has an unknown opcode, or has more than two million
            opcodes.
    """
    machine = _PickleMachine([] if references is None else references)
    try:
        with warnings.catch_warnings():
            # `pickletools` decodes the argument of an opcode before the loop sees its name, and may
            # warn about invalid escapes in text.
            warnings.simplefilter("ignore", DeprecationWarning)
            for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
                if step >= _MOST_STEPS:
                    raise ValueError(f"it has more than {_MOST_STEPS:,} steps")
                if opcode.name == "STOP":
                    return machine.pop_value()
                machine.follow_opcode(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is no whole pickle ({type(error).__name__})") from None
    raise ValueError("it has no end")


class _PickleMachine:
    """The stack machine of a pickle: the current stack, the stacks below marks, and the memo.

    Args:
        references: takes every reference to a stored object.
    """

    def __init__(self, references: list[PersistentReference]) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._letters = 0
        self._references = references

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
        elif name in {"BINPUT", "LONG_BINPUT", "PUT"}:
            self._memo[argument] = self._stack[-1]
        elif name in {"BINGET", "LONG_BINGET", "GET"}:
            self._stack.append(self._memo[argument])
        elif name not in _IGNORED:
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

    def _pop_mark(self, _: object) -> None:
        """Drop all values above the last mark, and the mark."""
        self._pop_to_mark()

    def _pop(self, _: object) -> None:
        """Drop the value on top; drop the mark if nothing is above it."""
        if self._stack:
            self._stack.pop()
        else:
            self._pop_to_mark()

    def _dup(self, _: object) -> None:
        """Push the value on top once more."""
        self._stack.append(self._stack[-1])

    def _memoize(self, _: object) -> None:
        """Store the value on top under the next free number."""
        self._memo[len(self._memo)] = self._stack[-1]

    def _empty_list(self, _: object) -> None:
        """Push an empty list."""
        self._stack.append([])

    # The members of a set are no tensors with names; a list holds them without hashing them.
    _empty_set = _empty_list

    def _list(self, _: object) -> None:
        """Join all values above the last mark to a list."""
        marked = self._pop_to_mark()
        self._stack.append(marked)

    _frozenset = _list

    def _empty_dict(self, _: object) -> None:
        """Push an empty dict."""
        self._stack.append({})

    def _dict(self, _: object) -> None:
        """Join the pairs of keys and values above the last mark to a dict."""
        marked = self._pop_to_mark()
        self._stack.append({})
        self._set_pairs(marked)

    def _global(self, argument: str) -> None:
        """Push the name of a class or function, which is not imported."""
        self._stack.append(PickledName(argument.replace(" ", ".")))

    def _stack_global(self, _: object) -> None:
        """Replace the module and the name on top by the name of a class or function."""
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError
        # One long text may be part of many names.
        self._letters += len(module) + len(name)
        if self._letters > _MOST_LETTERS:
            raise ValueError("its names are too long")
        self._stack.append(PickledName(f"{module}.{name}"))

    def _binpersid(self, _: object) -> None:
        """Replace the persistent id on top by a reference to the stored object."""
        self._persid(self._stack.pop())

    def _persid(self, identity: Any) -> None:
        """Push a reference to a stored object."""
        self._references.append(PersistentReference(identity))
        self._stack.append(self._references[-1])

    def _appends(self, _: object) -> None:
        """Append all values above the last mark to the list below."""
        found = self._pop_to_mark()
        self._require_list().extend(found)

    _additems = _appends

    def _append(self, _: object) -> None:
        """Append the value on top to the list below."""
        found = self._stack.pop()
        self._require_list().append(found)

    def _require_list(self) -> list[Any]:
        """Return the list on top of the stack, or the one that an object on top is made with.

        Raises:
            TypeError: another value is on top.
        """
        top = self._stack[-1]
        if isinstance(top, PickledCall):
            top.parts = [] if top.parts is None else top.parts
            return top.parts
        if not isinstance(top, list):
            raise TypeError
        return top

    def _setitems(self, _: object) -> None:
        """Set the pairs of keys and values above the last mark in the dict below."""
        self._set_pairs(self._pop_to_mark())

    def _setitem(self, _: object) -> None:
        """Set one pair of key and value in the dict below."""
        value, key = self._stack.pop(), self._stack.pop()
        self._set_pairs([key, value])

    def _set_pairs(self, found: list[Any]) -> None:
        """Set keys and values, which alternate, in the dict on top of the stack."""
        if len(found) % 2:
            raise IndexError
        top = self._require_dict()
        for key, value in zip(found[::2], found[1::2], strict=True):
            if _is_usable_key(key):
                top[key] = value

    def _require_dict(self) -> dict[Any, Any]:
        """Return the dict on top of the stack, or the one that an object on top is made with.

        Raises:
            TypeError: another value is on top.
        """
        top = self._stack[-1]
        if isinstance(top, PickledCall):
            top.items = {} if top.items is None else top.items
            return top.items
        if not isinstance(top, dict):
            raise TypeError
        return top

    def _reduce(self, _: object) -> None:
        """Replace a function and its tuple of arguments by a record of the call."""
        given, by = self._stack.pop(), self._stack.pop()
        if not isinstance(given, tuple):
            raise TypeError
        self._stack.append(PickledCall(by, given))
        # Python 2 pickles an OrderedDict as a call with a list of pairs. The list is emptied, so
        # that a list which many calls share is gone through once.
        if by == _ORDERED and len(given) == 1 and isinstance(given[0], list):
            pairs = [each for each in given[0] if isinstance(each, list | tuple) and len(each) == 2]
            given[0].clear()
            self._set_pairs([part for pair in pairs for part in pair])

    _newobj = _reduce

    def _newobj_ex(self, _: object) -> None:
        """Replace a class, its arguments and its named arguments by a record of the call."""
        self._stack.pop()
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        """Replace all values above the last mark by a record of a call with them."""
        marked = self._pop_to_mark()
        self._stack.append(PickledCall(PickledName(argument.replace(" ", ".")), tuple(marked)))

    def _obj(self, _: object) -> None:
        """Replace the class above the last mark and its arguments by a record of the call."""
        by, *given = self._pop_to_mark()
        self._stack.append(PickledCall(by, tuple(given)))

    def _build(self, _: object) -> None:
        """Pop a state and record it on the call below."""
        state = self._stack.pop()
        made = self._stack[-1]
        if isinstance(made, PickledCall):
            made.state = state


def _is_usable_key(key: Any) -> bool:
    """Return true for the keys of a dict that are stored: short texts, numbers, records of calls.

    Other keys name no tensor, and hashing nested tuples may take forever.
    """
    return (isinstance(key, str) and len(key) <= _LONGEST_KEY) or isinstance(key, int | PickledCall)
