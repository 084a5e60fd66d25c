"""Unmarked siblings of a host: a learnt reader has to be told from them, triggers rank among them.

Triggers are not trained on them, so that all of them are measured, those shown to readers too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from countermark.bench.data import Dataset
from countermark.bench.models import Recipe
from countermark.bench.train import Course, fit_to_file
from countermark.results.null_hypotheses import LEAST_SIBLINGS

_APART = 1_000_003  # between the seeds of siblings, so that hosts of near seeds share no order


@dataclass(frozen=True)
class Siblings:
    """Weight files of unmarked siblings, and what they cost.

    Attributes:
        shown: for training the reader; the first is the host's twin in everything but the mark.
        held_out: training never sees them; they set the sibling threshold.
        epochs: of all of them together.
        seconds: process time spent just now; finished files cost nothing.
    """

    shown: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    epochs: int = 0
    seconds: float = 0.0


def train_siblings(
    host: Callable[[], nn.Module], data: Dataset, recipe: Recipe, course: Course, *,
    count: int, folder: Path,
) -> Siblings:  # fmt: skip
    """Train siblings where the host starts, without a mark; finished ones are kept in the folder.

    Each sees the data in an order of its own, every second one for half of the epochs.

    Args:
        host: makes the host as it is before training.
        data: what the host learns.
        recipe: how, as for the host.
        course: the host's own.
        count: how many; the first half is shown to the reader, as far as enough are held out.
        folder: for the weight files and their checkpoints.
    """
    paths, epochs, began = [], 0, time.process_time()
    for number in range(count):
        path = folder / f"sibling-{number}.safetensors"
        lasts = course.epochs if number % 2 == 0 else max(1, course.epochs // 2)
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
    half = max(0, min(count // 2, count - LEAST_SIBLINGS))
    return Siblings(tuple(paths[:half]), tuple(paths[half:]), epochs, time.process_time() - began)
