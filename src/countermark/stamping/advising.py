"""Which tensors, bits and margin a checkpoint should be stamped with, and what to expect of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from statistics import NormalDist
from typing import Any

import numpy as np

from countermark.errors import ConfigError
from countermark.schemes.stamp import Stamp
from countermark.stamping.forecast import Rows, forecast
from countermark.weights import Weights
from countermark.weights.dtypes import FLOATS

WHOLE, READ, MOST = 0.01, 0.0275, 0.03
"""Relative changes: aimed at over whole tensors, aimed at where values are read, tolerated there.

The sum of squares is T·(c² + 1) spreads, however many values share it: the margin is chosen by what
the tensors bear as a whole, and the values that are read by how much each of them may change.
"""

BITS, FEWER_BITS = 256, 128
MARGIN, LEAST_MARGIN = 5.0, 2.0
_LEAST_VALUES = 1 << 12  # of a tensor, so that a mark lies in more than a few rows
_SAMPLE = 1 << 20  # values that a forecast looks at
_REPLACED = re.compile(r"embed|wte|wpe|lm_head|shared|classifier|position", re.IGNORECASE)
"""Names of tensors whose rows are replaced most easily: tables of words, output heads."""


@dataclass(frozen=True)
class Advice:
    """How to stamp a checkpoint, and what to expect.

    Attributes:
        scheme: the configuration, with the tensors by name.
        tensors: their shapes.
        read: how many values are read in all.
        change: the expected relative change of these values, root of summed squares.
        whole: that of the tensors as wholes.
        rates: the expected bit error rate after each of the usual changes.
    """

    scheme: Stamp
    tensors: Mapping[str, tuple[int, ...]]
    read: int
    change: float
    whole: float
    rates: Mapping[str, float]

    @property
    def gentle(self) -> bool:
        """Whether the change is one that is tolerated unseen."""
        return self.change <= MOST

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "fields": self.scheme.to_fields(),
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "values_read": self.read,
            "expected_change": self.change,
            "expected_change_of_tensors": self.whole,
            "forecast": dict(self.rates),
        }


def advise(weights: Weights, fields: Mapping[str, Any] | None = None) -> Advice:
    """Choose tensors, bits and margin for a checkpoint.

    Args:
        weights: the checkpoint, open.
        fields: fields of the scheme that are settled already.

    Raises:
        ConfigError: a field that does not exist, or a checkpoint without floating weights.
        CapacityError: more bits than values.
    """
    given = dict(fields or {})
    shapes = {name: info.shape for name, info in weights.tensors.items() if info.dtype in FLOATS}
    tensors = _chosen(shapes, given.pop("layer", None))
    scheme = _sized(Stamp.from_fields({**given, "layer": list(tensors)}), tensors, given)
    scheme.require_capacity(tensors)
    read = scheme.capacity(tensors, None)
    rates = forecast(
        _sample(weights, scheme, tensors), margin=scheme.margin, served=read / scheme.bits
    )
    whole = expected_change(scheme, sum(map(prod, tensors.values())))
    return Advice(scheme, tensors, read, expected_change(scheme, read), whole, rates)


def expected_change(scheme: Stamp, read: int) -> float:
    """√(T·E[max(0, c − z)²] / N) for z ~ N(0, 1): what a margin costs over N values."""
    c, normal = scheme.margin, NormalDist()
    squares = (c * c + 1) * normal.cdf(c) + c * normal.pdf(c)
    return math.sqrt(scheme.bits * squares / read)


def _chosen(
    shapes: Mapping[str, tuple[int, ...]], layer: list[str] | str | None
) -> dict[str, tuple[int, ...]]:
    """The named tensors, or all that are large matrices and no tables or heads."""
    if layer is not None:
        return Stamp(layer=layer if isinstance(layer, str) else tuple(layer)).choose(shapes)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    large = {name: shape for name, shape in matrices.items() if prod(shape) >= _LEAST_VALUES}
    inner = {name: shape for name, shape in large.items() if not _REPLACED.search(name)}
    if not (found := inner or large or matrices):
        raise ConfigError(
            "the checkpoint has no floating tensor of two dimensions or more: "
            "nothing can carry a mark; name a tensor with --layer"
        )
    return found


def _sized(
    scheme: Stamp, tensors: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]
) -> Stamp:
    """The scheme with what was not given chosen by how many weights there are."""
    sizes = [prod(shape) for shape in tensors.values()]
    for bits in (scheme.bits,) if "bits" in given else (BITS, FEWER_BITS):
        margin = scheme.margin if "margin" in given else _margin(bits, sum(sizes))
        scheme = replace(scheme, bits=bits, margin=margin)
        if expected_change(scheme, sum(sizes)) <= MOST:
            break
    if "values" not in given:
        most = _enough_of_each(sizes, (expected_change(scheme, 1) / READ) ** 2)
        scheme = replace(scheme, values=most)
    return scheme


def _margin(bits: int, values: int) -> float:
    """The margin, between the least and the largest, that changes whole tensors as aimed at."""
    affordable = WHOLE**2 * values / bits - 1  # c², since the change is √(T(c² + 1)/N)
    return round(min(MARGIN, max(LEAST_MARGIN, math.sqrt(max(0.0, affordable)))), 2)


def _enough_of_each(sizes: list[int], enough: float) -> int | None:
    """How many values of each tensor, as even as can be, are enough; None where all are needed."""
    left = enough
    for at, size in enumerate(ordered := sorted(sizes)):
        share = left / (len(ordered) - at)
        if size >= share:
            return max(1, math.ceil(share))
        left -= size
    return None


def _sample(
    weights: Weights, scheme: Stamp, tensors: Mapping[str, tuple[int, ...]]
) -> Iterator[Rows]:
    """The first values of each tensor as rows, in units of their spread."""
    each = max(_LEAST_VALUES, _SAMPLE // len(tensors))
    for name, shape in tensors.items():
        count = min(scheme.read_of(shape), each)
        part = weights.read_part(name, 0, count).astype(np.float64)
        width = shape[-1] if shape[-1] <= count else count
        rows = part[: count // width * width].reshape(-1, width)
        if rows.any():
            flat = rows.reshape(-1)
            yield rows / scheme.scales(flat, shape, 0).between(0, len(flat)).reshape(rows.shape)
