"""Further measurements of a host that is marked by triggers.

They answer three questions: which triggers survive image transforms such as JPEG, which classes a
second process computes from the weight file, and how the triggers look as images.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from countermark._internal.progress import show_progress
from countermark.keys.key import Key
from countermark.predictors.base import Images, Labels, Predictor, make_module_predictor
from countermark.schemes import load_scheme
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.deepstego.stego_generators import make_fresh_triggers
from countermark.schemes.triggers import TriggerScheme
from countermark.training.data import Dataset
from countermark_lab.experiments.cross_process import predict_in_other_process
from countermark_lab.experiments.experiment import Cell
from countermark_lab.experiments.image_transforms import make_transformed_predictor

_ASKED = 1000  # test images, where an experiment has no fresh triggers

Questions: TypeAlias = Mapping[str, tuple[Images, Labels]]
"""By name: images (n, C, H, W), and the classes (n,) that are wanted for them."""


def evaluate_triggers(model: nn.Module, key: Key, cell: Cell, data: Dataset) -> dict[str, Any]:
    """Measure how a host that is marked by triggers answers, as far as the cell requests it.

    Args:
        model: the marked host.
        key: its key.
        cell: says which measurements to take.
        data: gives the test images.

    Returns: `handled`, `machines` and `pictures`, each only if the cell requests it; an empty
        dictionary for a key whose scheme uses no triggers. Shares are in percent.
    """
    scheme = load_scheme(key)
    # A mark in weights or outputs has no triggers that could be sent anywhere.
    if not isinstance(scheme, TriggerScheme):
        return {}
    questions, figures = _collect_questions(key, scheme, cell, data), dict[str, Any]()
    if cell.handled:
        predict = make_module_predictor(model, scheme.mean, scheme.deviation)
        with show_progress("images on their way", len(cell.handled)) as advance:
            figures["handled"] = []
            for each in cell.handled:
                found = compute_answer_shares(questions, make_transformed_predictor(predict, each))
                figures["handled"].append(each.model_dump() | found)
                advance(1)
    if cell.trials:
        figures["machines"] = _measure_other_process(model, scheme, questions, cell)
    if cell.pictures:
        figures["pictures"] = _encode_images(questions, cell.pictures)
    return figures


def compute_answer_shares(questions: Questions, predict: Predictor) -> dict[str, float]:
    """Return, for each kind of images, the percentage that gets the wanted class."""
    # All kinds go through the model in one call: a second process starts once, not once a kind.
    read = predict(np.concatenate([images for images, _ in questions.values()]))
    ends = np.cumsum([len(images) for images, _ in questions.values()])[:-1]
    return {
        name: 100 * float(np.mean(part == wanted))
        for (name, (_, wanted)), part in zip(questions.items(), np.split(read, ends), strict=True)
    }


def _collect_questions(key: Key, scheme: TriggerScheme, cell: Cell, data: Dataset) -> Questions:
    """Collect test images, the committed triggers and, for DeepStego, fresh triggers."""
    count = cell.fresh.images if cell.fresh else _ASKED
    covers, classes = data.test_images[:count].numpy(), data.test_labels[:count].numpy()
    found = {
        "accuracy": (covers, classes),
        "triggers": (scheme.read_committed_triggers(key), scheme.derive_labels(key)),
    }
    # Only DeepStego makes new triggers after the commitment; other schemes have a fixed set.
    if isinstance(scheme, DeepStego):
        found["fresh"] = make_fresh_triggers(key, covers), scheme.draw_class_map(key)[classes]
    return found


def _measure_other_process(
    model: nn.Module, scheme: TriggerScheme, questions: Questions, cell: Cell
) -> list[dict[str, float]]:
    """Measure the answers of a second process, once for each trial of the cell.

    Each trial takes its own part of the images of each kind.
    """
    trials, scale = [], (scheme.mean, scheme.deviation)
    with show_progress("another machine answers", cell.trials) as advance:
        for trial in range(cell.trials):
            # A stride rather than a block: each trial samples the whole sequence of images.
            part = {
                name: (images[trial :: cell.trials], wanted[trial :: cell.trials])
                for name, (images, wanted) in questions.items()
            }
            trials.append(
                compute_answer_shares(
                    part, lambda each: predict_in_other_process(model, cell.host, scale, each)
                )
            )
            advance(1)
    return trials


def _encode_images(questions: Questions, count: int) -> dict[str, Any]:
    """Encode the first `count` images of each kind in base64, beside the shape (C, H, W)."""
    shape = questions["triggers"][0].shape[1:]
    return {"shape": list(shape)} | {
        name: [base64.b64encode(each.tobytes()).decode() for each in images[:count]]
        for name, (images, _) in questions.items()
    }
