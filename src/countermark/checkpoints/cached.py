"""Read every tensor of open weights at most once, as long as memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from countermark.checkpoints.base import Array, Weights
from countermark.checkpoints.wrapped import WrappedWeights

_LARGEST = 1 << 28  # bytes of all tensors in memory


class CachedWeights(WrappedWeights):
    """Open weights that keep tensors in memory up to a limit; closing it closes them.

    Args:
        weights: open weights.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self._kept, self._room = dict[str, Array](), _LARGEST
        self.views = weights.views

    def read(self, name: str) -> Array:
        """Return one tensor, from memory if it was read before."""
        if name not in self._kept:
            values = self._weights.read(name)
            # A tensor beyond the limit is returned without being stored, and evicts no other
            # tensor.
            if values.nbytes > self._room:
                return values
            self._room -= values.nbytes
            self._kept[name] = values
        return self._kept[name]

    def read_part(self, name: str, start: int, count: int) -> Array:
        """Return a part of one tensor, from memory if the whole tensor was read before."""
        if name in self._kept:
            return self._kept[name].reshape(-1)[start : start + count]
        return self._weights.read_part(name, start, count)

    def read_parts(self, name: str, starts: Sequence[int], count: int) -> list[Array]:
        """Read parts of one tensor as the wrapped weights do, unless it is in memory."""
        if name in self._kept:
            return super().read_parts(name, starts, count)
        return self._weights.read_parts(name, starts, count)

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor from the wrapped weights, without the memory."""
        return self._weights._load(name)
