"""Base classes of weight schemes in training: the loss, and tensors frozen before the key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from countermark.checkpoints import Array
from countermark.keys.key import Key
from countermark.schemes.weights import WeightScheme


# Frozen tensors enter the commitment C0, so the key can be drawn only after them.
class Freezer(ABC):
    """An observer of a host's epochs that decides when a key's frozen tensors are fixed."""

    @abstractmethod
    def end_epoch(self, tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]] | None:
        """Record the carrying tensors after an epoch; in the end return tensors to freeze."""

    @abstractmethod
    def export_state(self) -> list[list[Tensor]]:
        """Return the history of the epochs, for a checkpoint."""

    @abstractmethod
    def restore(self, state: list[list[Tensor]]) -> None:
        """Continue from the history in a checkpoint."""


class WeightTraining(ABC):
    """The training half of a weight scheme, for one key.

    Args:
        scheme: the configuration.
        key: the key whose message is embedded.
        unmarked: tensors by name of unmarked models, the host's initial weights first; only learnt
            readers use them.
    """

    def __init__(
        self,
        scheme: WeightScheme,
        key: Key,
        unmarked: Sequence[Mapping[str, Array]] = (),  # noqa: ARG002
    ) -> None:
        self.scheme = scheme
        self.key = key

    @abstractmethod
    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the term () to add to the host's loss, multiplied by its strength.

        Args:
            weights: the host's tensors of `key.tensors`, in the order of the key.
        """

    # Only a reader has something to settle; the default changes nothing.
    def finish(self, weights: Sequence[Tensor]) -> None:  # noqa: ARG002
        """Finish what is trained beside the host, now that the host's training has ended."""
        return

    # Learnt tensors enter the commitment C1, after training.
    def export_post_commit_tensors(self) -> dict[str, NDArray[Any]]:
        """Return tensors learnt for the key, such as a reader's; most schemes learn none."""
        return {}

    def export_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as tensors that torch can save."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Continue from a saved state."""
        return

    @classmethod
    def make_freezer(cls, scheme: WeightScheme) -> Freezer | None:  # noqa: ARG003 - most freeze nothing
        """Return the observer that the scheme needs before its key, or None if it needs none."""
        return None
