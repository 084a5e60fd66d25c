"""Show open weights in another form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from countermark.checkpoints.base import Array, TensorInfo, Weights


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


class ComputedWeights(WrappedWeights):
    """Open weights with views that are computed from stored tensors; closing it closes them.

    A subclass computes the views; all other tensors are read as the wrapped weights read them.

    Args:
        weights: open weights.
        shapes: shapes of the views by name.
    """

    def __init__(self, weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(weights)
        self._computed = frozenset(shapes)
        self.tensors = dict(weights.tensors) | {
            name: TensorInfo(shape, "float32") for name, shape in shapes.items()
        }
        self.views = weights.views | self._computed

    @abstractmethod
    def _compute(self, name: str) -> NDArray[Any]:
        """Compute a view in its own shape, without any check for finite numbers."""

    def _compute_part(self, name: str, start: int, count: int) -> Array:
        """Compute `count` values (count,) of a view, in C order from `start` on."""
        return self._compute(name).reshape(-1)[start : start + count]

    def read_part(self, name: str, start: int, count: int) -> Array:
        """Read a part of one tensor; a view is computed as far as the part needs it."""
        if name not in self._computed:
            return self._weights.read_part(name, start, count)
        return self._check_finite(name, self._compute_part(name, start, count))

    def read_parts(self, name: str, starts: Sequence[int], count: int) -> list[Array]:
        """Read parts of one tensor; a view is computed once for all of them."""
        if name not in self._computed:
            return self._weights.read_parts(name, starts, count)
        return super().read_parts(name, starts, count)

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor: as stored, or the float32 numbers of a view."""
        if name in self._computed:
            yield self._load(name).tobytes()
        else:
            yield from super().read_pieces(name)

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor, stored or computed."""
        return self._compute(name) if name in self._computed else self._weights.read(name)
