"""Show open weights in another form."""

from __future__ import annotations

from collections.abc import Iterator

from countermark.checkpoints.base import Weights


class WrappedWeights(Weights):
    """Open weights of which a subclass reads some values in another way; closing it closes them.

    The subclass must set which of its tensors are views.

    Args:
        weights: open weights.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.name)
        self._weights = weights
        # `digests` is shared, not copied: it grows while the wrapped weights are read.
        self.tensors, self.digests = weights.tensors, weights.digests
        self.notes, self.form = weights.notes, weights.form

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Return the bytes of one tensor as the wrapped weights store them, piece by piece."""
        return self._weights.read_pieces(name)

    def read_bytes(self, name: str, start: int, count: int) -> bytes:
        """Read some bytes of one tensor as the wrapped weights store them."""
        return self._weights.read_bytes(name, start, count)

    def describe_source(self, name: str) -> str:
        """Name the stored tensors that a tensor is made from, as the wrapped weights do."""
        return self._weights.describe_source(name)

    def compute_file_digest(self) -> str | None:
        """Return the digest of the file that the wrapped weights were read from, if any."""
        return self._weights.compute_file_digest()

    def close(self) -> None:
        """Close the wrapped weights."""
        self._weights.close()
