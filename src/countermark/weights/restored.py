"""Weights in which some values are put back as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.errors import SuspectError
from countermark.weights.base import Array, Weights
from countermark.weights.wrapped import WrappedWeights


class Restored(WrappedWeights):
    """Open weights, some values of which are other ones; closing it closes them.

    Args:
        weights: open weights.
        parts: tensor to the place of a first value, in C order, and the values (n,) from there on.

    Raises:
        SuspectError: a part reaches beyond its tensor, or there is no such tensor.
    """

    def __init__(self, weights: Weights, parts: Mapping[str, tuple[int, Array]]) -> None:
        super().__init__(weights)
        self._parts = parts
        for name, (start, values) in parts.items():
            size = int(np.prod(self.tensors[name].shape)) if name in self.tensors else 0
            if start + len(values) > size:
                raise SuspectError(
                    f"{weights.name} has no {name} of {start + len(values)} values or more: "
                    "expected the model that the key was made with"
                )

    def _load(self, name: str) -> NDArray[Any]:
        values = self._weights.read(name).copy()
        if name in self._parts:
            start, before = self._parts[name]
            values.reshape(-1)[start : start + len(before)] = before
        return values


class Stored(Restored):
    """Open weights without views of other tensors, which no digest of a model holds.

    Args:
        weights: open weights; closing these closes them.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, {})
        self.tensors = {n: each for n, each in weights.tensors.items() if n not in weights.views}
