"""Experiments in steganalysis: how often a detector tells stego images from covers.

A row is an embedder, or a scheme whose triggers the detector looks for. No host is trained.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt

from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.deepstego.stego_generators import (
    StegoMaker,
    load_owner_maker,
    make_foreign_maker,
)
from countermark.schemes.triggers import DrawnTriggerScheme, TriggerScheme
from countermark.training.build_embedding import check_fields, make_scheme
from countermark.training.data import BUNDLED, Dataset, check_place, load_data
from countermark_lab.experiments.spec import CellSpec, Name, SpecModel
from countermark_lab.steganalysis.ats import measure_ats
from countermark_lab.steganalysis.embedders import find_embedder
from countermark_lab.steganalysis.images import Embed, Images
from countermark_lab.steganalysis.rates import DetectionRates, Rate
from countermark_lab.steganalysis.supervised import measure_supervised

_STRANGERS = 8_000_000  # seeds of an attacker's networks, far from the seeds of cells


class DetectionSettings(SpecModel):
    """The data that detectors are given.

    Attributes:
        data: the data set.
        images: N, the number of test images for ATS and for the supervised detector.
        training: number of covers that the supervised detector learns from, out of the training
            images.
        network: number of images that a stego network is trained on, from the first one on.
    """

    data: str
    images: PositiveInt
    training: PositiveInt
    network: PositiveInt = 10000


class DetectionRow(SpecModel):
    """One row: an embedder by name, or a scheme with its fields.

    With `weights = "unknown"` the attacker does not have the owner's stego network, but one of the
    same recipe and another seed.
    """

    label: str
    embedder: str = ""
    scheme: str = ""
    fields: dict[str, Any] = Field(default={})
    weights: Literal["known", "unknown"] = "known"


class Detection(SpecModel):
    """The whole experiment file; `track` says what is smaller than in the paper."""

    name: Name
    title: str
    track: str
    seeds: tuple[int, ...]
    sought: DetectionSettings
    rows: tuple[DetectionRow, ...]


class DetectionCell(DetectionRow, CellSpec):
    """One row at one seed: a cell whose name is the hash of its specification."""

    sought: DetectionSettings


def expand_detection_cells(experiment: Detection) -> list[DetectionCell]:
    """Return a cell for each row of an experiment at each seed."""
    return [
        DetectionCell(
            **dict[str, Any](row), experiment=experiment.name, track=experiment.track,
            sought=experiment.sought, seed=seed,
        )
        for row in experiment.rows
        for seed in experiment.seeds
    ]  # fmt: skip


def check_detection_cell(cell: DetectionCell) -> None:
    """Check the names, fields and data set of a cell before anything is computed.

    Raises:
        CountermarkError: both or neither of embedder and scheme are given, the name is unknown, a
            field is wrong, or the data set is missing.
    """
    if bool(cell.embedder) == bool(cell.scheme):
        raise ConfigError(f"{cell.label}: give either an embedder or a scheme")
    if cell.embedder:
        find_embedder(cell.embedder)
    else:
        check_fields(cell.scheme, cell.fields)
    if cell.sought.data != BUNDLED:
        check_place(cell.sought.data)


def compute_detection_cell(cell: DetectionCell) -> dict[str, Any]:
    """Measure how often ATS and a supervised detector are right; half of the images are stego.

    Returns: `ats` and `supervised`, each with detection, true and false positives in percent, the
        ends of the 95 % interval, N, and the numbers of selected and of all features; and
        `image_size`, (C, H, W).
    """
    data, sought, seed = load_data(cell.sought.data), cell.sought, cell.seed
    covers, own = data.test_images[: sought.images].numpy(), data.train_images.numpy()
    embed, guess = _make_embedders(cell, data)
    # Stego networks learn from the first training images, so the detector takes the last ones.
    return {
        "ats": _encode_rates(measure_ats(covers, embed, seed=seed, guess=guess)),
        "supervised": _encode_rates(
            measure_supervised(own[-sought.training :], covers, embed=embed, seed=seed, guess=guess)
        ),
        "image_size": list(covers.shape[1:]),
    }


def _make_embedders(cell: DetectionCell, data: Dataset) -> tuple[Embed, Embed | None]:
    """Return the owner's embedder, and the attacker's if the attacker uses another one."""
    if cell.embedder:
        return find_embedder(cell.embedder), None
    scheme = make_scheme(cell.scheme, cell.fields, data, batches=1, stored=True)
    if isinstance(scheme, DrawnTriggerScheme):
        return _make_drawing_embedder(scheme), None
    if not isinstance(scheme, DeepStego):
        raise ConfigError(f"{cell.label}: {scheme.name} makes no images that could be looked for")
    part = data.subset(cell.sought.network, None)
    key, covers = _generate_key(scheme, part, cell.seed), part.train_images.numpy()
    # As published, the owner's network is trained together with a host. No host is trained here,
    # so a foreign network of the same recipe takes its place.
    own = (
        make_foreign_maker(key, covers, cell.seed) if scheme.as_published else load_owner_maker(key)
    )
    other = None
    if cell.weights == "unknown":
        other = _make_network_embedder(make_foreign_maker(key, covers, _STRANGERS + cell.seed))
    return _make_network_embedder(own), other


def _generate_key(scheme: TriggerScheme, data: Dataset, seed: int) -> Key:
    """Generate a key with all tensors that are made before a host is trained."""
    material = KeyMaterial.from_test_seed(seed)
    # Training a stego network must not change the random numbers that come after it.
    with torch.random.fork_rng(devices=[]):
        frozen = scheme.load_training_class().make_pre_commit_tensors(
            scheme, material, data.train_images, data.train_labels
        )
    return scheme.generate_key(frozen, owner="bench", material=material)


def _make_drawing_embedder(scheme: DrawnTriggerScheme) -> Embed:
    """Return an embedder that draws triggers; every seed is another secret."""

    def embed(images: Images, seed: int) -> Images:
        return scheme.draw_triggers(images, KeyMaterial.from_test_seed(seed))

    return embed


def _make_network_embedder(maker: StegoMaker) -> Embed:
    """Return an embedder that runs a stego network, which ignores the seed."""

    def embed(images: Images, seed: int) -> Images:  # noqa: ARG001 - a network draws nothing
        return maker(images)

    return embed


def _encode_rates(rates: DetectionRates) -> dict[str, Any]:
    """Return detection rates as JSON values, in percent."""
    low, high = rates.detection.confidence_interval
    return {
        "detection": _convert_to_percent(rates.detection),
        "low": 100 * low,
        "high": 100 * high,
        "true_positives": _convert_to_percent(rates.true_positives),
        "false_positives": _convert_to_percent(rates.false_positives),
        "images": rates.images,
        "features": [rates.selected, rates.features],
    }


def _convert_to_percent(rate: Rate) -> float:
    """Return a rate in percent."""
    return 100 * rate.value
