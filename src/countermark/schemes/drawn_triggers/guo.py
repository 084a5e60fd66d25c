"""Guo and Potkonjak 2018: triggers that are images under a faint mask with a message."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from countermark.errors import ConfigError
from countermark.keys.key import KeyMaterial
from countermark.predictors.base import Images
from countermark.schemes.base import Paper
from countermark.schemes.key_limits import Count
from countermark.schemes.triggers import DrawnTriggerScheme


@dataclass(frozen=True)
class Guo(DrawnTriggerScheme):
    """A scheme whose triggers carry a message of the owner in some of their pixels.

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

    def draw_triggers(self, covers: Images, material: KeyMaterial) -> Images:
        """Add the same mask of the message to each cover.

        Raises:
            ConfigError: the message has more bits than an image has pixels.
        """
        pixels = covers.shape[2] * covers.shape[3]
        if self.message_bits > pixels:
            raise ConfigError(
                f"{self.name}: message_bits is {self.message_bits}, an image has {pixels} pixels: "
                "take fewer"
            )
        # Each bit has a pixel of its own, which all channels share.
        places = material.make_stream("places").draw_permutation(pixels)[: self.message_bits]
        signs = (
            2 * material.make_stream("signature").take_bits(self.message_bits).astype(np.int16) - 1
        )
        # Signed and wide enough for sums beyond 0 to 255, which are clipped below.
        mask = np.zeros(pixels, dtype=np.int16)
        mask[places] = self.intensity * signs
        masked = covers + mask.reshape(covers.shape[2:])
        return masked.clip(0, 255).astype(np.uint8)
