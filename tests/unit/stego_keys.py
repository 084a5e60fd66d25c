"""Keys of DeepStego, cheap enough for a test, and the digits that they are made of."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import nn

from countermark.bench.data import Dataset, load_data
from countermark.bench.models import build
from countermark.key import Key, KeyMaterial
from countermark.schemes.deepstego import DeepStego

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


def made(seed: int = 1, **fields: object) -> Key:
    """A key whose host has seen one batch."""
    data, material = digits(), KeyMaterial.for_tests(seed)
    covers = {"covers": data.train_images, "labels": data.train_labels}
    with scheme(**fields).embed(host(), owner="ACME Inc.", material=material, **covers) as mark:
        mark.mix(data.normalised(data.train_images[:32]), data.train_labels[:32])
        key = mark.drawn_key
    assert key is not None
    return key


def covers() -> Images:
    """Images that no key was made of."""
    return digits().test_images.numpy()
