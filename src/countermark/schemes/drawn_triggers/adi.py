"""Adi et al. 2018: abstract images, each with a random label, memorised by the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from countermark.keys.key import KeyMaterial
from countermark.predictors.base import Images
from countermark.schemes.base import Paper
from countermark.schemes.triggers import DrawnTriggerScheme

_WAVES = 6  # for each channel of an image
_HIGHEST = 6.0  # periods across an image


@dataclass(frozen=True)
class Adi(DrawnTriggerScheme):
    """A scheme whose triggers resemble no image of the host's task.

    Differs from the paper: the abstract images of the paper were collected; the triggers here are
    sums of random waves.
    """

    triggers: Annotated[int, Field(ge=1, le=1 << 16)] = field(default=100)

    name: ClassVar[str] = "adi"
    paper: ClassVar[Paper] = Paper(
        authors="Y. Adi, C. Baum, M. Cisse, B. Pinkas, J. Keshet",
        title="Turning Your Weakness Into a Strength: Watermarking Deep Neural Networks by "
        "Backdooring",
        venue="USENIX Security",
        year=2018,
        doi="",
    )

    def draw_triggers(self, covers: Images, material: KeyMaterial) -> Images:
        """Draw the triggers as sums of waves in random directions, one image for each cover."""
        n, channels, height, width = covers.shape
        # Four normal numbers for each wave: two frequencies, a phase in radians, and an amplitude.
        drawn = material.make_stream("waves").draw_normal_rows(n * channels, 4 * _WAVES)
        down, right, phase, loud = drawn.reshape(n, channels, 4, _WAVES, 1, 1).swapaxes(0, 2)
        y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
        turns = _HIGHEST / 2 * (down * y + right * x) + phase
        waves = (loud * np.sin(2 * np.pi * turns)).sum(axis=2)  # (C, n, H, W)
        # Each channel is scaled to use the whole range 0 to 255.
        spread = np.abs(waves).max(axis=(2, 3), keepdims=True)
        levels = np.rint(127.5 + 127.5 * waves / spread).astype(np.uint8)
        return np.ascontiguousarray(levels.swapaxes(0, 1))
