"""Weights that are read once, however often they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from countermark.weights.base import Array, Weights

_LARGEST = 1 << 28  # bytes that are kept


class Remembered(Weights):
    """Open weights whose tensors stay in memory, as long as there is room; closing it closes them.

    Args:
        weights: open weights.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.name)
        self._weights, self._kept, self._room = weights, dict[str, Array](), _LARGEST
        self.tensors, self.views = weights.tensors, weights.views
        self.digests = weights.digests

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

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, as they are in the weights."""
        return self._weights.pieces(name)

    def file_digest(self) -> str | None:
        """That of the weights."""
        return self._weights.file_digest()

    def close(self) -> None:
        """Let go of the weights."""
        self._weights.close()
