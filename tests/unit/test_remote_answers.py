"""Labels out of answers: the forms that are known, and everything else, which is no label."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keys import mutated

from countermark.predictors.remote import RemoteOptions
from countermark.predictors.remote.answers import read_answer

NAMES = ("cat", "dog", "7")


def read(said: Any, count: int = 1, /, **fields: Any) -> list[int | str | None]:
    """The labels in an answer, of the image protocol unless said; a reason where there is none."""
    asked = RemoteOptions(**({"protocol": "image"} | fields))
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    return [
        each.why if each.label is None else each.label for each in read_answer(body, count, asked)
    ]


LABELS: list[tuple[Any, dict[str, Any], int]] = [
    (3, {}, 3),
    (3.0, {}, 3),
    ([[3]], {}, 3),
    (2**31 - 1, {}, 2**31 - 1),
    ("12", {}, 12),
    ({"label": 3, "score": 0.9}, {}, 3),
    ({"prediction": {"class": "5"}}, {}, 5),
    ({"index": 4, "name": "x"}, {}, 4),
    ([0.1, 0.7, 0.2], {}, 1),
    ([[-1, -3, -1]], {}, 0),
    ({"scores": [0, 1, 0]}, {}, 1),
    ([{"label": 8, "score": 0.2}, {"label": 9, "score": 0.7}], {}, 9),
    ({"out": [{"class": "1", "confidence": 0.6}, {"class": "2", "confidence": 0}]}, {}, 1),
    ({"3": 0.2, "1": 0.3}, {}, 1),
    ("dog", {"class_names": NAMES}, 1),
    ("7", {"class_names": NAMES}, 2),
    (11, {"class_names": NAMES}, 11),
    ({"cat": 0.1, "dog": 0.9}, {"class_names": NAMES}, 1),
    ({"a": {"b": [9, {"c": 6}]}}, {"answer_at": "a.b.1.c"}, 6),
    ({"a": 1, "b": 2}, {"answer": "labels", "answer_at": "b"}, 2),
    ({"a": [[0.5, 0.1]], "b": 2}, {"answer": "scores", "answer_at": "a"}, 0),
    ([{"label": 1}], {"answer": "top_k"}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "fields", "label"), LABELS)
def test_a_label_is_found(answer: Any, fields: dict[str, Any], label: int) -> None:
    assert read(answer, **fields) == [label]


NONE: list[tuple[Any, dict[str, Any], str]] = [
    (-1, {}, "no label is as large or small as -1"),
    (2**31, {}, "no label is as large or small as 2147483648"),
    (1e300, {}, "no label is as large or small as a number beyond 64 bits"),
    (b"9" * 4000, {}, "a number beyond 64 bits"),
    (b"9" * 5000, {}, "the answer is no JSON: Exceeds the limit (4300"),
    (0.97, {}, "expected a label, came 0.97"),
    (True, {}, "expected a label, came True"),
    (None, {}, "expected a label, came None"),
    (math.nan, {}, "expected a label, came nan"),
    (math.inf, {}, "expected a label, came inf"),
    ("cat", {}, "the class came by name, 'cat': give class_names"),
    ("٣", {}, "the class came by name"),
    ("9" * 10, {}, "the class came by name"),
    ("cow", {"class_names": NAMES}, "'cow' is none of the 3 class names"),
    ("\x1b[2J\n" * 50, {"class_names": NAMES}, "is none of the 3 class names"),
    ([], {}, "expected a score for each class, came a list of 0"),
    ({}, {}, "expected objects with label and score, came an object of 0 field(s)"),
    ([0.1, math.nan], {}, "a score is not finite: nan"),
    ([0.1, math.inf], {}, "a score is not finite: inf"),
    (b"[0.1, 1e999]", {}, "a score is not finite: inf"),
    ([1, 10**4000], {}, "a score is not finite: a number beyond 64 bits"),
    ([0.1, "0.9"], {}, "expected a score, came '0.9'"),
    ([0.1, True], {}, "expected a score, came True"),
    (5, {"answer": "scores"}, "expected a score for each class, came 5"),
    ([0.5], {"answer": "scores"}, "expected a score for each class, came a list of 1"),
    (5, {"answer": "top_k"}, "expected objects with label and score, came 5"),
    ([{"label": 1}, {"label": 2}], {}, "there is no 'score' in an object of 1 field(s)"),
    ([{"label": 1, "score": None}, {"label": 2, "score": 1}], {}, "expected a score, came None"),
    ([{"score": 1}, {"score": 2}], {}, "expected objects with label and score"),
    ({"a": 1}, {"answer_at": "b"}, "there is no 'b' in an object of 1 field(s)"),
    ([1, 2], {"answer_at": "2"}, "there is no '2' in a list of 2"),
    ([1, 2], {"answer_at": "9" * 900}, "there is no '999"),
    (b"", {}, "the answer is no JSON: Expecting value"),
    (b"<html>", {}, "the answer is no JSON: Expecting value"),
    (b"\xff\xfe", {}, "the answer is no JSON: 'utf-8' codec"),
    (b'{"a": 1, "a": 2}', {}, "the answer is no JSON: the name 'a' stands twice"),
    (b"[" * 100_000, {}, "the answer is no JSON: it nests too deeply"),
    (b"[" * 900 + b"]" * 900, {}, "expected a score for each class, came a list of 0"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "fields", "why"), NONE, ids=range(len(NONE)))
def test_what_is_no_label_says_why_in_one_short_line(
    answer: Any, fields: dict[str, Any], why: str
) -> None:
    (said,) = read(answer, **fields)
    assert isinstance(said, str)
    assert why in said
    assert said.isprintable()
    assert len(said) <= 160


def test_many_images_each_have_their_own() -> None:
    assert read({"predictions": [1, math.nan, "x", 4]}, 4, protocol="mlflow") == [
        1, "expected a label, came nan", "the class came by name, 'x': give class_names", 4,
    ]  # fmt: skip
    paths = {"protocol": "tf_serving", "answer_at": "predictions.*.y"}
    assert read({"predictions": [{"y": 1}, {"z": 2}, 3]}, 3, **paths) == [
        1, "there is no 'y' in an object of 1 field(s)", "there is no 'y' in 3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"predictions": [1, 2]}, "expected a list of 3 answer(s), came a list of 2"),
        ({"predictions": [1, 2, 3, 4]}, "expected a list of 3 answer(s), came a list of 4"),
        ({"predictions": 1}, "expected a list of 3 answer(s), came 1"),
        ({"error": "no such model"}, "there is no 'predictions' in an object of 1 field(s)"),
        ([1, 2, 3], "there is no 'predictions' in a list of 3"),
        (None, "there is no 'predictions' in None"),
    ],
)
def test_a_wrong_number_of_answers_is_none(answer: Any, why: str) -> None:
    assert read(answer, 3, protocol="mlflow") == [why] * 3


def tensor(data: Any, shape: Any, name: Any = "y") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": "FP32", "data": data}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"outputs": [tensor([1, 2], [2])]}, [1, 2]),
        ({"outputs": [tensor([[1], [2]], [2, 1])]}, [1, 2]),
        ({"outputs": [tensor([0, 1, 1, 0], [2, 2])]}, [1, 0]),
        ({"outputs": [tensor([[0, 1], [1, 0]], [2, 2])]}, [1, 0]),
        ({"outputs": []}, "0 named outputs came: say which is meant with answer_at"),
        ({"outputs": [tensor([1, 2], [2], n) for n in "ab"]}, "2 named outputs came"),
        ({"outputs": [tensor([1, 2], [2], 5)]}, "0 named outputs came"),
        ({"outputs": {"y": 1}}, "0 named outputs came"),
        ({"outputs": [tensor([1, 2, 3], [3])]}, "expected answers for 2 image(s), came 3"),
        ({"outputs": [tensor([1, 2, 3], [2, 2])]}, "expected 4 number(s), came a list of 3"),
        ({"outputs": [tensor("AAAA", [2, 2])]}, "expected 4 number(s), came 'AAAA'"),
        ({"outputs": [tensor([], [2, 0])]}, "the output has no shape, but a list of 2"),
        ({"outputs": [tensor([1, 2], [])]}, "the output has no shape, but a list of 0"),
        ({"outputs": [tensor([1, 2], [2, -1])]}, "the output has no shape, but a list of 2"),
        ({"outputs": [tensor([1, 2], [2, True])]}, "the output has no shape"),
        ({"outputs": [tensor([1, 2], [2] + [2**30] * 7)]}, [1, 2]),
        ({"outputs": [tensor([1, 2], [2] * 9)]}, "the output has no shape, but a list of 9"),
        ({"outputs": [tensor([1, 2], "2")]}, "the output has no shape, but '2'"),
        ({"outputs": [{"name": "y"}]}, "there is no 'data' in an object of 1 field(s)"),
        ({"error": "x"}, "there is no 'outputs' in an object of 1 field(s)"),
    ],
    ids=range(20),
)
def test_the_tensors_of_the_open_inference_protocol(answer: Any, said: Any) -> None:
    found = read(answer, 2, protocol="oip", model="m")
    if isinstance(said, list):
        assert found == said
    else:
        assert len(set(found)) == 1
        assert str(found[0]).startswith(said)


ASKED = [
    RemoteOptions("oip", model="m"),
    RemoteOptions("oip", model="m", answer_at="y"),
    RemoteOptions("tf_serving", model="m", answer="scores"),
    RemoteOptions("tf_serving", model="m", answer_at="predictions.*.y"),
    RemoteOptions("mlflow", class_names=NAMES),
    RemoteOptions("image", answer="top_k"),
    RemoteOptions("image", answer="labels", answer_at="predictions.0.label"),
    RemoteOptions("json", template='"$images"'),
    RemoteOptions("json", template='"$image"', answer_at="out.*"),
]
WORDS = st.sampled_from(
    ["outputs", "predictions", "name", "y", "shape", "data", "label", "class", "score", "cat", "0"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=30,
)


def check(body: bytes, count: int) -> None:
    for asked in ASKED:
        readings = read_answer(body, 1 if asked.needs_single_images else count, asked)
        assert len(readings) == (1 if asked.needs_single_images else count)
        for each in readings:
            assert (each.label is None) != (each.why is None)
            assert each.label is None or 0 <= each.label < 2**31
            assert each.why is None or (each.why.isprintable() and 0 < len(each.why) <= 160)


@settings(max_examples=150, deadline=None)
@given(VALUES, st.integers(1, 4))
@example({"outputs": [tensor([1, 2], [2, 1, 1])]}, 2)
def test_no_document_raises(document: Any, count: int) -> None:
    check(json.dumps(document).encode(), count)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 3))
def test_no_bytes_raise(body: bytes, count: int) -> None:
    check(body, count)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 8))
def test_no_damaged_answer_raises(drawn: random.Random, changes: int) -> None:
    rows = [{"label": "cat", "score": 0.5}, {"label": "dog", "score": 0.25}]
    whole = {"outputs": [tensor([1, 2], [2])], "predictions": [rows, [0.1, 0.9]], "out": [1]}
    check(mutated(json.dumps(whole).encode(), drawn, changes), 2)
