"""Parse labels out of a suspect's answer, which may hold anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from countermark._internal.files import parse_json
from countermark.errors import make_printable
from countermark.predictors.remote.fields import UnreadableError, describe_value, follow_path
from countermark.predictors.remote.options import RemoteOptions
from countermark.predictors.remote.protocols import PROTOCOLS, split_answer_path

# Transcripts store labels; a bound keeps them small and inside int64.
MOST_LABELS = 1 << 31
# The names that common model servers give to the label and the score of an object.
_LABEL = ("label", "class", "index")
_SCORE = ("score", "probability", "confidence")
_LONGEST = 160  # characters of a reason


@dataclass(frozen=True)
class ParsedLabel:
    """The result of parsing the answer for one image.

    Attributes:
        label: the class, below 2³¹; None if there is none.
        why: the reason for a missing label; None if there is a label.
    """

    label: int | None
    why: str | None


def make_missing_label(why: str) -> ParsedLabel:
    """Return a missing label with its reason, as one short printable line."""
    return ParsedLabel(None, make_printable(why, _LONGEST))


def read_answer(body: bytes, count: int, options: RemoteOptions) -> list[ParsedLabel]:
    """Parse the labels in the answer to a request with `count` images; never raises.

    Args:
        body: the whole body, as it was received.
        count: images in the request, at least 1.
        options: the protocol and the form of its answers.

    Returns: one result for each image.
    """
    try:
        document = parse_json(body, non_finite=True)  # one NaN costs one image, not the batch
    except ValueError as error:
        return [make_missing_label(f"the answer is no JSON: {error}")] * count
    try:
        parts = PROTOCOLS[options.protocol].parts(document, count, options)
    except UnreadableError as error:
        return [make_missing_label(str(error))] * count
    return [_parse_part(part, options) for part in parts]


def _parse_part(part: Any, options: RemoteOptions) -> ParsedLabel:
    """Parse one image's part of an answer."""
    try:
        # `paths()[1]` leads from one image's part of the document to its label or scores.
        return ParsedLabel(
            _FORMS[options.answer](follow_path(part, split_answer_path(options)[1]), options), None
        )
    except UnreadableError as error:
        return make_missing_label(str(error))


def _unwrap_lists(value: Any) -> Any:
    """Unwrap lists of a single value, as in [[3]]."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value


def _parse_any_form(value: Any, options: RemoteOptions) -> int:
    """Parse a label whose form is recognised from the value.

    Numbers in a list are scores, objects are top k, every other value is a label.
    """
    value = _unwrap_lists(value)
    while isinstance(value, dict) and len(value) == 1 and not _find_first_name(value, _LABEL):
        value = _unwrap_lists(next(iter(value.values())))
    match value:
        case dict() | [dict(), *_]:
            return _parse_top_k(value, options)
        case list():
            return _parse_scores(value, options)
        case _:
            return _parse_label(value, options)


def _parse_label(value: Any, options: RemoteOptions) -> int:
    """Parse a class that is given as a number, or as one of the class names."""
    value = _unwrap_lists(value)
    if isinstance(value, str):
        return _look_up_class(value, options.class_names)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # In Python `True` is the integer 1, but an answer of `true` names no class.
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnreadableError(f"expected a label, came {describe_value(value)}")
    if not 0 <= value < MOST_LABELS:
        raise UnreadableError(f"no label is as large or small as {describe_value(value)}")
    return value


def _look_up_class(name: str, names: tuple[str, ...]) -> int:
    """Look up the number of a class by its name.

    Raises:
        UnreadableError: the name is not among the names, or no names were given.
    """
    if name in names:
        return names.index(name)
    if names:
        raise UnreadableError(f"{describe_value(name)} is none of the {len(names)} class names")
    # The length is checked first: int() of a very long text takes long, or raises.
    if name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) < MOST_LABELS:
        return int(name)
    raise UnreadableError(f"the class came by name, {describe_value(name)}: give class_names")


def _parse_scores(value: Any, _: RemoteOptions) -> int:
    """Return the first of the classes with the largest score."""
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        (value,) = value
    # A single number is more likely a label than the only score of a model with one class.
    if not isinstance(value, list) or len(value) < 2:
        raise UnreadableError(f"expected a score for each class, came {describe_value(value)}")
    return _find_best(value)


def _find_best(scores: list[Any]) -> int:
    """Return the place of the first of the largest scores."""
    numbers = [_parse_score(each) for each in scores]
    return numbers.index(max(numbers))


def _parse_score(value: Any) -> float:
    """Parse a score; raise `UnreadableError` unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnreadableError(f"expected a score, came {describe_value(value)}")
    try:
        score = float(value)
    except OverflowError:
        # JSON knows integers of any size; one too large for a double is refused below.
        score = math.inf
    if not math.isfinite(score):
        raise UnreadableError(f"a score is not finite: {describe_value(value)}")
    return score


def _parse_top_k(value: Any, options: RemoteOptions) -> int:
    """Return the label with the largest score.

    Args:
        value: objects that each hold a label and a score, or one object from names to scores.
        options: the class names.
    """
    value = _unwrap_lists(value)
    if isinstance(value, dict) and not _find_first_name(value, _LABEL):
        entries = [{"label": name, "score": score} for name, score in value.items()]
    else:
        entries = value if isinstance(value, list) else [value]
    if not entries or not all(
        isinstance(each, dict) and _find_first_name(each, _LABEL) for each in entries
    ):
        raise UnreadableError(
            f"expected objects with label and score, came {describe_value(value)}"
        )
    best = 0
    if len(entries) > 1:
        best = _find_best(
            [follow_path(each, _find_first_name(each, _SCORE) or "score") for each in entries]
        )
    return _parse_label(entries[best][_find_first_name(entries[best], _LABEL)], options)


def _find_first_name(entry: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of the names that the entry has, or an empty string."""
    return next((name for name in names if name in entry), "")


_FORMS = {
    "auto": _parse_any_form,
    "labels": _parse_label,
    "scores": _parse_scores,
    "top_k": _parse_top_k,
}
