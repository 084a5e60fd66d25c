"""What the training half of a trigger scheme is: it makes triggers, and rows for a host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from countermark.key import Key, KeyMaterial
from countermark.schemes.black_box import TriggerScheme


class TriggerTraining(ABC):
    """The training half of a trigger scheme, for one key.

    Args:
        scheme: the configuration.
        key: the key whose triggers and labels are embedded.
        covers, labels: uint8 (N, C, H, W) and (N,), the owner's images.
    """

    def __init__(self, scheme: TriggerScheme, key: Key, covers: Tensor, labels: Tensor) -> None:
        self.scheme, self.key = scheme, key
        self.covers, self.labels = covers, labels

    @classmethod
    @abstractmethod
    def prepare(
        cls, scheme: TriggerScheme, material: KeyMaterial, covers: Tensor
    ) -> dict[str, NDArray[Any]]:
        """What is fixed before the labels are drawn, the triggers among it, by name."""

    @abstractmethod
    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """The next rows that the host learns: images uint8 (count, C, H, W), labels (count,)."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with, as tensors that torch can save."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
