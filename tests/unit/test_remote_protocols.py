"""Each protocol sends what its specification says and reads what comes back."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from countermark.predictors.remote import RemoteOptions, connect
from suspect_server import CLASSES, Seen, Suspects, label_of, labels_of, scores_of, some_images

pytestmark = pytest.mark.usefixtures("quick")
NAMES = tuple(f"class-{number}" for number in range(CLASSES))


def read_picture(content: bytes) -> NDArray[np.uint8]:
    """A picture file as (C, H, W)."""
    with PIL.Image.open(io.BytesIO(content)) as image:
        found = np.asarray(image)
    return found[None] if found.ndim == 2 else found.transpose(2, 0, 1)


def oip(seen: Seen) -> list[NDArray[Any]]:
    (tensor,) = seen.json["inputs"]
    assert tensor.keys() == {"name", "shape", "datatype", "data"}
    return list(np.array(tensor["data"]).reshape(tensor["shape"]))


def oip_answer(data: Any, shape: list[int], datatype: str = "INT64") -> Any:
    tensor = {"name": "predict", "shape": shape, "datatype": datatype, "data": data}
    return {"model_name": "m", "id": "7", "outputs": [tensor]}


def oip_labels(seen: Seen) -> Any:
    assert seen.path == "/v2/models/my model/infer"
    images = oip(seen)
    return oip_answer([label_of(each) for each in images], [len(images), 1])


def oip_scores(seen: Seen) -> Any:
    images = oip(seen)
    flat = [score for each in images for score in scores_of(each)]
    return oip_answer(flat, [len(images), CLASSES], "FP32")


def oip_nested_of_two(seen: Seen) -> Any:
    images = oip(seen)
    answer = oip_answer([scores_of(each) for each in images], [len(images), CLASSES], "FP32")
    other = {"name": "embedding", "shape": [1], "datatype": "FP32", "data": [0.5]}
    return answer | {"outputs": [other, *answer["outputs"]]}


def oip_names(seen: Seen) -> Any:
    images = oip(seen)
    return oip_answer([NAMES[label_of(each)] for each in images], [len(images)], "BYTES")


def tf_labels(seen: Seen) -> Any:
    assert seen.path == "/v1/models/m/versions/3:predict"
    return {"predictions": [label_of(np.array(row)) for row in seen.json["instances"]]}


def tf_named(seen: Seen) -> Any:
    rows = [np.array(row["pixels"]) for row in seen.json["instances"]]
    return {"predictions": [{"classes": label_of(row), "logits": scores_of(row)} for row in rows]}


def mlflow_labels(seen: Seen) -> Any:
    assert seen.path == "/invocations"
    return {"predictions": [[label_of(np.array(row))] for row in seen.json["inputs"]]}


def mlflow_frame(seen: Seen) -> Any:
    rows = seen.json["inputs"]["x"]
    return {"predictions": [{"0": NAMES[label_of(np.array(row))]} for row in rows]}


def image_top_k(seen: Seen) -> Any:
    picture = read_picture(seen.body)
    scores = scores_of(picture)
    return [{"label": NAMES[k], "score": scores[k]} for k in np.argsort(scores)[::-1][:3]]


def image_torchserve(seen: Seen) -> Any:
    assert seen.headers["content-type"] == "image/png"
    assert seen.path == "/predictions/m"
    return dict(zip(NAMES, scores_of(read_picture(seen.body)), strict=True))


def json_images(seen: Seen) -> Any:
    assert seen.json["kind"] == ["png", {"$imagesque": 1}]
    pictures = [read_picture(base64.b64decode(each)) for each in seen.json["data"]]
    return {"model": "x", "out": [{"best": {"class": label_of(each)}} for each in pictures]}


def json_image(seen: Seen) -> Any:
    head, _, encoded = seen.json["messages"][0]["url"].partition(",")
    assert head == "data:image/png;base64"
    return {"result": {"n": label_of(read_picture(base64.b64decode(encoded)))}}


def json_pixels(seen: Seen) -> Any:
    return [scores_of(np.array(each)) for each in seen.json["x"]]


def options(protocol: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    return protocol, fields


TF_NAMED = {"model": "m", "input_name": "pixels"}
IMAGE = {"class_names": NAMES}
DATA_URL = '{"messages": [{"url": "data:image/png;base64,$image"}]}'
CASES: list[tuple[Callable[[Seen], Any], str, tuple[str, dict[str, Any]]]] = [
    (oip_labels, "", options("oip", model="my model")),
    (oip_labels, "/v2/models/my%20model", options("oip", answer="labels")),
    (oip_scores, "/v2/models/m/infer", options("oip", answer="scores")),
    (oip_scores, "/v2", options("oip", model="m", batch=1)),
    (oip_nested_of_two, "", options("oip", model="m", answer_at="predict")),
    (oip_names, "", options("oip", model="m", class_names=NAMES)),
    (tf_labels, "/v1/models/m/versions/3", options("tf_serving")),
    (tf_named, "", options("tf_serving", **TF_NAMED, answer_at="predictions.*.logits")),
    (tf_named, "", options("tf_serving", **TF_NAMED, answer_at="predictions.*.classes")),
    (tf_named, "", options("tf_serving", **TF_NAMED, batch=1, answer_at="predictions.0.logits")),
    (mlflow_labels, "", options("mlflow")),
    (mlflow_labels, "/invocations", options("mlflow", answer_at="predictions")),
    (mlflow_frame, "", options("mlflow", input_name="x", class_names=NAMES)),
    (image_top_k, "/classify", options("image", **IMAGE)),
    (image_top_k, "/classify", options("image", **IMAGE, answer="top_k")),
    (image_top_k, "/classify", options("image", **IMAGE, answer="labels", answer_at="0.label")),
    (image_torchserve, "/predictions/m", options("image", **IMAGE)),
    (
        json_images,
        "",
        options(
            "json",
            template='{"data": "$images", "kind": ["png", {"$imagesque": 1}]}',
            answer_at="out.*.best",
        ),
    ),
    (json_image, "", options("json", template=DATA_URL)),
    (json_pixels, "", options("json", template='{"x": "$pixels"}')),
]  # fmt: skip


@pytest.mark.parametrize(("suspect", "path", "asked"), CASES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_labels_come_back(
    suspects: Suspects,
    suspect: Callable[[Seen], Any],
    path: str,
    asked: tuple[str, dict[str, Any]],
    channels: int,
) -> None:
    images = some_images(5, channels)
    fields = {"batch": 2} | asked[1] if "image" not in str(asked) else asked[1]
    with connect(suspects.answer(suspect) + path, RemoteOptions(asked[0], **fields)) as endpoint:
        labels = endpoint(images)
    assert labels.tolist() == labels_of(images), [each.why for each in endpoint.transcript.entries]
    assert labels.dtype == np.int64
    replayed = endpoint.transcript.make_replay()
    assert replayed(images[::-1]).tolist() == labels_of(images[::-1])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [[[[0, 255]], [[51, 102]]]]),
        ({"layout": "nhwc"}, [[[[0, 51], [255, 102]]]]),
        ({"pixels": "unit"}, [[[[0.0, 1.0]], [[0.2, 0.4]]]]),
        (
            {"pixels": "normalised", "mean": (0.5, 0.0), "std": (0.5, 3.0), "layout": "nhwc"},
            [[[[-1.0, 0.0666667], [1.0, 0.1333333]]]],
        ),
    ],
)
def test_numbers_have_the_layout_and_scale_that_is_asked_for(
    suspects: Suspects, fields: dict[str, Any], expected: Any
) -> None:
    sent: list[Any] = []

    def suspect(seen: Seen) -> Any:
        sent.append(seen.json["instances"])
        return {"predictions": [3]}

    images = np.array([[[[0, 255]], [[51, 102]]]], dtype=np.uint8)
    asked = RemoteOptions("tf_serving", model="m", **fields)
    with connect(suspects.answer(suspect), asked) as endpoint:
        assert endpoint(images).tolist() == [3]
    assert sent == [expected]


def test_numbers_are_as_exact_as_float32(suspects: Suspects) -> None:
    sent: list[Any] = []

    def suspect(seen: Seen) -> Any:
        sent.append(seen.json["inputs"][0])
        return oip_answer([1], [1])

    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    asked = RemoteOptions("oip", model="m", pixels="unit", input_name="x")
    with connect(suspects.answer(suspect), asked) as endpoint:
        endpoint(images)
    (tensor,) = sent
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("x", "FP32", [1, 1, 16, 16])
    exact = np.arange(256, dtype=np.float32) / np.float32(255)
    assert np.abs(np.float32(tensor["data"]) - exact).max() <= np.spacing(np.float32(1))


def test_a_jpeg_of_the_quality_that_is_asked_for(suspects: Suspects) -> None:
    sizes: list[int] = []

    def suspect(seen: Seen) -> Any:
        assert seen.headers["content-type"] == "image/jpeg"
        assert read_picture(seen.body).shape == (3, 64, 64)
        sizes.append(len(seen.body))
        return 3

    images = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64), dtype=np.uint8)
    for quality in (95, 10):
        asked = RemoteOptions("image", picture="jpeg", jpeg_quality=quality)
        with connect(suspects.answer(suspect), asked) as endpoint:
            assert endpoint(images).tolist() == [3]
    assert sizes[0] > 2 * sizes[1]


def test_labels_of_classes_in_another_order_pass_as_they_come(suspects: Suspects) -> None:
    order = np.random.default_rng(1).permutation(CLASSES)

    def suspect(seen: Seen) -> Any:
        return {"predictions": [int(order[label_of(np.array(row))]) for row in seen.json["inputs"]]}

    images = some_images(6)
    with connect(suspects.answer(suspect), RemoteOptions("mlflow")) as endpoint:
        assert endpoint(images).tolist() == [order[each] for each in labels_of(images)]


def test_batches_are_as_large_as_they_may_be_and_the_last_is_what_remains(
    suspects: Suspects,
) -> None:
    sizes: list[int] = []

    def suspect(seen: Seen) -> Any:
        sizes.append(len(seen.json["inputs"]))
        return {"predictions": [0] * sizes[-1]}

    url = suspects.answer(suspect)
    for batch in (3, None):
        with connect(url, RemoteOptions("mlflow", batch=batch)) as endpoint:
            assert endpoint(some_images(33)).tolist() == [0] * 33
            assert endpoint(some_images(0)).shape == (0,)
    assert sizes == [3] * 11 + [32, 1]


def test_the_body_of_a_template_is_its_text(suspects: Suspects) -> None:
    bodies: list[str] = []

    def suspect(seen: Seen) -> Any:
        bodies.append(seen.body.decode())
        return 4

    text = '{ "a" : "$pixels", "price": "$5", "b": 1.50 }'
    asked = RemoteOptions("json", template=text, batch=1)
    with connect(suspects.answer(suspect), asked) as endpoint:
        assert endpoint(np.array([[[[7]]]], dtype=np.uint8)).tolist() == [4]
    assert bodies == ['{ "a" : [[[[7]]]], "price": "$5", "b": 1.50 }']
    assert json.loads(bodies[0])["price"] == "$5"
