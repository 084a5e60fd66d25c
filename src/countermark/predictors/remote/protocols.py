"""The protocols of prediction services: how to write a request and how to split its answer.

oip         Open Inference Protocol v2, POST v2/models/NAME/infer
tf_serving  TensorFlow Serving v1, row format, POST v1/models/NAME:predict
mlflow      MLflow scoring server, POST /invocations
image       one PNG or JPEG a POST
json        a template of the caller's own
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from countermark.predictors.base import Images
from countermark.predictors.remote.fields import (
    UnreadableError,
    describe_value,
    follow_path,
    require_list,
)
from countermark.predictors.remote.images import convert_pixels, encode_image
from countermark.predictors.remote.options import PLACE, ProtocolName, RemoteOptions

_DIMENSIONS = 8  # of an output at most: a product of a million sizes would take for ever


@dataclass(frozen=True)
class ServiceProtocol:
    """A protocol: how to write a request, and how to split its answer.

    Attributes:
        body: images (n, C, H, W) -> the body of one request.
        parts: the document of an answer to n images -> each image's part; raises UnreadableError
            if there are no n parts.
        answer_at: path of the answers if the options do not give one.
    """

    body: Callable[[Images, RemoteOptions], bytes]
    parts: Callable[[Any, int, RemoteOptions], list[Any]]
    answer_at: str = ""


def choose_content_type(options: RemoteOptions) -> str:
    """Return the media type of a request's body."""
    return f"image/{options.picture}" if options.protocol == "image" else "application/json"


def split_answer_path(options: RemoteOptions) -> tuple[str | None, str]:
    """Return the path from the document to the list of answers, and from one answer to its value.

    The first path is None if no list is sought, because a request carries one image and the path of
    the answer has no `*`.
    """
    if options.protocol == "oip":
        return None, ""
    path = options.answer_at or PROTOCOLS[options.protocol].answer_at
    if options.images_per_request > 1 and "*" not in path.split("."):
        path += ".*"
    before, star, after = f".{path}.".partition(".*.")
    return (before, after) if star else (None, path)


def _encode_json(document: Any) -> bytes:
    """Encode a document as compact JSON."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def _write_oip_body(images: Images, options: RemoteOptions) -> bytes:
    """Write a request of the Open Inference Protocol: one input tensor, its data flat."""
    numbers = convert_pixels(images, options)
    tensor = {
        "name": options.input_name or "input-0",
        "shape": list(numbers.shape),
        "datatype": options.datatype or ("UINT8" if options.pixels == "uint8" else "FP32"),
        "data": numbers.ravel().tolist(),
    }
    return _encode_json({"inputs": [tensor]})


def _split_oip_answer(document: Any, count: int, options: RemoteOptions) -> list[Any]:
    """Split an answer of the Open Inference Protocol.

    Raises:
        UnreadableError: the output tensor is missing, ambiguous or of another size.
    """
    tensors = follow_path(document, "outputs")
    named = {
        each["name"]: each
        for each in (tensors if isinstance(tensors, list) else [])
        # Outputs without a name are dropped: they cannot be chosen, and a name that is a list would
        # raise.
        if isinstance(each, dict) and isinstance(each.get("name"), str)
    }
    if options.answer_at is None and len(named) != 1:
        raise UnreadableError(f"{len(named)} named outputs came: say which is meant with answer_at")
    tensor = named.get(options.answer_at) if options.answer_at else next(iter(named.values()))
    if tensor is None:
        raise UnreadableError(
            f"there is no output {describe_value(options.answer_at)} among {len(named)}"
        )
    return _split_rows(follow_path(tensor, "data"), follow_path(tensor, "shape"), count)


def _split_rows(data: Any, shape: Any, count: int) -> list[Any]:
    """Split the data of a tensor, flat or nested, into one part for each of `count` images.

    Raises:
        UnreadableError: shape and data do not fit together, or are not of `count` images.
    """
    sizes = shape if isinstance(shape, list) and len(shape) <= _DIMENSIONS else []
    # `type` rather than isinstance, because `True` is an integer too. The bounds keep the product
    # of the sizes small.
    if not sizes or any(type(each) is not int or not 1 <= each < 1 << 31 for each in sizes):
        raise UnreadableError(f"the output has no shape, but {describe_value(shape)}")
    if sizes[0] != count:
        raise UnreadableError(f"expected answers for {count} image(s), came {sizes[0]}")
    width = math.prod(sizes[1:])
    if not isinstance(data, list) or len(data) not in {count, count * width}:
        raise UnreadableError(f"expected {count * width} number(s), came {describe_value(data)}")
    # Data may also be nested, with one list for each image.
    if len(data) == count:
        return data
    return [data[start : start + width] for start in range(0, len(data), width)]


def _write_tf_serving_body(images: Images, options: RemoteOptions) -> bytes:
    """Write a request of TensorFlow Serving: one instance for each image."""
    rows = convert_pixels(images, options).tolist()
    name = options.input_name
    return _encode_json({"instances": rows if name is None else [{name: row} for row in rows]})


def _write_mlflow_body(images: Images, options: RemoteOptions) -> bytes:
    """Write a request of an MLflow server: all images under `inputs`."""
    rows = convert_pixels(images, options).tolist()
    name = options.input_name
    return _encode_json({"inputs": rows if name is None else {name: rows}})


def _write_image_body(images: Images, options: RemoteOptions) -> bytes:
    """Write a request that is one image file."""
    return encode_image(images[0], options)


def _fill_template(images: Images, options: RemoteOptions) -> bytes:
    """Fill the images into the user's template."""
    filled: dict[str, str] = {}
    if options.needs_image_files:
        # Encoded only if the template asks for image files, since encoding is slow.
        files = [base64.b64encode(encode_image(image, options)).decode() for image in images]
        filled = {"$image": files[0], '"$images"': json.dumps(files)}
    if "$pixels" in options.template_placeholders:
        filled['"$pixels"'] = _encode_json(convert_pixels(images, options).tolist()).decode()
    # Replaced in one pass, so that a placeholder inside inserted text stays as it is.
    return PLACE.sub(lambda place: filled[place[0]], options.template or "").encode()


def _split_answer(document: Any, count: int, options: RemoteOptions) -> list[Any]:
    """Split an answer at the path that the options give."""
    before, _ = split_answer_path(options)
    return [document] if before is None else require_list(follow_path(document, before), count)


PROTOCOLS: Mapping[ProtocolName, ServiceProtocol] = {
    "oip": ServiceProtocol(_write_oip_body, _split_oip_answer),
    "tf_serving": ServiceProtocol(_write_tf_serving_body, _split_answer, "predictions.*"),
    "mlflow": ServiceProtocol(_write_mlflow_body, _split_answer, "predictions.*"),
    "image": ServiceProtocol(_write_image_body, _split_answer),
    "json": ServiceProtocol(_fill_template, _split_answer),
}
