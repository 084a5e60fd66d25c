"""What an attack is: a thief's change to a copy of a model, and what it cost him.

An attack knows the algorithms and may make keys of its own; it never sees the owner's key. It works
on a deep copy: the model that is handed in stays as it is.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from countermark.schemes.base import Configured


@dataclass(frozen=True)
class Cost:
    """What an attack took: process time in seconds, epochs of training, share of the data."""

    seconds: float
    epochs: float = 0.0
    data_share: float = 0.0


@dataclass(frozen=True)
class Attacked:
    """The thief's copy after the attack, and the cost."""

    model: nn.Module
    cost: Cost


@dataclass(frozen=True)
class Attack(Configured, ABC):
    """One family of attacks; its fields are its variants."""

    name: ClassVar[str]
    does: ClassVar[str]
    source: ClassVar[str]
    needs_data: ClassVar[bool] = False

    @final
    def run(self, model: nn.Module) -> Attacked:
        """Attack a deep copy of `model`.

        Args:
            model: the victim; unchanged afterwards.

        Returns: the changed copy, and what it cost.
        """
        stolen = copy.deepcopy(model)
        start = time.process_time()
        epochs, data_share = self.change(stolen)
        return Attacked(stolen, Cost(time.process_time() - start, epochs, data_share))

    @abstractmethod
    def change(self, stolen: nn.Module) -> tuple[float, float]:
        """Change the stolen copy in place; returns the epochs trained and the data share used."""


class NamedTensors(nn.Module):
    """A module that holds tensors under given names, for files whose architecture is unknown.

    Its state dict has the same names, shapes and values; it cannot be called.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *folders, last = name.split(".")
            place: nn.Module = self
            # Past add_module and its like, which refuse names that a file may well have.
            for folder in folders:
                inner = place._modules.get(folder) or nn.Module()
                place._modules[folder] = place = inner
            if tensor.is_floating_point():
                place._parameters[last] = nn.Parameter(tensor)
            else:
                place._buffers[last] = tensor
