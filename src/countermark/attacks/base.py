"""Base classes of attacks: a thief's change to a copy of a model, and the cost of the change.

An attack knows the algorithms and may make keys of its own; it never sees the owner's key. It works
on a deep copy: the caller's model stays unchanged.
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
from countermark.schemes.base import Configuration


@dataclass(frozen=True)
class Cost:
    """The cost of an attack: process time in seconds, epochs of training, share of the data."""

    seconds: float
    epochs: float = 0.0
    data_share: float = 0.0


class TrainingData(Protocol):
    """Labelled images for an attack that trains; `countermark.training.data.Dataset` is an example."""

    @property
    def train_images(self) -> Tensor:
        """The training images, uint8 (N, C, H, W)."""

    @property
    def train_labels(self) -> Tensor:
        """The classes of the training images, int64 (N,), from 0 to below `classes`."""

    @property
    def classes(self) -> int:
        """The number of classes."""

    def normalised(self, images: Tensor, /) -> Tensor:
        """Return images uint8 (n, C, H, W) as the float tensor of that shape that a model takes."""


@dataclass(frozen=True)
class ChangeResult:
    """The result of `Attack.change`: the effort it took, and results beside the changed copy.

    Attributes:
        epochs: epochs of training over the rows that were used.
        data_share: share of the training data that was used, 0 to 1.
        model: a module that replaces the copy, if the attack ends with another module.
        found: findings and products of the thief, as JSON values.
    """

    epochs: float = 0.0
    data_share: float = 0.0
    model: nn.Module | None = None
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack: the thief's model, the cost, and findings as JSON values."""

    model: nn.Module
    cost: Cost
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attack(Configuration, ABC):
    """A family of attacks; the fields of an instance choose the variant.

    Attributes:
        name: name of the attack on the command line and in experiments.
        does: one line for the list of attacks.
        source: the paper that describes the attack.
        needs_data: the attack trains or asks the model, and needs training data.
        needs_model: the attack needs the architecture although it may need no data.
    """

    name: ClassVar[str]
    does: ClassVar[str]
    source: ClassVar[str]
    needs_data: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    """The attack needs the architecture, even if it needs no data."""

    @final
    def run(self, model: nn.Module, data: TrainingData | None = None) -> AttackResult:
        """Attack a deep copy of `model`.

        Args:
            model: the victim; unchanged afterwards.
            data: the thief's training data. An attack that needs no data ignores it, so that a
                list of attacks can be run alike; `cost.data_share` is then 0.

        Returns: the changed copy, the cost, and the findings.

        Raises:
            ConfigError: the attack needs data and got none, or model, data and fields do not fit.
        """
        if self.needs_data and data is None:
            raise ConfigError(
                f"{self.name} trains and needs data: call run(model, data), "
                "with data as load_data of countermark.training.data gives it"
            )
        stolen = copy.deepcopy(model)
        # Process time and not wall time: other processes on the machine must not change the cost.
        start = time.process_time()
        # Only the change itself is timed, not the copy of the model.
        done = self.change(stolen, data)
        cost = Cost(time.process_time() - start, done.epochs, done.data_share)
        return AttackResult(done.model or stolen, cost, done.found)

    # `data` is typed `Any` so that an attack that needs data can narrow it to TrainingData.
    @abstractmethod
    def change(self, stolen: nn.Module, data: Any) -> ChangeResult:
        """Change the stolen copy in place, or return a module that takes its place.

        Args:
            stolen: the copy.
            data: as given to `run`; a TrainingData, or None for an attack that needs no data.

        Returns: epochs trained, share of the training data used, and findings.
        """


def resolve_row_count(attack: str, rows: int | None, there: int) -> int:
    """Return how many of the available training rows an attack uses.

    Args:
        attack: name of the attack, for the error message.
        rows: the wanted number of rows; None for all.
        there: the number of available rows.

    Raises:
        ConfigError: more rows are wanted than available.
    """
    if rows is not None and rows > there:
        raise ConfigError(
            f"{attack}: rows is {rows}, the data have {there} training rows: "
            "take fewer, or leave rows out for all"
        )
    return rows or there


def compute_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Return a classifier's class scores (n, classes) for images (n, C, H, W).

    Raises:
        ConfigError: the model does not take the images, or its output is not a matrix of scores.
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
        # A language model, for example, returns an object or a tensor of more dimensions.
        raise ConfigError(f"the model answers with {shown}: expected class scores (n, classes)")
    return answer


def compute_first_scores(model: nn.Module, data: TrainingData) -> Tensor:
    """Return the scores (1, classes) of the first training image; leave the model in eval mode.

    Raises:
        ConfigError: as `compute_scores`, or the model has no parameters.
    """
    where = next(model.parameters(), None)
    if where is None:
        raise ConfigError("the model has no parameters: nothing can be trained")
    model.eval()
    return compute_scores(model, data.normalised(data.train_images[:1]).to(where.device))


class NamedTensors(nn.Module):
    """A module that holds tensors under given names, for files whose architecture is unknown.

    Its state dict has the given names, shapes and values. It cannot be called.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *folders, last = name.split(".")
            place: nn.Module = self
            # Write to the dictionaries: add_module and register_parameter refuse legal file names.
            for folder in folders:
                inner = place._modules.get(folder) or nn.Module()
                place._modules[folder] = place = inner
            # Only floating-point tensors can be parameters: torch refuses gradients of integers.
            if tensor.is_floating_point():
                place._parameters[last] = nn.Parameter(tensor)
            else:
                place._buffers[last] = tensor
