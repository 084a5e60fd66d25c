"""Tasks from images to images, by what is to be undone: streaks of rain, noise, a coarse raster.

The paper's other task, taking bones out of radiographs, has no data that can be had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Task: TypeAlias = Literal["derain", "denoise", "super_resolution"]

_NOISE = 25.0  # grey levels
_STREAKS = 0.015  # of all pixels one begins here


def spoilt(images: Tensor, task: Task, seed: int) -> Tensor:
    """What the network is given: images uint8 (N, C, H, W) with what its task is to undo."""
    random = np.random.default_rng(seed)
    found = np.stack([_SPOILERS[task](each, random) for each in images.numpy()])
    return torch.from_numpy(found)


def rain(image: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Streaks over an image (C, H, W): all of one slant, of many lengths and brightnesses."""
    height, width = image.shape[1:]
    slant, longest = random.uniform(-0.5, 0.5), int(random.integers(8, 20))
    starts = (random.random((height, width)) < _STREAKS) * random.uniform(0.3, 1, (height, width))
    veil = np.zeros((height, width))
    for step in range(longest):
        moved = np.roll(starts, (step, round(step * slant)), (0, 1))
        veil = np.maximum(veil, moved * (1 - step / longest))
    light = image + (0.8 * veil)[None] * (255.0 - image)
    return np.rint(light).astype(np.uint8)


def noise(image: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Gaussian noise of 25 grey levels."""
    noisy = image + _NOISE * random.normal(size=image.shape)
    return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)


def coarse(image: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:  # noqa: ARG001
    """Halved, and enlarged again bilinearly: the network is to put the detail back."""
    levels = torch.from_numpy(image.copy()).float()[None]
    half = F.avg_pool2d(levels, 2)
    large = F.interpolate(half, image.shape[1:], mode="bilinear", align_corners=False)
    found: NDArray[np.uint8] = large[0].round().clamp(0, 255).to(torch.uint8).numpy()
    return found


_SPOILERS: Mapping[str, Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]] = {
    "derain": rain,
    "denoise": noise,
    "super_resolution": coarse,
}
