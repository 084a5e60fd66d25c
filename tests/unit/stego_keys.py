"""Keys of DeepStego, cheap enough for a test, and the digits that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.embedding import TriggerEmbedding
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.training.data import Dataset, load_data
from countermark.training.models import build

TRIGGERS = 32
Images = NDArray[np.uint8]


@cache
def digits() -> Dataset:
    return load_data("digits").subset(512, 64)


def scheme(**fields: object) -> DeepStego:
    usual = {"triggers": TRIGGERS, "psnr": 24.0, "stego_steps": 30, "foreign": 0, "pool": 64}
    return DeepStego(10, **(usual | fields))  # type: ignore[arg-type]


def host() -> nn.Module:
    return build("mlp", {})


def batch(rows: int = 32) -> tuple[Tensor, Tensor]:
    data = digits()
    return data.normalised(data.train_images[:rows]), data.train_labels[:rows]


def embedding(seed: int = 1, siblings: Sequence[Any] = (), **fields: object) -> TriggerEmbedding:
    """A mark on its way into a host that nobody trains."""
    data, material = digits(), KeyMaterial.from_test_seed(seed)
    covers = {"covers": data.train_images, "labels": data.train_labels, "siblings": siblings}
    return scheme(**fields).embed(host(), owner="ACME Inc.", material=material, **covers)


def made(seed: int = 1, siblings: Sequence[Any] = (), **fields: object) -> Key:
    """A key whose host has seen one batch."""
    with embedding(seed, siblings, **fields) as mark:
        mark.mix(*batch())
        key = mark.drawn_key
    assert key is not None
    return key


def covers() -> Images:
    """Images that no key was made of."""
    return digits().test_images.numpy()
