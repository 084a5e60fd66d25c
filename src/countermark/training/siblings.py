"""Unmarked siblings of a host: models that a learnt reader must tell from the marked host.

Triggers are ranked among siblings. They are not trained on them, so that every sibling is measured,
also those that learnt readers are trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from countermark.results.null_hypotheses import LEAST_SIBLINGS
from countermark.training.data import Dataset
from countermark.training.loop import Course, fit_to_file
from countermark.training.models import Recipe

_APART = 1_000_003  # seed distance of siblings: hosts with near seeds share no data order


@dataclass(frozen=True)
class TrainedSiblings:
    """Weight files of unmarked siblings, and the cost of their training.

    Attributes:
        shown: siblings for training the reader; the first differs from the host only by the mark.
        held_out: siblings that training never sees; they set the sibling threshold.
        epochs: epochs of all siblings together.
        seconds: process time of the training in this call; finished files cost nothing.
    """

    shown: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    epochs: int = 0
    seconds: float = 0.0


def train_siblings(
    host: Callable[[], nn.Module], data: Dataset, recipe: Recipe, course: Course, *,
    count: int, folder: Path,
) -> TrainedSiblings:  # fmt: skip
    """Train unmarked siblings from the host's initial weights; keep finished files.

    Each sibling sees the data in an order of its own, and every second sibling trains for half of
    the epochs.

    Args:
        host: makes the host as it is before training.
        data: training data of the host.
        recipe: training settings of the host.
        course: epochs, seed, precision and device of the host.
        count: number of siblings; the first half is shown to the reader, unless fewer than
            `LEAST_SIBLINGS` would be held out.
        folder: for the weight files and their checkpoints.
    """
    paths, epochs, began = [], 0, time.process_time()
    for number in range(count):
        path = folder / f"sibling-{number}.safetensors"
        lasts = course.epochs if number % 2 == 0 else max(1, course.epochs // 2)
        # An interrupted command goes on here: finished siblings are not trained again.
        if not path.exists():
            own = replace(
                course,
                epochs=lasts,
                seed=course.seed + number * _APART,
                what=f"unmarked sibling {number + 1} of {count}",
            )
            fit_to_file(host(), data, recipe, own, path)
        paths.append(path)
        epochs += lasts
    # The threshold needs LEAST_SIBLINGS held-out models before the reader gets any.
    half = max(0, min(count // 2, count - LEAST_SIBLINGS))
    return TrainedSiblings(
        tuple(paths[:half]), tuple(paths[half:]), epochs, time.process_time() - began
    )
