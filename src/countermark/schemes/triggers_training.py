"""Base class of trigger schemes in training: make triggers, and rows for the host's batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from countermark.keys.key import Key, KeyMaterial
from countermark.keys.streams import KeyStream
from countermark.schemes.triggers import TriggerScheme


class TriggerTraining(ABC):
    """The training half of a trigger scheme, for one key.

    Args:
        scheme: the configuration.
        key: the key whose triggers and labels are embedded.
        covers, labels: the owner's images uint8 (N, C, H, W) and their classes (N,).

    Attributes:
        generator: the source of random numbers for the rows; its seed follows from the key.
    """

    def __init__(self, scheme: TriggerScheme, key: Key, covers: Tensor, labels: Tensor) -> None:
        self.scheme, self.key = scheme, key
        self.covers, self.labels = covers, labels
        # Seeded from the key: every rank and every resumed run mixes the same rows.
        self.generator = torch.Generator().manual_seed(draw_seed(key.make_stream("rows")))

    @cached_property
    def committed_triggers(self) -> Tensor:
        """The committed triggers, uint8 (n, C, H, W)."""
        # A copy: arrays of a key may be read-only, and torch tensors are not.
        return torch.from_numpy(self.scheme.read_committed_triggers(self.key).copy())

    @cached_property
    def secret_labels(self) -> Tensor:
        """The secret labels (n,) of the triggers."""
        return torch.from_numpy(self.scheme.derive_labels(self.key))

    @classmethod
    @abstractmethod
    def make_pre_commit_tensors(
        cls, scheme: TriggerScheme, material: KeyMaterial, covers: Tensor, labels: Tensor
    ) -> dict[str, NDArray[Any]]:
        """Make the tensors, by name, that are fixed before the labels are drawn.

        Args:
            scheme: the configuration.
            material: the secret, from which all random choices follow.
            covers: the owner's images uint8 (N, C, H, W).
            labels: their classes (N,).
        """

    @abstractmethod
    def make_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next rows for the host: images uint8 (count, C, H, W) and labels (count,)."""

    def draw_committed_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw committed triggers (count, C, H, W) with their labels (count,), with repetition."""
        at = torch.randint(len(self.committed_triggers), (count,), generator=self.generator)
        return self.committed_triggers[at], self.secret_labels[at]

    def export_post_commit_tensors(self) -> dict[str, NDArray[Any]]:
        """Return tensors learnt for the key, triggers included; most schemes learn none."""
        return {}

    def export_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as tensors and numbers that torch can save."""
        return {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.generator.set_state(state["generator"])


def split_covers(scheme: TriggerScheme, material: KeyMaterial, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the covers for the committed triggers (n,), and of all other covers.

    Both are in an order that follows from the secret.

    Args:
        scheme: says how many triggers there are.
        material: the secret.
        count: the number of covers.
    """
    order = torch.from_numpy(material.make_stream("covers").draw_permutation(count))
    return order[: scheme.triggers], order[scheme.triggers :]


def draw_seed(stream: KeyStream) -> int:
    """Return the next word of a stream as a seed for torch."""
    # 63 bits: torch seeds are signed 64-bit integers.
    return int(stream.take_words(1)[0]) >> 1
