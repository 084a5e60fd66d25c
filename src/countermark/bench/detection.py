"""Experiments in steganalysis: how often stego images are told from covers.

A row is an embedder, or a scheme whose triggers are looked for; no host is trained.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt

from countermark.bench.data import BUNDLED, Dataset, check_place, load_data
from countermark.bench.marking import check_fields, scheme_for
from countermark.bench.strict import Addressed, Name, Strict
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.deepstego.stego_generators import (
    StegoMaker,
    load_owner_maker,
    make_foreign_maker,
)
from countermark.schemes.triggers import DrawnTriggerScheme, TriggerScheme
from countermark.steganalysis.ats import measure_ats
from countermark.steganalysis.embedders import find_embedder
from countermark.steganalysis.images import Embed, Images
from countermark.steganalysis.rates import DetectionRates, Rate
from countermark.steganalysis.supervised import measure_supervised

_STRANGERS = 8_000_000  # seeds of networks that are nobody's in particular


class Sought(Strict):
    """How it is looked for.

    Attributes:
        data: whose images; stego networks are trained on the first `network` of them.
        images: N: of the test images for ATS, and as many for the detector to be asked about.
        training: covers that the supervised detector has, of the training images.
        network: images that a stego network is trained on.
    """

    data: str
    images: PositiveInt
    training: PositiveInt
    network: PositiveInt = 10000


class Hidden(Strict):
    """One row: an embedder by name, or a scheme with its fields.

    With `weights = "unknown"` the attacker has a stego network of the same recipe and another
    seed, not the owner's.
    """

    label: str
    embedder: str = ""
    scheme: str = ""
    fields: dict[str, Any] = Field(default={})
    weights: Literal["known", "unknown"] = "known"


class Detection(Strict):
    """The whole file; `track` says what is scaled down."""

    name: Name
    title: str
    track: str
    seeds: tuple[int, ...]
    sought: Sought
    rows: tuple[Hidden, ...]


class Detected(Hidden, Addressed):
    """One row at one seed: a cell, named by the hash of its specification."""

    sought: Sought


def cells_of(experiment: Detection) -> list[Detected]:
    """Its rows at each of its seeds."""
    return [
        Detected(
            **dict[str, Any](row), experiment=experiment.name, track=experiment.track,
            sought=experiment.sought, seed=seed,
        )
        for row in experiment.rows
        for seed in experiment.seeds
    ]  # fmt: skip


def check(cell: Detected) -> None:
    """What can be known to be wrong before anything is computed.

    Raises:
        CountermarkError: not one of embedder and scheme is given, there is none of that name, it
            makes no triggers, or the data set is not there.
    """
    if bool(cell.embedder) == bool(cell.scheme):
        raise ConfigError(f"{cell.label}: give either an embedder or a scheme")
    if cell.embedder:
        find_embedder(cell.embedder)
    else:
        check_fields(cell.scheme, cell.fields)
    if cell.sought.data != BUNDLED:
        check_place(cell.sought.data)


def compute(cell: Detected) -> dict[str, Any]:
    """How often ATS and a supervised detector are right about a set of which half is stego images.

    Returns: `ats` and `supervised`, each with detection, true and false positives in percent, the
        ends of the interval of 95 %, N, and how many features were read of how many.
    """
    data, sought, seed = load_data(cell.sought.data), cell.sought, cell.seed
    covers, own = data.test_images[: sought.images].numpy(), data.train_images.numpy()
    embed, guess = _embedders(cell, data)
    return {
        "ats": _shown(measure_ats(covers, embed, seed=seed, guess=guess)),
        "supervised": _shown(
            measure_supervised(own[-sought.training :], covers, embed=embed, seed=seed, guess=guess)
        ),
        "image_size": list(covers.shape[1:]),
    }


def _embedders(cell: Detected, data: Dataset) -> tuple[Embed, Embed | None]:
    """What makes the stego images, and what the attacker takes for it if that is another."""
    if cell.embedder:
        return find_embedder(cell.embedder), None
    scheme = scheme_for(cell.scheme, cell.fields, data, batches=1, stored=True)
    if isinstance(scheme, DrawnTriggerScheme):
        return _drawing(scheme), None
    if not isinstance(scheme, DeepStego):
        raise ConfigError(f"{cell.label}: {scheme.name} makes no images that could be looked for")
    part = data.subset(cell.sought.network, None)
    key, covers = _key(scheme, part, cell.seed), part.train_images.numpy()
    # As published the owner's network is trained with a host; a stranger's is the same without.
    own = (
        make_foreign_maker(key, covers, cell.seed) if scheme.as_published else load_owner_maker(key)
    )
    other = None
    if cell.weights == "unknown":
        other = _painting(make_foreign_maker(key, covers, _STRANGERS + cell.seed))
    return _painting(own), other


def _key(scheme: TriggerScheme, data: Dataset, seed: int) -> Key:
    """A key with all that is made before there is a host."""
    material = KeyMaterial.from_test_seed(seed)
    with torch.random.fork_rng(devices=[]):
        frozen = scheme.load_training_class().make_pre_commit_tensors(
            scheme, material, data.train_images, data.train_labels
        )
    return scheme.generate_key(frozen, owner="bench", material=material)


def _drawing(scheme: DrawnTriggerScheme) -> Embed:
    def embed(images: Images, seed: int) -> Images:
        return scheme.draw_triggers(images, KeyMaterial.from_test_seed(seed))

    return embed


def _painting(maker: StegoMaker) -> Embed:
    def embed(images: Images, seed: int) -> Images:  # noqa: ARG001 - a network draws nothing
        return maker(images)

    return embed


def _shown(rates: DetectionRates) -> dict[str, Any]:
    low, high = rates.detection.confidence_interval
    return {
        "detection": _percent(rates.detection),
        "low": 100 * low,
        "high": 100 * high,
        "true_positives": _percent(rates.true_positives),
        "false_positives": _percent(rates.false_positives),
        "images": rates.images,
        "features": [rates.selected, rates.features],
    }


def _percent(rate: Rate) -> float:
    return 100 * rate.value
