"""What a training half is: the loss of a weight scheme, and what it must freeze before its key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from countermark.key import Key
from countermark.schemes.base import WeightScheme


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
    """

    def __init__(self, scheme: WeightScheme, key: Key) -> None:
        self.scheme = scheme
        self.key = key

    @abstractmethod
    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """The term () that is added to the host's loss, strength included.

        Args:
            weights: the tensors of `key.tensors`, in that order, as they are in the host.
        """

    @classmethod
    def freezer(cls, scheme: WeightScheme) -> Freezer | None:  # noqa: ARG003 - most freeze nothing
        """What watches the host before there is a key; None when the key can be made at once."""
        return None
