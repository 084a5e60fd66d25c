"""What the training half of a trigger scheme is: it makes triggers, and rows for a host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from countermark.key import Key, KeyMaterial
from countermark.schemes.black_box import TriggerScheme
from countermark.xof import Stream


class TriggerTraining(ABC):
    """The training half of a trigger scheme, for one key.

    Args:
        scheme: the configuration.
        key: the key whose triggers and labels are embedded.
        covers, labels: uint8 (N, C, H, W) and (N,), the owner's images.

    Attributes:
        generator: draws whatever is random in the rows; follows from the key.
    """

    def __init__(self, scheme: TriggerScheme, key: Key, covers: Tensor, labels: Tensor) -> None:
        self.scheme, self.key = scheme, key
        self.covers, self.labels = covers, labels
        self.generator = torch.Generator().manual_seed(seed_of(key.stream("rows")))

    @cached_property
    def triggers(self) -> Tensor:
        """The committed triggers, uint8 (n, C, H, W)."""
        return torch.from_numpy(self.scheme.committed(self.key).copy())

    @cached_property
    def secret_labels(self) -> Tensor:
        """Their labels (n,)."""
        return torch.from_numpy(self.scheme.labels(self.key))

    @classmethod
    @abstractmethod
    def prepare(
        cls, scheme: TriggerScheme, material: KeyMaterial, covers: Tensor, labels: Tensor
    ) -> dict[str, NDArray[Any]]:
        """What is fixed before the labels are drawn, by name, of covers (N, …) and labels (N,)."""

    @abstractmethod
    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """The next rows that the host learns: images uint8 (count, C, H, W), labels (count,)."""

    def committed_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Some of the committed triggers (count, C, H, W), with their labels (count,)."""
        at = torch.randint(len(self.triggers), (count,), generator=self.generator)
        return self.triggers[at], self.secret_labels[at]

    def learnt(self) -> dict[str, NDArray[Any]]:
        """What training has learnt for the key, the triggers among it; most learn nothing."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with, as tensors and numbers that torch can save."""
        return {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.generator.set_state(state["generator"])


def split_covers(scheme: TriggerScheme, material: KeyMaterial, count: int) -> tuple[Tensor, Tensor]:
    """Which of `count` covers the committed triggers are made of (n,), and all others.

    Both in an order that follows from the secret.
    """
    order = torch.from_numpy(material.stream("covers").permutation(count))
    return order[: scheme.triggers], order[scheme.triggers :]


def seed_of(stream: Stream) -> int:
    """The next word of a stream as a seed for torch."""
    return int(stream.words(1)[0]) >> 1
