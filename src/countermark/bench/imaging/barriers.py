"""Barriers of experiments: trained once, kept as keys in a cache, shared by all that copy them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import rfc8785
from filelock import FileLock

from countermark.answers import Images
from countermark.bench.imaging.experiment import ImagingCell
from countermark.bench.imaging.photographs import Photographs
from countermark.bench.imaging.tasks import spoilt
from countermark.bench.train import Checkpoint
from countermark.key import Key, KeyMaterial
from countermark.schemes.deep_watermarking import DeepWatermarking

CACHE = Path(".cache/images")


def scheme_in(cell: ImagingCell) -> DeepWatermarking:
    """The scheme of a cell; what it has to know of the images is taken from them."""
    known = {"channels": cell.images.channels, "side": cell.images.side, "task": cell.images.task}
    return DeepWatermarking.from_fields(known | cell.form.fields)


def barrier_key(cell: ImagingCell, data: Photographs, siblings: Sequence[Images]) -> Key:
    """The key of a cell's barrier, trained if nobody did before.

    Args:
        cell: its form, images and seed are what it follows from.
        data: the owner's images are what H and R are trained on.
        siblings: images of unmarked networks, for the published form.
    """
    scheme = scheme_in(cell)
    content: dict[str, Any] = {
        "fields": {each.name: scheme.to_fields()[each.name] for each in fields(scheme)},
        "images": cell.images.model_dump(mode="json"),
        "seed": cell.seed,
    }
    digest = hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]
    folder = CACHE / f"{digest}.key"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _trained(scheme, cell, data, folder)
    return scheme.calibrated(Key.load(folder), [list(each) for each in siblings])


def _trained(scheme: DeepWatermarking, cell: ImagingCell, data: Photographs, folder: Path) -> None:
    checkpoint = Checkpoint(folder.with_suffix(".pt"))
    inputs = spoilt(data.owner, cell.images.task, 3)
    material = KeyMaterial.for_tests(cell.seed)
    training = scheme.training()(scheme, material, (data.owner, inputs), checkpoint)
    frozen = training.frozen()
    key = scheme.generate_key(frozen, owner="bench", material=material)
    replace(key, learnt=training.learnt(key)).save(folder)
    checkpoint.remove()
