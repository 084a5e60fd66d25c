"""Barriers of experiments: trained once, cached as keys, and shared by all cells that copy them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import rfc8785
from filelock import FileLock
from torch import nn

from countermark.embedding import OutputEmbedding
from countermark.keys.key import Key, KeyMaterial
from countermark.predictors.base import Images
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.outputs_training import Given
from countermark.training.image_squares import PhotographSquares
from countermark.training.image_tasks import spoil_images
from countermark.training.loop import Checkpoint
from countermark_lab.image_models.experiment import ImagingCell

CACHE = Path(".cache/images")


def make_cell_scheme(cell: ImagingCell) -> DeepWatermarking:
    """Make the scheme of a cell, with channels, side and task of the images."""
    known = {"channels": cell.images.channels, "side": cell.images.side, "task": cell.images.task}
    return DeepWatermarking.from_fields(known | cell.form.fields)


def load_barrier_key(cell: ImagingCell, data: PhotographSquares, siblings: Sequence[Images]) -> Key:
    """Return the key of a cell's barrier; train the barrier unless the cache has it.

    Args:
        cell: its form, images and seed determine the barrier.
        data: the networks H and R are trained on the owner's images.
        siblings: images of unmarked networks, for the published form.
    """
    scheme = make_cell_scheme(cell)
    content: dict[str, Any] = {
        "fields": {each.name: scheme.to_fields()[each.name] for each in fields(scheme)},
        "images": cell.images.model_dump(mode="json"),
        # Siblings and surrogates are left out: cells that differ only by them share a barrier.
        "seed": cell.seed,
    }
    digest = hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]
    folder = CACHE / f"{digest}.key"
    given = data.owner, spoil_images(data.owner, cell.images.task, 3)
    key = load_or_train_key(folder, scheme, KeyMaterial.from_test_seed(cell.seed), given, "bench")
    return scheme.with_calibration(key, [list(each) for each in siblings])


def load_or_train_key(
    folder: Path, scheme: DeepWatermarking, material: KeyMaterial, given: Given, owner: str
) -> Key:
    """Return the key in a folder of the cache; train it with `train_key` unless it is there.

    The lock makes cells that run side by side wait for one training.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            checkpoint = Checkpoint(folder.with_suffix(".pt"))
            train_key(scheme, material, given, owner, checkpoint).save(folder)
            # The key is complete on disk here, so that nothing needs the checkpoint any more.
            checkpoint.remove()
    return Key.load(folder)


def train_key(
    scheme: DeepWatermarking, material: KeyMaterial, given: Given, owner: str,
    saving: Checkpoint | None = None,
) -> Key:  # fmt: skip
    """Train the networks of a key, without calibration on siblings.

    Args:
        scheme: the configuration.
        material: the secret.
        given: the images to mark, uint8 (N, C, S, S), and the inputs that they were made from.
        owner: name of the owner in the key.
        saving: checkpoint that the training saves to and continues from.
    """
    outputs, inputs = given
    # Images are marked as they are, so that no network stands before the barrier.
    mark = OutputEmbedding(
        scheme, nn.Identity(), owner=owner, outputs=outputs, inputs=inputs, material=material
    )
    mark.saving = saving
    with mark:
        mark.wrap()
    if mark.drawn_key is None:
        raise AssertionError("a barrier that is wrapped has its key")
    return mark.drawn_key
