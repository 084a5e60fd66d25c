"""Attacks on images by a thief whose copy shall not bear the mark; newer than the paper.

Most of them change pairs of images while a surrogate learns from them (arXiv 2108.02360 has some);
the others change the marked images beforehand.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Spoil: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Break: TypeAlias = Literal[
    "", "warp", "jpeg", "blur", "noise", "resize", "average", "remover", "replace"
]

_TURN, _SHRINK = 0.2, 0.25  # largest angle in radians, and largest share cropped away
_QUALITY = 75
_NOISE = 5 / 255
_SMALLER = 0.75


def warp_pairs(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate, crop and resize both images of each pair alike, at random.

    Args:
        given: inputs (N, C, H, W).
        wanted: the victim's images (N, C, H, W).
    """
    count = len(given)
    angle = _TURN * (2 * torch.rand(count) - 1)
    scale = 1 - _SHRINK * torch.rand(count)
    maps = torch.zeros(count, 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = scale * angle.cos()
    maps[:, 0, 1], maps[:, 1, 0] = -scale * angle.sin(), scale * angle.sin()
    # A crop of size `scale` can move by 1 - scale in each direction and stays inside the image.
    maps[:, :, 2] = (1 - scale)[:, None] * (2 * torch.rand(count, 2) - 1)
    grid = F.affine_grid(maps, list(given.shape), align_corners=False)
    one, other = (
        F.grid_sample(each, grid, padding_mode="reflection", align_corners=False)
        for each in (given, wanted)
    )
    return one, other


def compress_images(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Compress the victim's images by JPEG of quality 75."""
    return given, torch.stack([_compress_image(each) for each in wanted])


def blur_images(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Blur the victim's images by a 3 × 3 mean."""
    # Zero padding would darken the border of the image.
    padded = F.pad(wanted, (1, 1, 1, 1), mode="replicate")
    return given, F.avg_pool2d(padded, 3, stride=1)


def add_noise(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Add noise of 5 grey levels to the victim's images."""
    return given, wanted + _NOISE * torch.randn_like(wanted)


def resize_images(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Shrink the victim's images by a quarter and enlarge them again."""
    height, width = wanted.shape[2:]
    size = round(_SMALLER * height), round(_SMALLER * width)
    small = F.interpolate(wanted, size, mode="bilinear", align_corners=False, antialias=True)
    return given, F.interpolate(small, (height, width), mode="bilinear", align_corners=False)


SPOILS: Mapping[str, Spoil] = {
    "warp": warp_pairs, "jpeg": compress_images, "blur": blur_images, "noise": add_noise,
    "resize": resize_images,
}  # fmt: skip


def subtract_shared_pattern(marked: Tensor) -> Tensor:
    """Subtract from images uint8 (N, C, H, W) the rough pattern that all of them share.

    The pattern is the mean, over all images, of each image minus its own 5 × 5 mean: a mark that
    is the same in all images stays in it, while the content of the images cancels.
    """
    levels = marked.float()
    padded = F.pad(levels, (2, 2, 2, 2), mode="replicate")
    rough = (levels - F.avg_pool2d(padded, 5, stride=1)).mean(0)
    return (levels - rough).round().clamp(0, 255).to(torch.uint8)


def _compress_image(image: Tensor) -> Tensor:
    """Compress one image (C, H, W) with levels from 0 to 1 by JPEG."""
    # Imported late: only this attack needs Pillow.
    import PIL.Image

    # JPEG knows bytes only, so that no gradient passes through it.
    pixels = (255 * image.detach()).round().clamp(0, 255).to(torch.uint8).numpy()
    file = io.BytesIO()
    grey = len(pixels) == 1
    shown = pixels[0] if grey else pixels.transpose(1, 2, 0)
    PIL.Image.fromarray(shown).save(file, "JPEG", quality=_QUALITY)
    found = np.asarray(PIL.Image.open(file))
    return torch.from_numpy((found[None] if grey else found.transpose(2, 0, 1)).copy()) / 255
