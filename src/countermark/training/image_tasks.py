"""Image-to-image tasks, by the defect that the network removes: rain, noise, or a coarse raster.

The data of the paper's other task, removing bones from radiographs, are not available.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from countermark.schemes.deepstego.networks import compute_ssim

Task: TypeAlias = Literal["derain", "denoise", "super_resolution"]

_NOISE = 25.0  # grey levels
_STREAKS = 0.015  # share of pixels at which a streak begins


def spoil_images(images: Tensor, task: Task, seed: int) -> Tensor:
    """Return the inputs of a task: images uint8 (N, C, H, W) with the defect added.

    Args:
        images: the images that the network should produce.
        task: names the defect.
        seed: of its random numbers.
    """
    random = np.random.default_rng(seed)
    found = np.stack([_SPOILERS[task](each, random) for each in images.numpy()])
    return torch.from_numpy(found)


def compare_images(one: Tensor, other: Tensor) -> dict[str, float]:
    """Compute PSNR and SSIM between two sets of images uint8 (n, C, H, W).

    Returns: `psnr` in dB of the mean squared error over all images, and the mean `ssim`.
    """
    a, b = (each.float() / 255 for each in (one, other))
    # Equal images would have an infinite PSNR, which JSON cannot hold; this bound gives 100 dB.
    error = max(float((a - b).square().mean()), 1e-10)
    return {"psnr": -10 * float(np.log10(error)), "ssim": float(compute_ssim(a, b).mean())}


def add_rain(image: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Add rain to an image (C, H, W): streaks of one slant, of many lengths and brightnesses."""
    height, width = image.shape[1:]
    slant, longest = random.uniform(-0.5, 0.5), int(random.integers(8, 20))
    starts = (random.random((height, width)) < _STREAKS) * random.uniform(0.3, 1, (height, width))
    veil = np.zeros((height, width))
    for step in range(longest):
        moved = np.roll(starts, (step, round(step * slant)), (0, 1))
        # The brighter streak wins where two cross; each fades along its length.
        veil = np.maximum(veil, moved * (1 - step / longest))
    # A streak moves a pixel towards white, by at most 80 % of the distance.
    light = image + (0.8 * veil)[None] * (255.0 - image)
    return np.rint(light).astype(np.uint8)


def add_noise(image: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Add Gaussian noise of 25 grey levels."""
    noisy = image + _NOISE * random.normal(size=image.shape)
    return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)


def coarsen_image(image: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:  # noqa: ARG001
    """Halve an image and enlarge it again bilinearly, so that its detail is lost."""
    levels = torch.from_numpy(image.copy()).float()[None]
    half = F.avg_pool2d(levels, 2)
    large = F.interpolate(half, image.shape[1:], mode="bilinear", align_corners=False)
    found: NDArray[np.uint8] = large[0].round().clamp(0, 255).to(torch.uint8).numpy()
    return found


_SPOILERS: Mapping[str, Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]] = {
    "derain": add_rain,
    "denoise": add_noise,
    "super_resolution": coarsen_image,
}
