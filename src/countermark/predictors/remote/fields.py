"""Find values in a JSON document that a suspect wrote."""

from __future__ import annotations

from typing import Any

from countermark.errors import make_printable

_LONGEST = 40  # characters of a suspect's own text in a reason


class UnreadableError(ValueError):
    """An answer holds no label; the message is the reason that the transcript keeps."""


def describe_value(value: Any) -> str:
    """Describe a JSON value in a few printable characters, whatever its size."""
    match value:
        case dict():
            return f"an object of {len(value)} field(s)"
        case list():
            return f"a list of {len(value)}"
        # repr() of an integer of many digits raises ValueError, or takes long.
        case int() if not isinstance(value, bool) and abs(value) >= 1 << 63:
            return "a number beyond 64 bits"
        case _:
            return make_printable(
                repr(value[:_LONGEST] if isinstance(value, str) else value), _LONGEST
            )


def follow_path(value: Any, path: str) -> Any:
    """Return the value at a dotted path: names lead into objects, numbers into lists.

    Raises:
        UnreadableError: the document has no value at this path.
    """
    for step in filter(None, path.split(".")):
        match value:
            case dict() if step in value:
                value = value[step]
            # A place of ten digits is beyond every list, and int() of more may take long.
            case list() if step.isdecimal() and len(step) < 10 and int(step) < len(value):
                value = value[int(step)]
            case _:
                raise UnreadableError(f"there is no {step!r} in {describe_value(value)}")
    return value


def require_list(value: Any, count: int) -> list[Any]:
    """Return a list of `count` values, which may be the only field of an object.

    Raises:
        UnreadableError: the value is no list, or one of another length.
    """
    while isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, list) or len(value) != count:
        raise UnreadableError(f"expected a list of {count} answer(s), came {describe_value(value)}")
    return value
