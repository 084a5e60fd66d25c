"""Options of a remote suspect: protocol, form of images and answers, limits on time and cost."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    ConfigDict,
    Field,
    PositiveFloat,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from countermark.errors import ConfigError

ProtocolName = Literal["oip", "tf_serving", "mlflow", "image", "json"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1)]

MOST_IMAGES = 50_000
"""No budget is larger: the transcript of one is a file that can still be read whole."""

_BATCH = 32
PLACE = re.compile(r'"\$(?:images|pixels)"|\$image\b')
"""A place in a template: a string that is replaced whole, or the part of one."""


@dataclass(frozen=True)
class RemoteOptions:
    """Options for asking a remote suspect; every field is checked, alone and against the others.

    Attributes:
        protocol: oip (Open Inference Protocol v2), tf_serving (v1 `:predict`), mlflow
            (`/invocations`), image (one image file a POST), json (a template of your own).
        model: name of the model, if the url of oip or tf_serving does not hold it.
        input_name, datatype: of the input tensor; oip: "input-0", UINT8 or FP32 by default.
        layout, pixels: how an image becomes numbers: their order and scale; `normalised` is
            (x / 255 − mean) / std with one `mean` and `std` a channel.
        picture, jpeg_quality: how an image becomes a file, for image and for "$image", "$images".
        answer: form of the answer for an image: labels, scores, top_k, or recognised from the
            value (auto).
        answer_at: path of the answer, as `predictions.0.scores`; `*` stands for each image of a
            request. For oip the name of the output tensor.
        class_names: in the order of the classes, for services that answer with names.
        template: the JSON text of json, with "$image", "$images" or "$pixels" in it.
        batch: images a request, 32 by default; always 1 for image and "$image".
        budget: images in all. rate: requests a second. largest_answer: bytes.
        timeout: seconds a request. deadline: seconds for all requests. retries: after a failure.

    Raises:
        ConfigError: a field has a wrong value, or two fields contradict each other.
    """

    protocol: ProtocolName
    model: Name | None = None
    input_name: Name | None = None
    datatype: Literal["UINT8", "INT32", "INT64", "FP16", "FP32", "FP64"] | None = None
    layout: Literal["nchw", "nhwc"] = "nchw"
    pixels: Literal["uint8", "unit", "normalised"] = "uint8"
    mean: tuple[float, ...] = ()
    std: tuple[PositiveFloat, ...] = ()
    picture: Literal["png", "jpeg"] = "png"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    answer: Literal["auto", "labels", "scores", "top_k"] = "auto"
    answer_at: Name | None = None
    class_names: tuple[str, ...] = ()
    template: str | None = field(default=None, repr=False)  # may hold a service's secret
    batch: Count | None = None
    budget: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 1000
    rate: PositiveFloat | None = None
    timeout: PositiveFloat = 10.0
    deadline: PositiveFloat = 300.0
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    largest_answer: Annotated[int, Field(ge=1, le=1 << 30)] = 8 << 20

    def __post_init__(self) -> None:
        """Check each field by its type, then all fields together."""
        for name, adapter in _make_adapters().items():
            value = getattr(self, name)
            try:
                # The class is frozen; validation may convert a value, such as a list to a tuple.
                object.__setattr__(self, name, adapter.validate_python(value))
            except ValidationError as error:
                what = "; ".join(dict.fromkeys(part["msg"] for part in error.errors()))
                # An error message must not repeat a template, which may hold a secret.
                came = "not that" if name == "template" else repr(value)
                raise ConfigError(f"remote option {name} is {came}: {what}") from None
        if wrong := _find_contradictions(self):
            raise ConfigError(f"remote options of protocol {self.protocol}: {wrong[0]}")

    @property
    def template_placeholders(self) -> frozenset[str]:
        """The placeholders in the template: some of "$image", "$images" and "$pixels"."""
        return frozenset(each.strip('"') for each in PLACE.findall(self.template or ""))

    @property
    def needs_single_images(self) -> bool:
        """True if a request can carry one image only."""
        return self.protocol == "image" or "$image" in self.template_placeholders

    @property
    def images_per_request(self) -> int:
        """The largest number of images in one request."""
        return 1 if self.needs_single_images else self.batch or _BATCH

    @property
    def needs_image_files(self) -> bool:
        """True if images are sent as PNG or JPEG, which takes 1 or 3 channels and Pillow."""
        return self.protocol == "image" or bool(self.template_placeholders & {"$image", "$images"})

    def to_public_json(self) -> dict[str, Any]:
        """Return all fields as JSON values for a transcript.

        The template is replaced by its SHA-256, since it may hold a service's secret.
        """
        shown = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.template is not None:
            shown["template"] = hashlib.sha256(self.template.encode()).hexdigest()
        return {n: list(value) if isinstance(value, tuple) else value for n, value in shown.items()}


@cache
def _make_adapters() -> dict[str, TypeAdapter[Any]]:
    """Return a validator for each field, built once from the type hints."""
    hints = get_type_hints(RemoteOptions, include_extras=True)
    # An infinite deadline or rate would defeat the limits.
    config = ConfigDict(allow_inf_nan=False)
    return {each.name: TypeAdapter(hints[each.name], config=config)
            for each in fields(RemoteOptions)}  # fmt: skip


# Pairs of a test for a contradiction and the message about it.
_RULES: tuple[tuple[Callable[[RemoteOptions], bool], str], ...] = (
    (
        lambda o: o.model is not None and o.protocol not in {"oip", "tf_serving"},
        "model is for oip and tf_serving: leave it out",
    ),
    (
        lambda o: o.input_name is not None and o.protocol in {"image", "json"},
        "input_name is for oip, tf_serving and mlflow: leave it out",
    ),
    (
        lambda o: o.datatype is not None and o.protocol != "oip",
        "datatype is for oip: leave it out",
    ),
    (
        # Scaled pixels are small fractions, which whole numbers would round away.
        lambda o: o.pixels != "uint8" and (o.datatype or "FP32")[0] in "UI",
        "whole-number datatypes hold pixels = 'uint8' only: use FP32",
    ),
    (
        lambda o: o.pixels == "normalised" and not len(o.mean) == len(o.std) >= 1,
        "pixels = 'normalised' takes mean and std, one number a channel: give both",
    ),
    (
        lambda o: o.pixels != "normalised" and bool(o.mean or o.std),
        "mean and std are for pixels = 'normalised': leave them out",
    ),
    (
        lambda o: len(set(o.class_names)) != len(o.class_names),
        "two classes of class_names have one name: give each its own",
    ),
    (
        lambda o: o.protocol != "oip" and not _is_path(o.answer_at or "*"),
        "answer_at is no path: expected names and numbers with dots between, and * once at most",
    ),
    (
        lambda o: o.needs_single_images and o.batch not in {None, 1},
        "a request carries one image: leave batch out",
    ),
)


def _find_contradictions(options: RemoteOptions) -> list[str]:
    """Return the contradictions between fields, each with its remedy."""
    broken = [said for is_broken, said in _RULES if is_broken(options)]
    # The template comes first: the number of images in a request depends on it.
    return _find_template_errors(options) + broken


def _is_path(path: str) -> bool:
    """Return true if a text is a path of an answer, with at most one `*`."""
    steps = path.split(".")
    return "" not in steps and steps.count("*") <= 1


def _find_template_errors(options: RemoteOptions) -> list[str]:
    """Return the mistakes in the template, each with its remedy."""
    if (options.template is None) == (options.protocol == "json"):
        return ["protocol json takes a template, the others take none"]
    if options.template is None:
        return []
    try:
        json.loads(options.template)
        json.loads(PLACE.sub("0", options.template))  # as when filled: a placeholder is no name
    except (ValueError, RecursionError):
        return ['the template is no JSON text: write one such as {"data": "$images"}']
    if not options.template_placeholders:
        return ['the template has no "$image", "$images" or "$pixels" for the images']
    return []
