"""Imitation: a fresh network learns the answers of the stolen model and has none of its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from countermark._internal.plugins import call_factory
from countermark._internal.progress import show_progress
from countermark.attacks.base import (
    ChangeResult,
    TrainingData,
    compute_first_scores,
    compute_scores,
    resolve_row_count,
)
from countermark.attacks.fine_tune import FineTune
from countermark.errors import ConfigError


@dataclass(frozen=True)
class Imitate(FineTune):
    """An attack that trains a student on the thief's images and the copy's answers, without labels.

    Attributes:
        lr, epochs: learning rate and epochs of the student's training.
        answers: "soft" learns the probabilities (distillation), "labels" only the classes
            (retraining from labels, knockoff).
        temperature: temperature at which soft answers are compared.
        student: a factory `module:factory` of another architecture (transfer); empty for the stolen
            architecture with fresh weights. The factory's code is run.
        arguments: arguments of the factory.
    """

    name: ClassVar[str] = "imitate"
    does: ClassVar[str] = "trains a fresh network on the stolen one's answers (distil, knockoff)"
    source: ClassVar[str] = (
        "Hinton et al. 2015 (distillation); Orekondy et al. 2019 (knockoff); Lukas et al. 2022 "
        "(SoK), retraining, transfer"
    )

    lr: PositiveFloat = 0.001
    epochs: PositiveInt = 5
    answers: Literal["soft", "labels"] = field(default="soft", kw_only=True)
    temperature: PositiveFloat = field(default=2.0, kw_only=True)
    student: str = field(default="", kw_only=True)
    arguments: dict[str, Any] | None = field(default=None, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Record the copy's answers to the thief's images, and train the student on the answers.

        Raises:
            ConfigError: as for fine-tuning; the student cannot be made; or the student has another
                number of classes.
        """
        there = len(data.train_labels)
        count = resolve_row_count(self.name, self.rows, there)
        drawn = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(there, generator=drawn)[:count]
        learnt = _AnsweredImages(data, rows, self._compute_row_scores(stolen, data, rows))
        student = self._make_student(stolen)
        # Otherwise the loss would compare scores of different classes.
        if compute_first_scores(student, data).shape[1] != learnt.soft.shape[1]:
            raise ConfigError(
                f"{self.name}: the student tells other classes apart than the stolen model: give "
                "its factory the number of classes in arguments"
            )
        self._train_student(student, learnt)
        agree = (
            (self._compute_row_scores(student, data, rows).argmax(1) == learnt.train_labels)
            .float()
            .mean()
        )
        return ChangeResult(float(self.epochs), count / there, student, {"agreement": float(agree)})

    def _compute_row_scores(self, model: nn.Module, data: TrainingData, rows: Tensor) -> Tensor:
        """Return the scores (n, classes) of a model for the given training rows, on the CPU."""
        device = compute_first_scores(model, data).device
        with torch.no_grad():
            return torch.cat([
                compute_scores(model, data.normalised(data.train_images[part]).to(device)).cpu()
                for part in torch.split(rows, 256)
            ])  # fmt: skip

    def _make_student(self, stolen: nn.Module) -> nn.Module:
        """Return the student: from the factory, or the stolen architecture with fresh weights."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            if self.student:
                return _load_student(self.student, self.arguments or {})
            fresh = copy.deepcopy(stolen)
            for module in fresh.modules():
                # Torch's layers draw fresh weights in `reset_parameters`. A module without this
                # method keeps the stolen values of its own parameters.
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            return fresh

    def _train_student(self, student: nn.Module, learnt: _AnsweredImages) -> None:
        """Train the student on labels or on soft answers."""
        if self.answers == "labels":
            fields = {each: getattr(self, each) for each in FineTune.list_default_fields()}
            # `rows` is None here because the answers cover exactly the rows that were drawn before.
            FineTune(**fields | {"rows": None}).tune(student, learnt)
            return
        device, drawn = next(student.parameters()).device, torch.Generator().manual_seed(self.seed)
        optimizer, count = self.make_optimizer(list(student.parameters())), len(learnt.train_labels)
        student.train()
        with torch.enable_grad(), show_progress(f"{self.name}, epochs", self.epochs) as advance:
            for _ in range(self.epochs):
                order = torch.randperm(count, generator=drawn)
                for batch in order.tensor_split(-(-count // self.batch_size)):
                    images = learnt.normalised(learnt.train_images[batch]).to(device)
                    wanted = (learnt.soft[batch].to(device) / self.temperature).softmax(1)
                    said = (compute_scores(student, images) / self.temperature).log_softmax(1)
                    optimizer.zero_grad()
                    # The factor T² keeps the gradient's size independent of the temperature (Hinton
                    # et al. 2015).
                    loss = F.kl_div(said, wanted, reduction="batchmean") * self.temperature**2
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                advance(1)
        student.eval()


class _AnsweredImages:
    """Training data whose labels are the stolen model's answers.

    Attributes:
        train_images: the thief's images, uint8 (n, C, H, W).
        soft: scores of the stolen model (n, classes).
        train_labels: class with the largest score (n,).
    """

    def __init__(self, data: TrainingData, rows: Tensor, soft: Tensor) -> None:
        self.train_images, self.soft = data.train_images[rows], soft
        self.train_labels, self.classes = soft.argmax(1), soft.shape[1]
        self.normalised = data.normalised


def _load_student(place: str, arguments: dict[str, Any]) -> nn.Module:
    """Call the factory of a student.

    Raises:
        ConfigError: the factory cannot be called, or does not return a torch module.
    """
    student = call_factory("the student", place, "with the factory's arguments", arguments)
    if not isinstance(student, nn.Module):
        raise ConfigError(f"{place!r} must return a torch.nn.Module: got {type(student).__name__}")
    return student
