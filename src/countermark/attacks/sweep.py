"""Fine-tuning at the highest learning rate that the thief can afford, found by trying rates."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from countermark.attacks.base import ChangeResult, TrainingData, resolve_row_count
from countermark.attacks.fine_tune import FineTune
from countermark.errors import ConfigError


@dataclass(frozen=True)
class FineTuneSweep(FineTune):
    """An attack that tries learning rates from the highest down, and stops when the accuracy holds.

    Without a key a thief sees no mark. The strongest attack is to train as hard as the thief's own
    held-out images allow. `layers` and `new_classes` make it FTLL, FTAL, RTLL or RTAL.

    Attributes:
        lr: the highest rate; `rates` are shares of it.
        rates: shares of `lr` that are tried, in this order.
        most_lost: the most accuracy that may be lost on the held-out tenth of the rows, 0 to 1.
    """

    name: ClassVar[str] = "fine_tune_sweep"
    does: ClassVar[str] = "fine-tunes at the highest learning rate that keeps the accuracy"
    source: ClassVar[str] = "Lukas et al. 2022 (SoK): removal at 5 points of accuracy at most"

    lr: PositiveFloat = 0.1
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = field(
        default=(1.0, 0.3, 0.1, 0.03, 0.01), kw_only=True
    )
    most_lost: Annotated[float, Field(ge=0, le=1)] = field(default=0.05, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Train a copy at each rate until the accuracy holds, and return that copy.

        Raises:
            ConfigError: as for fine-tuning, or no rate keeps the accuracy.
        """
        there = len(data.train_labels)
        count = resolve_row_count(self.name, self.rows, there)
        drawn = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(there, generator=drawn)[:count]
        # The rows are in random order, so the first tenth is a random sample.
        seen, held = rows[max(1, count // 10) :], rows[: max(1, count // 10)]
        before = _measure_accuracy(stolen, data, held)
        for number, rate in enumerate(self.rates, 1):
            # Each rate starts from the stolen weights, so the tries do not build on each other.
            tuned, lr = copy.deepcopy(stolen), self.lr * rate
            fields = {each: getattr(self, each) for each in FineTune.list_default_fields()}
            step = FineTune(**fields | {"lr": lr, "rows": None})
            step.tune(tuned, _TrainingRows(data, seen))
            after = _measure_accuracy(tuned, data, held)
            if before - after <= self.most_lost:
                found = {"lr": lr, "held_out_before": before, "held_out_after": after}
                # The cost counts every try, not only the successful one.
                return ChangeResult(float(self.epochs * number), count / there, tuned, found)
        raise ConfigError(
            f"{self.name}: no rate from {self.lr * max(self.rates):g} down to "
            f"{self.lr * min(self.rates):g} keeps the accuracy: give lower rates or more epochs"
        )


class _TrainingRows:
    """Training data that consist of some rows of another data set."""

    def __init__(self, data: TrainingData, rows: Tensor) -> None:
        self.train_images, self.train_labels = data.train_images[rows], data.train_labels[rows]
        self.classes, self.normalised = data.classes, data.normalised


def _measure_accuracy(model: nn.Module, data: TrainingData, rows: Tensor) -> float:
    """Return the share of rows that a model classifies correctly; 0 if its classes are others."""
    device = next(model.parameters()).device
    was = model.training
    model.eval()
    with torch.no_grad():
        answers: Any = model(data.normalised(data.train_images[rows]).to(device)).argmax(1).cpu()
    model.train(was)
    return float((answers == data.train_labels[rows]).float().mean())
