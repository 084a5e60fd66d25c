"""Unmarked models that the examiner supplies: read them with the key, and rank the suspect.

A key's own statements about unmarked models are the word of its owner. The models in this module
come from the examiner.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np

from countermark.checkpoints import (
    MOST_CANDIDATES,
    Array,
    Suspect,
    find_assignments,
    open_suspect,
)  # fmt: skip
from countermark.errors import ConfigError, make_printable
from countermark.images.image_files import Pixels
from countermark.keys.key import Key, digest_tensor
from countermark.predictors.base import DescribedPredictor, Predictor, make_predictor
from countermark.results.null_hypotheses import NullHypothesis, UnmarkedModels
from countermark.results.owner_statements import CHANCE_LEVEL
from countermark.results.reading import Reading
from countermark.results.subject import MOST_UNMARKED, UnmarkedModel
from countermark.schemes.outputs import OutputScheme
from countermark.schemes.triggers import TriggerScheme
from countermark.schemes.weights import WeightScheme
from countermark.verification.image_sets import ImageSetReading, read_folder, read_images

Supplied: TypeAlias = "Suspect | Predictor | Iterable[Pixels]"
"""An unmarked model as a suspect of the same key is given."""


def read_unmarked_weights(
    supplied: Sequence[Supplied], scheme: WeightScheme, key: Key, suspect: Mapping[str, Array]
) -> tuple[UnmarkedModel, ...]:
    """Read the weights of unmarked models; models with equal tensors count once.

    Args:
        supplied: files or live modules.
        scheme: scheme of the key; its reader is learnt.
        key: the key that reads the models.
        suspect: the tensors that the key read from the suspect.

    Raises:
        SuspectError: a model cannot be read.
        ConfigError: a model lacks tensors that the key reads, or there are too many models.
    """
    # Equal models count once: copies of one model would give a rank among more models than exist.
    found: dict[str, UnmarkedModel] = {}
    # Enough draws that a rank can fall below CHANCE_LEVEL / n, a Bonferroni bound over models.
    draws = math.ceil(len(_check_supplied(supplied)) / CHANCE_LEVEL)
    for each in supplied:
        with open_suspect(cast(Suspect, each)) as weights:
            ways = list(islice(find_assignments(weights, key.tensors), MOST_CANDIDATES + 1))
            if not 1 <= len(ways) <= MOST_CANDIDATES:
                raise ConfigError(
                    f"the unmarked model {make_printable(weights.name, 200)} has no tensors of the "
                    "names or shapes that this key reads, or in too many ways: expected models of "
                    "the suspect's architecture"
                )
            # The suspect is read in every way too, so each assignment counts as one model.
            for where in ways:
                tensors = scheme.read_suspect_tensors(weights, where, key)
                digest = _digest_tensors(tensors)
                if digest not in found:
                    read = scheme.compare_unmarked_model(tensors, key, suspect, draws)
                    found[digest] = UnmarkedModel(weights.name, digest, *read)
    return tuple(found.values())


def query_unmarked_models(
    supplied: Sequence[Supplied], scheme: TriggerScheme, key: Key
) -> tuple[UnmarkedModel, ...]:
    """Query unmarked models about a key's triggers.

    Args:
        supplied: live modules, or functions from images to classes.
        scheme: scheme of the key.
        key: the key of triggers.

    Raises:
        ConfigError: the key is not judged by a rank among unmarked models, or there are too many
            models.
    """
    _require_rank(scheme, key)

    def read(model: Supplied) -> UnmarkedModel:
        """Query one model, and return its number of misses as its distance."""
        # Live functions have no digest: two of them count as distinct models.
        suspect = cast("Suspect | Predictor", model)
        evidence = scheme.extract(make_predictor(suspect, scheme.mean, scheme.deviation), key)
        subject = suspect.subject() if isinstance(suspect, DescribedPredictor) else None
        name = type(model).__name__ if subject is None else subject.name
        digest = None if subject is None else subject.file_sha256
        return UnmarkedModel(name, digest, _require_distance(evidence))

    return _read_distinct(supplied, read)


def read_unmarked_images(
    supplied: Sequence[Supplied], scheme: OutputScheme, key: Key
) -> tuple[UnmarkedModel, ...]:
    """Read sets of images from unmarked networks.

    Args:
        supplied: folders of images, or images uint8 (C, H, W).
        scheme: scheme of the key.
        key: the key of outputs.

    Raises:
        SuspectError: a folder cannot be read.
        ConfigError: the key is not judged by a rank among unmarked models, a set holds no image, or
            there are too many sets.
    """
    _require_rank(scheme, key)

    def read(images: Supplied) -> UnmarkedModel:
        """Read one set of images, and return its share of failures as its distance."""
        folder = Path(images) if isinstance(images, str | Path) else None
        found: ImageSetReading = (
            read_images(cast(Iterable[Pixels], images), scheme, key)
            if folder is None
            else read_folder(folder, scheme, key)
        )
        if found.evidence is None:
            raise ConfigError("an unmarked set holds no image that could be read: leave it out")
        name = "images" if folder is None else str(folder)
        return UnmarkedModel(name, found.digest or None, _require_distance(found.evidence))

    return _read_distinct(supplied, read)


def add_unmarked_rank(
    nulls: Mapping[str, NullHypothesis], unmarked: Sequence[UnmarkedModel]
) -> dict[str, NullHypothesis]:
    """Return the nulls; models of the examiner replace the key's own unmarked models, if any."""
    found = dict(nulls)
    # The distances in the key are the owner's word; the examiner's models take their place.
    if unmarked:
        distances = np.array([each.distance for each in unmarked], dtype=np.float64)
        found[UnmarkedModels.name] = UnmarkedModels(distances)
    return found


def _require_rank(scheme: TriggerScheme | OutputScheme, key: Key) -> None:
    """Raise ConfigError if the key is not judged by a rank among unmarked models."""
    if UnmarkedModels.name not in scheme.nulls(key):
        raise ConfigError(
            f"this key of {scheme.name} is judged by no unmarked models: leave --unmarked out"
        )


def _check_supplied(supplied: Sequence[Supplied]) -> Sequence[Supplied]:
    """Return the supplied models unchanged.

    Raises:
        ConfigError: there are more than `MOST_UNMARKED` models.
    """
    if len(supplied) > MOST_UNMARKED:
        raise ConfigError(
            f"{len(supplied):,} unmarked models were given: expected at most {MOST_UNMARKED:,}"
        )
    return supplied


def _read_distinct(
    supplied: Sequence[Supplied], read: Callable[[Supplied], UnmarkedModel]
) -> tuple[UnmarkedModel, ...]:
    """Read each model once, and keep one of several models with equal digests."""
    found: dict[object, UnmarkedModel] = {}
    # The same object given twice is read once, even if it has no digest.
    for each in {id(model): model for model in _check_supplied(supplied)}.values():
        model = read(each)
        found.setdefault(model.sha256 or id(each), model)
    return tuple(found.values())


def _require_distance(evidence: Reading) -> float:
    """Return the distance of a reading of triggers or images, which always have one."""
    if evidence.mark_distance is None:
        raise AssertionError("triggers and images have a distance")
    return evidence.mark_distance


def _digest_tensors(tensors: Mapping[str, Array]) -> str:
    """Return the SHA-256 of named tensors, in hexadecimal."""
    return hashlib.sha256(b"".join(digest_tensor(n, t) for n, t in tensors.items())).hexdigest()
