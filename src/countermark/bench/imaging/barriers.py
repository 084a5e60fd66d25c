"""Barriers of experiments: trained once, kept as keys in a cache, shared by all that copy them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import rfc8785
from filelock import FileLock
from torch import nn

from countermark.bench.imaging.experiment import ImagingCell
from countermark.bench.imaging.photographs import Photographs
from countermark.bench.imaging.tasks import spoilt
from countermark.bench.train import Checkpoint
from countermark.embedding import OutputEmbedding
from countermark.keys.key import Key, KeyMaterial
from countermark.predictors.base import Images
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.outputs_training import Given

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
    given = data.owner, spoilt(data.owner, cell.images.task, 3)
    key = kept_key(folder, scheme, KeyMaterial.from_test_seed(cell.seed), given, "bench")
    return scheme.with_calibration(key, [list(each) for each in siblings])


def kept_key(
    folder: Path, scheme: DeepWatermarking, material: KeyMaterial, given: Given, owner: str
) -> Key:
    """The key in a folder of the cache, trained if nobody did before; see `trained_key`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            checkpoint = Checkpoint(folder.with_suffix(".pt"))
            trained_key(scheme, material, given, owner, checkpoint).save(folder)
            checkpoint.remove()
    return Key.load(folder)


def trained_key(
    scheme: DeepWatermarking, material: KeyMaterial, given: Given, owner: str,
    saving: Checkpoint | None = None,
) -> Key:  # fmt: skip
    """A key whose networks are trained here and now, not calibrated on siblings.

    Args:
        scheme: the configuration.
        material: the secret.
        given: what is marked, uint8 (N, C, S, S), and what it was made of.
        owner: whom the key names.
        saving: where the training is saved, and taken up again.
    """
    outputs, inputs = given
    mark = OutputEmbedding(
        scheme, nn.Identity(), owner=owner, outputs=outputs, inputs=inputs, material=material
    )
    mark.saving = saving
    with mark:
        mark.wrap()
    if mark.drawn_key is None:
        raise AssertionError("a barrier that is wrapped has its key")
    return mark.drawn_key
