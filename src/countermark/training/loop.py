"""Training of a host by its recipe, with or without a mark, which may be interrupted at any time.

All randomness of a step follows from (seed, epoch, step). A run that continues from a checkpoint
therefore ends, on the CPU with the same number of threads, at the weights of an uninterrupted run.
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
from countermark.checkpoints import save_weights
from countermark.embedding import Embedding
from countermark.errors import DataError
from countermark.training.data import Dataset
from countermark.training.models import Recipe
from countermark.training.weight_history import TensorWatch

_CHECKPOINT_SECONDS = 20.0
_TEST_BATCH = 500


@dataclass(frozen=True)
class Course:
    """Length, seed and precision of one training run.

    Attributes:
        epochs: passes over the training images.
        seed: determines batches and augmentation; it is independent of every secret.
        precision: "fp32", or "bf16" autocast with channels-last images.
        device: "auto" takes a GPU if there is one.
        teacher: distil from this model's predictions instead of the labels.
        what: label of the progress bar.
        watch: receives the model after each epoch.
    """

    epochs: int
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    teacher: nn.Module | None = field(default=None, repr=False)
    what: str = "training"
    watch: TensorWatch | None = field(default=None, repr=False)

    def resolve_device(self) -> torch.device:
        """Return the device of the run; "auto" becomes cuda or cpu."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Checkpoint:
    """File that an interrupted training continues from; always replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return true if the last save was more than 20 seconds ago."""
        return time.monotonic() - self._last > _CHECKPOINT_SECONDS

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, either completely or not at all."""
        with replace_file(self._path) as temporary:
            torch.save(state, temporary)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Delete the file, once the result of the training is stored elsewhere."""
        self._path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Return the state of the last save; None without a save."""
        if not self._path.exists():
            return None
        # weights_only refuses pickled code: a checkpoint may come from a foreign folder.
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
        checkpoint: where to save from time to time, and to continue from.

    Raises:
        DataError: there are fewer training images than one batch holds.
    """
    loop = _Loop(model, data, recipe, course, mark)
    loop.restore(checkpoint.load() if checkpoint else None)
    steps = count_batches(data, recipe)
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
                # The end of an epoch is saved below in any case.
                if checkpoint and loop.step < steps and checkpoint.due():
                    checkpoint.save(loop.get_state())
            loop.end_epoch()
            if checkpoint:
                checkpoint.save(loop.get_state())
    model.eval()


def fit_to_file(
    model: nn.Module, data: Dataset, recipe: Recipe, course: Course, path: Path
) -> None:
    """Train `model` as `fit` does and write its weights.

    The first four arguments are those of `fit`. A checkpoint with the suffix .pt lies beside the
    weight file until the weights are written.
    """
    checkpoint = Checkpoint(path.with_suffix(".pt"))
    fit(model, data, recipe, course, checkpoint=checkpoint)
    save_weights(model.state_dict(), path)
    checkpoint.remove()


def count_batches(data: Dataset, recipe: Recipe) -> int:
    """Return the number of batches of an epoch; an incomplete batch does not count."""
    return len(data.train_labels) // recipe.batch_size


class _Loop:
    """State of one training run: its position, and the method that takes a step."""

    def __init__(
        self, model: nn.Module, data: Dataset, recipe: Recipe, course: Course,
        mark: Embedding | None,
    ) -> None:  # fmt: skip
        self.epoch = self.step = 0
        self._device = course.resolve_device()
        self._model = model.to(self._device)
        self._data, self._recipe, self._course, self._mark = data, recipe, course, mark
        self._optimizer = _make_optimizer(self._model, recipe)
        self._order = self._draw_epoch_order()

    def one_step(self) -> None:
        """Train on one batch with the loss E = E0 + λ·E_R of Uchida et al. 2017."""
        self._model.train()
        # Seeding each step makes an interrupted run repeat the same augmentation and dropout.
        seed_torch(self._course.seed, self.epoch, self.step)
        at = self.step * self._recipe.batch_size
        rows = self._order[at : at + self._recipe.batch_size]
        images = self._data.normalised(self._data.train_images[rows]).to(self._device)
        if self._recipe.augment:
            images = augment_images(images)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)  # a quarter faster
        labels = self._data.train_labels[rows].to(self._device)
        if self._mark:
            images, labels = self._mark.mix(images, labels)
        self._set_learning_rate()
        loss = self._compute_loss(images, labels)
        if self._mark:
            loss = loss + self._mark.penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1

    def end_epoch(self) -> None:
        """Finish an epoch and draw the data order of the next one."""
        if self._mark:
            self._mark.end_epoch()
        if self._course.watch:
            self._course.watch.end_epoch(self._model)
        self.epoch, self.step = self.epoch + 1, 0
        self._order = self._draw_epoch_order()

    def get_state(self) -> dict[str, Any]:
        """Return the state of the run for a checkpoint."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "mark": self._mark.state() if self._mark else {},
            "watch": self._course.watch.get_state() if self._course.watch else [],
            "epoch": self.epoch,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from the state of a checkpoint; None starts afresh."""
        if state is None:
            return
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._mark:
            self._mark.restore(state["mark"])
        if self._course.watch:
            self._course.watch.restore(state["watch"])
        self.epoch, self.step = state["epoch"], state["step"]
        # The order follows from seed and epoch, so that no checkpoint needs to hold it.
        self._order = self._draw_epoch_order()

    def _compute_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy to the labels, or to the teacher's predictions."""
        course = self._course
        cast = nullcontext() if course.precision == "fp32" else torch.autocast(
            self._device.type, torch.bfloat16
        )  # fmt: skip
        with cast:
            scores = self._model(images)
            if course.teacher is None:
                # Autocast scores are bf16; the loss is computed in fp32.
                return F.cross_entropy(scores.float(), labels)
            with torch.no_grad():
                # The teacher sees the augmented images that the host sees.
                answers = course.teacher(images).float().softmax(dim=1)
            return F.cross_entropy(scores.float(), answers)

    def _set_learning_rate(self) -> None:
        """Set the learning rate of this epoch, by the milestones of the recipe."""
        passed = sum(self.epoch >= m * self._course.epochs for m in self._recipe.milestones)
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.lr * self._recipe.gamma**passed

    def _draw_epoch_order(self) -> Tensor:
        """Return the order in which this epoch goes through the training rows."""
        return draw_epoch_order(self._course.seed, self.epoch, len(self._data.train_labels))


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Return the share of test images, 0 to 1, that `model` classifies correctly."""
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


def augment_images(images: Tensor) -> Tensor:
    """Shift each image (N, C, H, W) by up to 4 pixels and mirror half of them, at random.

    Pixels from outside the image are zero.
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    # Offsets 0 to 8 into an image padded by 4 are shifts from -4 to +4.
    down, right = torch.randint(0, 9, (2, n)).tolist()
    # Drawn on the CPU: the same images are mirrored on every device.
    mirrored = torch.rand(n) < 0.5
    shifted = torch.stack(
        [p[:, d : d + height, r : r + width] for p, d, r in zip(padded, down, right, strict=True)]
    )
    return torch.where(mirrored.to(images.device)[:, None, None, None], shifted.flip(3), shifted)


def draw_epoch_order(seed: int, epoch: int, rows: int) -> Tensor:
    """Return the order (rows,) in which an epoch goes through the training rows.

    Rows behind the last complete batch are not used in this epoch.
    """
    generator = torch.Generator().manual_seed(_hash_to_seed(seed, epoch, "order"))
    return torch.randperm(rows, generator=generator)


def seed_torch(*parts: object) -> None:
    """Seed torch from any values, on the CPU and on GPUs that are in use.

    `torch.manual_seed` would also queue the seed, with a formatted stack, for GPUs that are not in
    use: before every step, that costs a third of a small host's training time.
    """
    torch.default_generator.manual_seed(_hash_to_seed(*parts))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(_hash_to_seed(*parts))


def _hash_to_seed(*parts: object) -> int:
    """Hash any values to a seed of 56 bits."""
    # 7 bytes always fit into the signed 64-bit seed of torch.
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer of a recipe."""
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
