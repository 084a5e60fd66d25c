"""Guo and Potkonjak 2018: a message as a faint mask over the image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from countermark.answers import Images
from countermark.errors import ConfigError
from countermark.key import KeyMaterial
from countermark.schemes.base import Paper
from countermark.schemes.black_box import DrawnTriggers
from countermark.schemes.bounds import Count


@dataclass(frozen=True)
class Guo(DrawnTriggers):
    """Triggers with a message of the owner's in a few pixels each bit.

    Attributes:
        message_bits: how many pixels of an image are changed, one for each bit.
        intensity: by how many grey levels, up for a 1 and down for a 0.
    """

    triggers: Annotated[int, Field(ge=1, le=1 << 16)] = field(default=100)
    message_bits: Count = field(default=128, kw_only=True)
    intensity: Annotated[int, Field(ge=1, le=127)] = field(default=40, kw_only=True)

    name: ClassVar[str] = "guo"
    paper: ClassVar[Paper] = Paper(
        authors="J. Guo, M. Potkonjak",
        title="Watermarking Deep Neural Networks for Embedded Systems",
        venue="ICCAD",
        year=2018,
        doi="10.1145/3240765.3240862",
    )

    def draw(self, covers: Images, material: KeyMaterial) -> Images:
        """The covers with the mask, the same on all of them."""
        pixels = covers.shape[2] * covers.shape[3]
        if self.message_bits > pixels:
            raise ConfigError(
                f"{self.name}: message_bits is {self.message_bits}, an image has {pixels} pixels: "
                "take fewer"
            )
        places = material.stream("places").permutation(pixels)[: self.message_bits]
        signs = 2 * material.stream("signature").bits(self.message_bits).astype(np.int16) - 1
        mask = np.zeros(pixels, dtype=np.int16)
        mask[places] = self.intensity * signs
        masked = covers + mask.reshape(covers.shape[2:])
        return masked.clip(0, 255).astype(np.uint8)
