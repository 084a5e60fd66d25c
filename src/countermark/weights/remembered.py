"""Weights that are read once, however often they are asked for."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from countermark.weights.base import Array, Weights
from countermark.weights.wrapped import WrappedWeights

_LARGEST = 1 << 28  # bytes that are kept


class Remembered(WrappedWeights):
    """Open weights whose tensors stay in memory, as long as there is room; closing it closes them.

    Args:
        weights: open weights.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self._kept, self._room = dict[str, Array](), _LARGEST
        self.views = weights.views

    def read(self, name: str) -> Array:
        """One tensor, from memory where it was read before."""
        if name not in self._kept:
            values = self._weights.read(name)
            if values.nbytes > self._room:
                return values
            self._room -= values.nbytes
            self._kept[name] = values
        return self._kept[name]

    def read_part(self, name: str, start: int, count: int) -> Array:
        """A part of one, from memory where all of it was read before."""
        if name in self._kept:
            return self._kept[name].reshape(-1)[start : start + count]
        return self._weights.read_part(name, start, count)

    def _load(self, name: str) -> NDArray[Any]:
        return self._weights._load(name)
