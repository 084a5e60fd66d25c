"""What a training half is: the loss of a weight scheme, and what it must freeze before its key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from countermark.key import Key
from countermark.schemes.white_box import WeightScheme
from countermark.weights import Array


class Freezer(ABC):
    """Watches a host epoch by epoch until what the key depends on can be fixed."""

    @abstractmethod
    def end_epoch(self, tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]] | None:
        """See the carrying tensors after an epoch; returns what to freeze once it is time."""

    @abstractmethod
    def state(self) -> list[list[Tensor]]:
        """What was seen so far, for a checkpoint."""

    @abstractmethod
    def restore(self, state: list[list[Tensor]]) -> None:
        """Go on from a checkpoint."""


class WeightTraining(ABC):
    """The training half of a weight scheme, for one key.

    Args:
        scheme: the configuration.
        key: the key whose message is embedded.
        unmarked: tensors by name of models without the mark, the host's own start first; for
            readers that are learnt.
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
        """The term () that is added to the host's loss, strength included.

        Args:
            weights: the tensors of `key.tensors`, in that order, as they are in the host.
        """

    def finish(self, weights: Sequence[Tensor]) -> None:  # noqa: ARG002
        """The host is trained; whatever is learnt beside it may come to an end."""
        return

    def learnt(self) -> dict[str, NDArray[Any]]:
        """What training has learnt for the key: the tensors of a reader; most learn nothing."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with, as tensors that torch can save."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Go on from `state()`."""
        return

    @classmethod
    def freezer(cls, scheme: WeightScheme) -> Freezer | None:  # noqa: ARG003 - most freeze nothing
        """What watches the host before there is a key; None when the key can be made at once."""
        return None
