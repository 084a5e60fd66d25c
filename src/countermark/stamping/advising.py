"""Choice of tensors, bits and margin for the stamp of a checkpoint, and their expected effects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from statistics import NormalDist
from typing import Any

import numpy as np

from countermark.checkpoints import Weights
from countermark.schemes.stamp.scheme import Stamp
from countermark.stamping.candidates import LEAST_VALUES, Candidates
from countermark.stamping.forecast import Rows, forecast_error_rates

WHOLE, READ, MOST = 0.01, 0.0275, 0.03
"""Relative changes: target over whole tensors, target over the read values, most tolerated there.

The summed square of the change is T·(c² + 1) squared spreads, however many values share it. The
margin follows from the target for whole tensors, the number of read values from their target.
"""

# 128 bits are the way out for small models, where 256 bits would change the weights too much.
BITS, FEWER_BITS = 256, 128
MARGIN, LEAST_MARGIN = 5.0, 2.0
_SAMPLE = 1 << 20  # values in the sample of a forecast


@dataclass(frozen=True)
class Advice:
    """How to stamp a checkpoint, and the expected effects.

    Attributes:
        scheme: the configuration, with the tensors by name.
        tensors: shapes of these tensors by name.
        read: number of values that are read in all tensors together.
        change: expected relative change of the read values, as a root of summed squares.
        whole: expected relative change of the whole tensors.
        rates: expected bit error rate after each of the usual changes of weights.
        weak_place: says that only embeddings and output heads carry the mark, because the layers
            are stored as codes; empty otherwise.
    """

    scheme: Stamp
    tensors: Mapping[str, tuple[int, ...]]
    read: int
    change: float
    whole: float
    rates: Mapping[str, float]
    weak_place: str = ""

    @property
    def is_gentle(self) -> bool:
        """Whether the expected change of the read values is tolerated."""
        return self.change <= MOST

    def to_json(self) -> dict[str, Any]:
        """Return the advice as JSON values."""
        return {
            "fields": self.scheme.to_fields(),
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "values_read": self.read,
            "expected_change": self.change,
            "expected_change_of_tensors": self.whole,
            "forecast": dict(self.rates),
            "weak_place": self.weak_place,
        }


def advise(weights: Weights, fields: Mapping[str, Any] | None = None) -> Advice:
    """Choose tensors, bits and margin for a checkpoint.

    Args:
        weights: the checkpoint, open.
        fields: fields of the scheme that the caller has chosen already.

    Raises:
        ConfigError: a field does not exist, or the checkpoint has no floating-point weights.
        CapacityError: the scheme has more bits than there are values.
    """
    given = dict(fields or {})
    candidates = Candidates.from_weights(weights)
    tensors = candidates.choose_tensors(given.pop("layer", None))
    scheme = _fill_parameters(Stamp.from_fields({**given, "layer": list(tensors)}), tensors, given)
    scheme.require_capacity(tensors)
    read = scheme.capacity(tensors, None)
    # A sample suffices: the forecast needs moments of the distribution only.
    rates = forecast_error_rates(
        _sample_rows(weights, scheme, tensors), margin=scheme.margin, served=read / scheme.bits
    )
    whole = compute_expected_change(scheme, sum(map(prod, tensors.values())))
    change = compute_expected_change(scheme, read)
    weak_place = candidates.describe_weak_place(tensors)
    return Advice(scheme, tensors, read, change, whole, rates, weak_place)


def compute_expected_change(scheme: Stamp, read: int) -> float:
    """Return √(T·E[max(0, c − z)²] / N) for z ~ N(0, 1): the relative change of N values.

    T is the number of bits, c the margin and N = `read` the number of values. A bit whose reading z
    without the mark exceeds c needs no change.
    """
    c, normal = scheme.margin, NormalDist()
    # E[max(0, c − z)²] = (c² + 1)·Φ(c) + c·φ(c) for standard normal z.
    squares = (c * c + 1) * normal.cdf(c) + c * normal.pdf(c)
    return math.sqrt(scheme.bits * squares / read)


def _fill_parameters(
    scheme: Stamp, tensors: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]
) -> Stamp:
    """Return the scheme with the missing fields chosen by the sizes of the tensors."""
    sizes = [prod(shape) for shape in tensors.values()]
    for bits in (scheme.bits,) if "bits" in given else (BITS, FEWER_BITS):
        margin = scheme.margin if "margin" in given else _choose_margin(bits, sum(sizes))
        scheme = replace(scheme, bits=bits, margin=margin)
        if compute_expected_change(scheme, sum(sizes)) <= MOST:
            break
    # (expected_change for a single value / READ)² is the number of values that meets the target
    # READ.
    if "values" not in given:
        most = _count_values_per_tensor(sizes, (compute_expected_change(scheme, 1) / READ) ** 2)
        scheme = replace(scheme, values=most)
    return scheme


def _choose_margin(bits: int, values: int) -> float:
    """Return the margin that meets the target change of whole tensors, within the allowed range."""
    affordable = WHOLE**2 * values / bits - 1  # c², since the change is √(T(c² + 1)/N)
    return round(min(MARGIN, max(LEAST_MARGIN, math.sqrt(max(0.0, affordable)))), 2)


def _count_values_per_tensor(sizes: list[int], enough: float) -> int | None:
    """Return how many values to read of each tensor, as even as can be, to get `enough` in total.

    None means that all values of all tensors are needed.
    """
    left = enough
    # Small tensors first: each gives all its values if they are fewer than an even share.
    for at, size in enumerate(ordered := sorted(sizes)):
        share = left / (len(ordered) - at)
        if size >= share:
            return max(1, math.ceil(share))
        left -= size
    return None


def _sample_rows(
    weights: Weights, scheme: Stamp, tensors: Mapping[str, tuple[int, ...]]
) -> Iterator[Rows]:
    """Yield the first values of each tensor as rows, in units of their spread."""
    each = max(LEAST_VALUES, _SAMPLE // len(tensors))
    for name, shape in tensors.items():
        count = min(scheme.count_read_values(shape), each)
        part = weights.read_part(name, 0, count).astype(np.float64)
        # Rows follow the last axis, because some changes, such as rounding, scale each row by
        # itself.
        width = shape[-1] if shape[-1] <= count else count
        rows = part[: count // width * width].reshape(-1, width)
        # A tensor of zeros has no spread to divide by.
        if rows.any():
            flat = rows.reshape(-1)
            yield rows / scheme.compute_scales(flat, shape, 0).expand_scales(0, len(flat)).reshape(
                rows.shape
            )
