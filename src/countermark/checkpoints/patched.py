"""Show open weights with some values replaced by values from before a mark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints.base import Array, Weights
from countermark.checkpoints.wrapped import WrappedWeights
from countermark.errors import SuspectError


class PatchedWeights(WrappedWeights):
    """Open weights in which some values are replaced; closing it closes them.

    Args:
        weights: open weights.
        parts: maps a tensor's name to the position of a first value, in C order, and the values
            (n,) from there on.

    Raises:
        SuspectError: a part reaches beyond its tensor, or the tensor does not exist.
    """

    def __init__(self, weights: Weights, parts: Mapping[str, tuple[int, Array]]) -> None:
        super().__init__(weights)
        self._parts = parts
        for name, (start, values) in parts.items():
            # Checked here and not on reading, so that a model which does not belong to the key is
            # refused before any tensor is loaded.
            size = int(np.prod(self.tensors[name].shape)) if name in self.tensors else 0
            if start + len(values) > size:
                raise SuspectError(
                    f"{weights.name} has no {name} of {start + len(values)} values or more: "
                    "expected the model that the key was made with"
                )

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor and replace its values."""
        # The wrapped weights may return their own memory, which must not change.
        values = self._weights.read(name).copy()
        if name in self._parts:
            start, before = self._parts[name]
            values.reshape(-1)[start : start + len(before)] = before
        return values


class StoredWeights(PatchedWeights):
    """Open weights without views, which no digest of a model covers.

    Args:
        weights: open weights; closing this object closes them.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, {})
        self.tensors = {n: each for n, each in weights.tensors.items() if n not in weights.views}
