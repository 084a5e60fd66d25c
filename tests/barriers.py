"""A barrier cheap enough for a test, its key, and images that nobody marked."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from countermark.embedding import OutputEmbedding
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.training.image_squares import PhotographSquares, photographs
from draws import remember

SECRET = KeyMaterial(bytes(range(32)), bytes(16))
Images = NDArray[np.uint8]


def scheme(**fields: Any) -> DeepWatermarking:
    usual = {"bits": 100, "side": 32, "sizes": "tiny", "steps": 150, "psnr": 21.0, "batch": 12}
    return DeepWatermarking(**(usual | fields))


@cache
def squares() -> PhotographSquares:
    return photographs("drawn", (160, 40, 24), side=32)


def embedding(material: KeyMaterial = SECRET, **fields: Any) -> OutputEmbedding:
    """A barrier on its way behind a network that changes nothing."""
    outputs = squares().owner
    return scheme(**fields).embed(
        nn.Identity(), owner="ACME Inc.", outputs=outputs, material=material
    )


@remember
def made() -> OutputEmbedding:
    """An embedding whose barrier is trained and whose block has ended."""
    with embedding() as mark:
        mark.wrap()
    return mark


def key() -> Key:
    return made().key


@cache
def untrained(material: KeyMaterial = SECRET, **fields: Any) -> Key:
    """A key whose networks learnt nothing: what it reads is as fair as anything."""
    with embedding(material, **({"steps": 1} | fields)) as mark:
        mark.wrap()
        drawn = mark.drawn_key
    assert drawn is not None
    return drawn


def images() -> Images:
    """Images that bear no mark."""
    return squares().test.numpy()
