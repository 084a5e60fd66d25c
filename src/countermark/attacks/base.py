"""What an attack is: a thief's change to a copy of a model, and what it cost him.

An attack knows the algorithms and may make keys of its own; it never sees the owner's key. It works
on a deep copy: the model that is handed in stays as it is.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, final

from torch import Tensor, nn

from countermark.errors import ConfigError
from countermark.schemes.base import Configured


@dataclass(frozen=True)
class Cost:
    """What an attack took: process time in seconds, epochs of training, share of the data."""

    seconds: float
    epochs: float = 0.0
    data_share: float = 0.0


class TrainingData(Protocol):
    """Labelled images for an attack that trains; `countermark.bench.data.Dataset` is one."""

    @property
    def train_images(self) -> Tensor:
        """Pictures, uint8 (N, C, H, W)."""

    @property
    def train_labels(self) -> Tensor:
        """Their classes, int64 (N,), from 0 to below `classes`."""

    @property
    def classes(self) -> int:
        """How many classes there are."""

    def normalised(self, images: Tensor, /) -> Tensor:
        """Pictures uint8 (n, C, H, W) as the float tensor of that shape that a model takes."""


@dataclass(frozen=True)
class Done:
    """What a change of the copy took, and what came of it beside the changed copy.

    Attributes:
        epochs: of training, over the rows that were used.
        data_share: share of the training data that was used, 0 to 1.
        model: another module in place of the copy, where the attack ends with one.
        found: what the thief has found out or made, as JSON values.
    """

    epochs: float = 0.0
    data_share: float = 0.0
    model: nn.Module | None = None
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attacked:
    """The thief's copy after the attack, the cost, and what the attack found out or made."""

    model: nn.Module
    cost: Cost
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attack(Configured, ABC):
    """One family of attacks; its fields are its variants."""

    name: ClassVar[str]
    does: ClassVar[str]
    source: ClassVar[str]
    needs_data: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    """Whether it needs the architecture although it needs no data."""

    @final
    def run(self, model: nn.Module, data: TrainingData | None = None) -> Attacked:
        """Attack a deep copy of `model`.

        Args:
            model: the victim; unchanged afterwards.
            data: what the thief has to train on. An attack that needs none ignores it, so that a
                list of attacks can be run alike; `cost.data_share` is then 0.

        Returns: the changed copy, what it cost, and what was found.

        Raises:
            ConfigError: the attack needs data and got none, or model, data and fields do not fit.
        """
        if self.needs_data and data is None:
            raise ConfigError(
                f"{self.name} trains and needs data: call run(model, data), "
                "with data as load_data of countermark.bench.data gives it"
            )
        stolen = copy.deepcopy(model)
        start = time.process_time()
        done = self.change(stolen, data)
        cost = Cost(time.process_time() - start, done.epochs, done.data_share)
        return Attacked(done.model or stolen, cost, done.found)

    # `Any`, so that an attack that needs data says TrainingData and need not ask for None again.
    @abstractmethod
    def change(self, stolen: nn.Module, data: Any) -> Done:
        """Change the stolen copy in place, or say what takes its place.

        Args:
            stolen: the copy.
            data: as given to `run`; a TrainingData, or None for an attack that needs none.

        Returns: epochs trained, share of the training data used, and what came of it.
        """


def row_count(attack: str, rows: int | None, there: int) -> int:
    """How many of the training rows that are there an attack of this name takes; None for all.

    Raises:
        ConfigError: there are not so many.
    """
    if rows is not None and rows > there:
        raise ConfigError(
            f"{attack}: rows is {rows}, the data have {there} training rows: "
            "take fewer, or leave rows out for all"
        )
    return rows or there


def scores(model: nn.Module, images: Tensor) -> Tensor:
    """What a classifier says to images (n, C, H, W): class scores (n, classes).

    Raises:
        ConfigError: it does not take them, or answers with something else.
    """
    try:
        answer: object = model(images)
    except Exception as error:  # a model is foreign code and may raise anything
        said = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the model does not take images of shape {tuple(images.shape)} "
            f"({type(error).__name__}: {said}): choose data that fit it"
        ) from error
    if not isinstance(answer, Tensor) or answer.dim() != 2:
        kind = type(answer).__name__
        shown = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {kind}"
        raise ConfigError(f"the model answers with {shown}: expected class scores (n, classes)")
    return answer


def first_scores(model: nn.Module, data: TrainingData) -> Tensor:
    """Scores (1, classes) for the first of the images, in eval mode, where the model stays.

    Raises:
        ConfigError: as `scores`, or the model has no parameters.
    """
    where = next(model.parameters(), None)
    if where is None:
        raise ConfigError("the model has no parameters: nothing can be trained")
    model.eval()
    return scores(model, data.normalised(data.train_images[:1]).to(where.device))


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
