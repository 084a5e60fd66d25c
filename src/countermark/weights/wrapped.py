"""Open weights that are shown in another form."""

from __future__ import annotations

from collections.abc import Iterator

from countermark.weights.base import Weights


class WrappedWeights(Weights):
    """Open weights, some values of which a subclass reads otherwise; closing it closes them.

    The subclass says which of its tensors are views.

    Args:
        weights: open weights.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.name)
        self._weights = weights
        self.tensors, self.digests = weights.tensors, weights.digests

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, as they are in the weights."""
        return self._weights.pieces(name)

    def file_digest(self) -> str | None:
        """Return the digest of the file that the weights were read from, if they were."""
        return self._weights.file_digest()

    def close(self) -> None:
        """Let go of the weights."""
        self._weights.close()
