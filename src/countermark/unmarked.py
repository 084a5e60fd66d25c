"""Unmarked models that the examiner supplies: read by the suspect's key, and what they are held to.

Whatever a key says of unmarked models is the word of its owner. These are the examiner's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np

from countermark.answers import Predict, Recorded, asked_of
from countermark.errors import ConfigError, printable
from countermark.evidence import Evidence
from countermark.key import Key, tensor_digest
from countermark.nulls import Null, UnmarkedModels
from countermark.owners_word import CHANCE_LEVEL
from countermark.pictures import Pixels
from countermark.readings import Read, read_folder, read_images
from countermark.schemes.black_box import TriggerScheme
from countermark.schemes.box_free import OutputScheme
from countermark.schemes.white_box import WeightScheme
from countermark.subject import MOST_UNMARKED, UnmarkedModel
from countermark.weights import (
    MOST_CANDIDATES,
    Array,
    Suspect,
    as_numbers,
    assignments,
    open_weights,
)  # fmt: skip

Supplied: TypeAlias = "Suspect | Predict | Iterable[Pixels]"
"""An unmarked model as a suspect of the same key is given."""


def read_unmarked(
    supplied: Sequence[Supplied], scheme: WeightScheme, key: Key, suspect: Mapping[str, Array]
) -> tuple[UnmarkedModel, ...]:
    """Read the weights of unmarked models; equal ones count once.

    Args:
        supplied: files or live modules.
        scheme: of the key; its reader is learnt.
        key: what reads them.
        suspect: the tensors that it read of the suspect.

    Raises:
        SuspectError: one cannot be read.
        ConfigError: one has no such tensors, or there are too many of them.
    """
    found: dict[str, UnmarkedModel] = {}
    draws = math.ceil(len(_check_supplied(supplied)) / CHANCE_LEVEL)
    for each in supplied:
        with as_numbers(open_weights(cast(Suspect, each))) as weights:
            ways = list(islice(assignments(weights, key.tensors), MOST_CANDIDATES + 1))
            if not 1 <= len(ways) <= MOST_CANDIDATES:
                raise ConfigError(
                    f"the unmarked model {printable(weights.name, 200)} has no tensors of the "
                    "names or shapes that this key reads, or in too many ways: expected models of "
                    "the suspect's architecture"
                )
            for where in ways:
                tensors = scheme.read_from(weights, where, key)
                digest = _digest(tensors)
                if digest not in found:
                    read = scheme.compare_unmarked(tensors, key, suspect, draws)
                    found[digest] = UnmarkedModel(weights.name, digest, *read)
    return tuple(found.values())


def ask_unmarked(
    supplied: Sequence[Supplied], scheme: TriggerScheme, key: Key
) -> tuple[UnmarkedModel, ...]:
    """Ask unmarked models about a key's triggers.

    Raises:
        ConfigError: the key is not judged by such a rank, or there are too many models.
    """
    _require_rank(scheme, key)

    def read(model: Supplied) -> UnmarkedModel:
        suspect = cast("Suspect | Predict", model)
        evidence = scheme.extract(asked_of(suspect, scheme.mean, scheme.deviation), key)
        subject = suspect.subject() if isinstance(suspect, Recorded) else None
        name = type(model).__name__ if subject is None else subject.name
        digest = None if subject is None else subject.file_sha256
        return UnmarkedModel(name, digest, _distance(evidence))

    return _distinct(supplied, read)


def look_at_unmarked(
    supplied: Sequence[Supplied], scheme: OutputScheme, key: Key
) -> tuple[UnmarkedModel, ...]:
    """Read sets of images of unmarked networks.

    Raises:
        SuspectError: a folder cannot be read.
        ConfigError: the key is not judged by such a rank, a set holds no image, or there are too
            many sets.
    """
    _require_rank(scheme, key)

    def read(images: Supplied) -> UnmarkedModel:
        folder = Path(images) if isinstance(images, str | Path) else None
        found: Read = (
            read_images(cast(Iterable[Pixels], images), scheme, key)
            if folder is None
            else read_folder(folder, scheme, key)
        )
        if found.evidence is None:
            raise ConfigError("an unmarked set holds no image that could be read: leave it out")
        name = "images" if folder is None else str(folder)
        return UnmarkedModel(name, found.digest or None, _distance(found.evidence))

    return _distinct(supplied, read)


def ranked_among(nulls: Mapping[str, Null], unmarked: Sequence[UnmarkedModel]) -> dict[str, Null]:
    """The nulls, the rank among unmarked models being one among the examiner's where he has any."""
    found = dict(nulls)
    if unmarked:
        distances = np.array([each.distance for each in unmarked], dtype=np.float64)
        found[UnmarkedModels.name] = UnmarkedModels(distances)
    return found


def _require_rank(scheme: TriggerScheme | OutputScheme, key: Key) -> None:
    if UnmarkedModels.name not in scheme.nulls(key):
        raise ConfigError(
            f"this key of {scheme.name} is judged by no unmarked models: leave --unmarked out"
        )


def _check_supplied(supplied: Sequence[Supplied]) -> Sequence[Supplied]:
    if len(supplied) > MOST_UNMARKED:
        raise ConfigError(
            f"{len(supplied):,} unmarked models were given: expected at most {MOST_UNMARKED:,}"
        )
    return supplied


def _distinct(
    supplied: Sequence[Supplied], read: Callable[[Supplied], UnmarkedModel]
) -> tuple[UnmarkedModel, ...]:
    """What is read of each, of equal ones once."""
    found: dict[object, UnmarkedModel] = {}
    for each in {id(model): model for model in _check_supplied(supplied)}.values():
        model = read(each)
        found.setdefault(model.sha256 or id(each), model)
    return tuple(found.values())


def _distance(evidence: Evidence) -> float:
    if evidence.distance is None:
        raise AssertionError("triggers and images have a distance")
    return evidence.distance


def _digest(tensors: Mapping[str, Array]) -> str:
    return hashlib.sha256(b"".join(tensor_digest(n, t) for n, t in tensors.items())).hexdigest()
