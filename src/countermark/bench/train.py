"""Train a host the way its recipe says, with or without a mark, so that it can be interrupted.

All randomness of a step follows from (seed, epoch, step), so a run that goes on from a checkpoint
ends, on the CPU with the same threads, where the uninterrupted run would have ended.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark._internal.files import replace_file
from countermark._internal.progress import show_progress
from countermark.bench.data import Dataset
from countermark.bench.models import Recipe
from countermark.bench.watch import Watch
from countermark.checkpoints import save_weights
from countermark.embedding import Embedding
from countermark.errors import DataError

_CHECKPOINT_SECONDS = 20.0
_TEST_BATCH = 500


@dataclass(frozen=True)
class Course:
    """How long, from which seed and in which precision a host is trained.

    Attributes:
        epochs: passes over the training images.
        seed: steers batches and augmentation; has nothing to do with any secret.
        precision: "fp32", or "bf16" autocast with channels-last images.
        device: "auto" takes a GPU where there is one.
        teacher: distil from this model's answers instead of the labels.
        what: said beside the progress bar.
        watch: is shown the model after each epoch.
    """

    epochs: int
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    teacher: nn.Module | None = field(default=None, repr=False)
    what: str = "training"
    watch: Watch | None = field(default=None, repr=False)

    def resolved_device(self) -> torch.device:
        """The device that "auto" stands for here."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Checkpoint:
    """Where an interrupted training goes on: one file, replaced whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._last > _CHECKPOINT_SECONDS

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""
        with replace_file(self._path) as temporary:
            torch.save(state, temporary)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Forget it, when what it led to is kept elsewhere."""
        self._path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state of the last save; None when there is none."""
        if not self._path.exists():
            return None
        state: dict[str, Any] = torch.load(self._path, weights_only=True)
        return state


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    course: Course,
    *,
    mark: Embedding | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train `model` in place.

    Args:
        model: the host; moved to the device of the course.
        data: training images and labels.
        recipe: optimizer, learning rate, batch size, augmentation.
        course: epochs, seed, precision, device, teacher.
        mark: an open embedding whose penalty joins the loss.
        checkpoint: where to save now and then, and to go on from.
    """
    loop = _Loop(model, data, recipe, course, mark)
    loop.restore(checkpoint.load() if checkpoint else None)
    steps = batches_of(data, recipe)
    if steps < 1:
        raise DataError(
            f"{data.name} has {len(data.train_labels)} training images: expected at least one "
            f"batch of {recipe.batch_size}"
        )
    with show_progress(course.what, course.epochs * steps) as advance:
        advance(loop.epoch * steps + loop.step)
        while loop.epoch < course.epochs:
            for _ in range(loop.step, steps):
                loop.one_step()
                advance(1)
                if checkpoint and loop.step < steps and checkpoint.due():
                    checkpoint.save(loop.state())
            loop.end_epoch()
            if checkpoint:
                checkpoint.save(loop.state())
    model.eval()


def fit_to_file(
    model: nn.Module, data: Dataset, recipe: Recipe, course: Course, path: Path
) -> None:
    """Train `model` as `fit` does and write its weights; a checkpoint lies beside them till then.

    The first four arguments are those of `fit`; the name of the checkpoint ends in .pt.
    """
    checkpoint = Checkpoint(path.with_suffix(".pt"))
    fit(model, data, recipe, course, checkpoint=checkpoint)
    save_weights(model.state_dict(), path)
    checkpoint.remove()


def batches_of(data: Dataset, recipe: Recipe) -> int:
    """How many batches an epoch has."""
    return len(data.train_labels) // recipe.batch_size


class _Loop:
    """The state of one training run: where it stands, and how it takes a step."""

    def __init__(
        self, model: nn.Module, data: Dataset, recipe: Recipe, course: Course,
        mark: Embedding | None,
    ) -> None:  # fmt: skip
        self.epoch = self.step = 0
        self._device = course.resolved_device()
        self._model = model.to(self._device)
        self._data, self._recipe, self._course, self._mark = data, recipe, course, mark
        self._optimizer = _optimizer(self._model, recipe)
        self._order = self._epoch_order()

    def one_step(self) -> None:
        """One batch: Uchida's E = E0 + λ·E_R, backward, step."""
        self._model.train()
        seeded(self._course.seed, self.epoch, self.step)
        at = self.step * self._recipe.batch_size
        rows = self._order[at : at + self._recipe.batch_size]
        images = self._data.normalised(self._data.train_images[rows]).to(self._device)
        if self._recipe.augment:
            images = augmented(images)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)  # a quarter faster
        labels = self._data.train_labels[rows].to(self._device)
        if self._mark:
            images, labels = self._mark.mix(images, labels)
        self._learning_rate()
        loss = self._loss(images, labels)
        if self._mark:
            loss = loss + self._mark.penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1

    def end_epoch(self) -> None:
        """Turn to the next epoch's order."""
        if self._mark:
            self._mark.end_epoch()
        if self._course.watch:
            self._course.watch.end_epoch(self._model)
        self.epoch, self.step = self.epoch + 1, 0
        self._order = self._epoch_order()

    def state(self) -> dict[str, Any]:
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "mark": self._mark.state() if self._mark else {},
            "watch": self._course.watch.state() if self._course.watch else [],
            "epoch": self.epoch,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._mark:
            self._mark.restore(state["mark"])
        if self._course.watch:
            self._course.watch.restore(state["watch"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._order = self._epoch_order()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        course = self._course
        cast = nullcontext() if course.precision == "fp32" else torch.autocast(
            self._device.type, torch.bfloat16
        )  # fmt: skip
        with cast:
            scores = self._model(images)
            if course.teacher is None:
                return F.cross_entropy(scores.float(), labels)
            with torch.no_grad():
                answers = course.teacher(images).float().softmax(dim=1)
            return F.cross_entropy(scores.float(), answers)

    def _learning_rate(self) -> None:
        passed = sum(self.epoch >= m * self._course.epochs for m in self._recipe.milestones)
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.lr * self._recipe.gamma**passed

    def _epoch_order(self) -> Tensor:
        return epoch_order(self._course.seed, self.epoch, len(self._data.train_labels))


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of the test images that `model` puts into the right class, 0 to 1."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(data.test_labels), _TEST_BATCH):
            rows = slice(start, start + _TEST_BATCH)
            images = data.normalised(data.test_images[rows]).to(device)
            found = model(images).argmax(dim=1).cpu()
            right += int((found == data.test_labels[rows]).sum())
    return right / len(data.test_labels)


def augmented(images: Tensor) -> Tensor:
    """Each image (N, C, H, W) shifted by up to 4 pixels, zero-padded, and mirrored or not."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, n)).tolist()
    mirrored = torch.rand(n) < 0.5
    shifted = torch.stack(
        [p[:, d : d + height, r : r + width] for p, d, r in zip(padded, down, right, strict=True)]
    )
    return torch.where(mirrored.to(images.device)[:, None, None, None], shifted.flip(3), shifted)


def epoch_order(seed: int, epoch: int, rows: int) -> Tensor:
    """The order (rows,) in which an epoch goes through the training rows; a last part is left."""
    generator = torch.Generator().manual_seed(_number(seed, epoch, "order"))
    return torch.randperm(rows, generator=generator)


def seeded(*parts: object) -> None:
    """Seed torch from any values, on the CPU and on GPUs that are in use.

    `torch.manual_seed` would also queue the seed, with a formatted stack, for GPUs that are not:
    done before every step, that costs a third of a small host's training.
    """
    torch.default_generator.manual_seed(_number(*parts))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(_number(*parts))


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
