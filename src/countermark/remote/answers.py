"""Labels out of a suspect's answer, which may hold anything: what cannot be read is no label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from countermark.errors import printable
from countermark.files import parse_json
from countermark.remote.fields import UnreadableError, follow, shown
from countermark.remote.options import RemoteOptions
from countermark.remote.protocols import PROTOCOLS, paths

MOST_LABELS = 1 << 31
_LABEL = ("label", "class", "index")
_SCORE = ("score", "probability", "confidence")
_LONGEST = 160  # characters of a reason


@dataclass(frozen=True)
class Reading:
    """What was read for one image: a label below 2³¹, or why there is none."""

    label: int | None
    why: str | None


def unread(why: str) -> Reading:
    """No label, and the reason in one short printable line."""
    return Reading(None, printable(why, _LONGEST))


def read_answer(body: bytes, count: int, options: RemoteOptions) -> list[Reading]:
    """The labels in the answer to a request with `count` images; never raises.

    Args:
        body: the whole body, as it came.
        count: images in the request, at least 1.
        options: the protocol and the form of its answers.
    """
    try:
        document = parse_json(body, non_finite=True)  # one NaN costs one image, not the batch
    except ValueError as error:
        return [unread(f"the answer is no JSON: {error}")] * count
    try:
        parts = PROTOCOLS[options.protocol].parts(document, count, options)
    except UnreadableError as error:
        return [unread(str(error))] * count
    return [_read(part, options) for part in parts]


def _read(part: Any, options: RemoteOptions) -> Reading:
    try:
        return Reading(_FORMS[options.answer](follow(part, paths(options)[1]), options), None)
    except UnreadableError as error:
        return unread(str(error))


def _bare(value: Any) -> Any:
    """What lists of one thing are wrapped around, as in [[3]]."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value


def _auto(value: Any, options: RemoteOptions) -> int:
    """Told by its form: numbers in a list are scores, objects are top k, all else is a label."""
    value = _bare(value)
    while isinstance(value, dict) and len(value) == 1 and not _first(value, _LABEL):
        value = _bare(next(iter(value.values())))
    match value:
        case dict() | [dict(), *_]:
            return _top_k(value, options)
        case list():
            return _scores(value, options)
        case _:
            return _label(value, options)


def _label(value: Any, options: RemoteOptions) -> int:
    """A class as a number, or as one of the names."""
    value = _bare(value)
    if isinstance(value, str):
        return _of_name(value, options.class_names)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnreadableError(f"expected a label, came {shown(value)}")
    if not 0 <= value < MOST_LABELS:
        raise UnreadableError(f"no label is as large or small as {shown(value)}")
    return value


def _of_name(name: str, names: tuple[str, ...]) -> int:
    if name in names:
        return names.index(name)
    if names:
        raise UnreadableError(f"{shown(name)} is none of the {len(names)} class names")
    if name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) < MOST_LABELS:
        return int(name)
    raise UnreadableError(f"the class came by name, {shown(name)}: give class_names")


def _scores(value: Any, _: RemoteOptions) -> int:
    """The first of the classes with the largest score."""
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        (value,) = value
    if not isinstance(value, list) or len(value) < 2:
        raise UnreadableError(f"expected a score for each class, came {shown(value)}")
    return _best(value)


def _best(scores: list[Any]) -> int:
    """The place of the first of the largest scores."""
    numbers = [_score(each) for each in scores]
    return numbers.index(max(numbers))


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnreadableError(f"expected a score, came {shown(value)}")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise UnreadableError(f"a score is not finite: {shown(value)}")
    return score


def _top_k(value: Any, options: RemoteOptions) -> int:
    """The label with the largest score among objects with both, or of one from names to scores."""
    value = _bare(value)
    if isinstance(value, dict) and not _first(value, _LABEL):
        entries = [{"label": name, "score": score} for name, score in value.items()]
    else:
        entries = value if isinstance(value, list) else [value]
    if not entries or not all(isinstance(each, dict) and _first(each, _LABEL) for each in entries):
        raise UnreadableError(f"expected objects with label and score, came {shown(value)}")
    best = 0
    if len(entries) > 1:
        best = _best([follow(each, _first(each, _SCORE) or "score") for each in entries])
    return _label(entries[best][_first(entries[best], _LABEL)], options)


def _first(entry: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of the names that the entry has, or nothing."""
    return next((name for name in names if name in entry), "")


_FORMS = {"auto": _auto, "labels": _label, "scores": _scores, "top_k": _top_k}
