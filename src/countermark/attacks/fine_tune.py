"""Fine-tuning: continue the training of the stolen copy, on the same domain or another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from countermark._internal.progress import show_progress
from countermark.attacks.base import (
    Attack,
    ChangeResult,
    TrainingData,
    compute_first_scores,
    compute_scores,
    resolve_row_count,
)
from countermark.errors import ConfigError

_Output: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_MOMENTUM = 0.9  # momentum of "sgd"


class OwnMark(Protocol):
    """A mark of the thief's own that is trained together with the copy."""

    def penalty(self) -> Tensor:
        """Return the scalar penalty that is added to the loss."""

    def end_epoch(self) -> None:
        """Tell the mark that an epoch has ended."""


@dataclass(frozen=True)
class FineTune(Attack):
    """An attack that trains on with cross-entropy on the thief's labelled images.

    The owner's penalty is not part of the loss.

    Attributes:
        lr: learning rate, constant; no default, because it decides what the attack removes.
        epochs: passes over the thief's rows.
        batch_size: the most images of a step; the batches of an epoch differ by one image at most.
        optimizer: "adam", or "sgd" with momentum 0.9.
        layers: "all" (FTAL), or "last" (FTLL): train only the last module with parameters of its
            own. Running statistics of batch norms move in either case.
        rows: number of the thief's training rows, drawn by the seed; None for all.
        new_classes: give the last linear or convolutional layer this many outputs and fresh
            weights: for data of another domain, or to relearn the layer (RTAL, RTLL).
        seed: seed of rows, batches, fresh weights and dropout.
        weight_decay: each step subtracts lr·weight_decay of every weight, apart from the loss
            (decoupled, as in AdamW); 0 for no decay.
    """

    name: ClassVar[str] = "fine_tune"
    does: ClassVar[str] = "goes on training, on the same domain or on another one"
    source: ClassVar[str] = (
        "Wang et al. 2020, Model Fine-tuning; Lukas et al. 2022 (SoK), FTLL and FTAL"
    )
    needs_data: ClassVar[bool] = True

    lr: PositiveFloat
    epochs: PositiveInt = 1
    batch_size: PositiveInt = field(default=32, kw_only=True)
    optimizer: Literal["adam", "sgd"] = field(default="adam", kw_only=True)
    layers: Literal["all", "last"] = field(default="all", kw_only=True)
    rows: PositiveInt | None = field(default=None, kw_only=True)
    new_classes: PositiveInt | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    weight_decay: NonNegativeFloat = field(default=0.0, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Train the copy in place, and leave it in eval mode.

        Raises:
            ConfigError: more rows are wanted than available; the model's output is not a matrix of
                scores for the data's classes; or the trained parameters do not affect the output.
        """
        return ChangeResult(float(self.epochs), self.tune(stolen, data))

    def tune(self, stolen: nn.Module, data: TrainingData, mark: OwnMark | None = None) -> float:
        """Train the copy, and with it a mark of the thief's own if one is given.

        Returns: the share of the training rows that was used, 0 to 1.
        """
        generator = torch.Generator().manual_seed(self.seed)
        there = len(data.train_labels)
        count = resolve_row_count(self.name, self.rows, there)
        rows = torch.randperm(there, generator=generator)[:count]
        with _seed_torch(self.seed, stolen), torch.enable_grad():
            trained = self._prepare_parameters(stolen, data)
            self._run_epochs(stolen, data, (rows, generator), trained, mark)
        return len(rows) / there

    def _prepare_parameters(self, stolen: nn.Module, data: TrainingData) -> list[nn.Parameter]:
        """Fit the output layer to the data, and return the parameters to train.

        Raises:
            ConfigError: the number of classes differs, or the parameters do not affect the output.
        """
        # Fresh weights come first: the check below must see the output layer that is trained.
        renewed = [] if self.new_classes is None else _renew_output_layer(stolen, self.new_classes)
        trained = self.select_parameters(stolen)
        for parameter in trained:
            parameter.requires_grad_()  # a thief also trains parameters that the owner froze
        answer = compute_first_scores(stolen, data)
        if answer.shape[1] != data.classes:
            raise ConfigError(
                f"{self.name}: the model tells {answer.shape[1]} classes apart, the data have "
                f"{data.classes}: set new_classes={data.classes} to replace its output layer"
            )
        # Without this check nothing would be trained, and the mark would seem to survive.
        if renewed and not _has_influence(answer, renewed):
            raise ConfigError(
                f"{self.name}: the last linear or convolutional layer has no part in the model's "
                "answer: leave new_classes out"
            )
        if not _has_influence(answer, trained):
            raise ConfigError(
                f"{self.name}: the last module with parameters has no part in the model's answer: "
                "set layers=all"
            )
        return trained

    def select_parameters(self, stolen: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that are trained; subclasses may choose others."""
        return _find_last_parameters(stolen) if self.layers == "last" else list(stolen.parameters())

    def _run_epochs(
        self, stolen: nn.Module, data: TrainingData, drawn: tuple[Tensor, torch.Generator],
        trained: list[nn.Parameter], mark: OwnMark | None,
    ) -> None:  # fmt: skip
        """Run all epochs; `drawn` holds the row numbers and the generator that shuffles them."""
        rows, generator = drawn
        device, optimizer = trained[0].device, self.make_optimizer(trained)
        batches = ceil(len(rows) / self.batch_size)
        stolen.train()
        with show_progress(f"{self.name}, steps", self.epochs * batches) as advance:
            for _ in range(self.epochs):
                order = rows[torch.randperm(len(rows), generator=generator)]
                # Batches of nearly equal size: batch norm fails on a last batch of one image.
                for batch in order.tensor_split(batches):
                    images = data.normalised(data.train_images[batch]).to(device)
                    labels = data.train_labels[batch].to(device)
                    optimizer.zero_grad()
                    self._decay_weights(trained)
                    loss = F.cross_entropy(compute_scores(stolen, images), labels)
                    if mark:
                        loss = loss + mark.penalty()
                    # `inputs` leaves the gradients of parameters that are not trained untouched.
                    loss.backward(inputs=trained)  # type: ignore[no-untyped-call]
                    optimizer.step()
                    advance(1)
                if mark:
                    mark.end_epoch()
        optimizer.zero_grad()
        stolen.eval()

    def _decay_weights(self, trained: list[nn.Parameter]) -> None:
        """Shrink every weight by its share for one step, with any optimizer."""
        if self.weight_decay:
            with torch.no_grad():
                for parameter in trained:
                    # A large lr·weight_decay must not flip signs: the factor stops at 0.
                    parameter.mul_(max(0.0, 1 - self.lr * self.weight_decay))

    def make_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer that the fields name, for these parameters."""
        if self.optimizer == "adam":
            return torch.optim.Adam(trained, self.lr)
        return torch.optim.SGD(trained, self.lr, momentum=_MOMENTUM)


@contextmanager
def _seed_torch(seed: int, model: nn.Module) -> Iterator[None]:
    """Seed torch for fresh weights and dropout, and restore its random state afterwards."""
    devices = {each.device for each in model.parameters() if each.is_cuda}
    with torch.random.fork_rng(devices, device_type="cuda"):
        # `torch.manual_seed` would also reseed devices whose state is not restored.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def _renew_output_layer(model: nn.Module, outputs: int) -> list[nn.Parameter]:
    """Give the output layer new outputs with fresh weights; return its parameters.

    The layer is changed in place: it may be the whole model, or appear in it under several names.

    Raises:
        ConfigError: the model has no linear or convolutional layer.
    """
    found = [each for each in model.modules() if isinstance(each, _Output)]
    if not found:
        raise ConfigError("the model has no linear or convolutional layer to give new classes")
    layer = found[-1]
    layer.weight = nn.Parameter(layer.weight.new_empty(outputs, *layer.weight.shape[1:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(outputs))
    # Modules report their size in an attribute, and exporters read the size from there.
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", outputs)
    layer.reset_parameters()
    return list(layer.parameters())


def _find_last_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the last module with parameters of its own; [] if there is none."""
    own = [list(each.parameters(recurse=False)) for each in model.modules()]
    return next((each for each in reversed(own) if each), [])


def _has_influence(answer: Tensor, parameters: list[nn.Parameter]) -> bool:
    """Return true if any of the parameters affects the answer."""
    if not answer.requires_grad:
        return False
    found = torch.autograd.grad(answer.sum(), parameters, retain_graph=True, allow_unused=True)
    return any(each is not None for each in found)
