"""Photographs for image-to-image tasks, cut into squares; owner, thief and test share no image.

`drawn` is bundled: scenes that this module draws, so that everything runs without a data set. A
folder of image files (BSDS500, for example) gives photographs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from countermark.errors import DataError
from countermark.images.image_files import Pixels
from countermark.images.image_folder import ImageFolder
from countermark.schemes.logo import average_areas
from countermark.schemes.outputs import convert_to_grey

DRAWN = "drawn"
Part: TypeAlias = Literal["owner", "thief", "test"]

_SHARES = {"owner": (0, 45), "thief": (45, 90), "test": (90, 100)}  # percent of the files
_DRAWN = 120  # number of drawn scenes


@dataclass(frozen=True)
class PhotographSquares:
    """Squares uint8 (N, C, S, S) of owner, thief and test."""

    owner: Tensor
    thief: Tensor
    test: Tensor


def photographs(
    name: str, counts: tuple[int, int, int], *, side: int = 64, channels: int = 1, seed: int = 0
) -> PhotographSquares:
    """Cut squares for owner, thief and test at random from images of half size.

    Args:
        name: `drawn`, or a folder of image files.
        counts: number of squares for owner, thief and test.
        side: S, of a square.
        channels: 1 for grey, 3 for colour.
        seed: of the cuts; the images of each part follow from their names alone.

    Raises:
        DataError: there are too few images of that size.
        SuspectError: the folder cannot be read.
    """
    scenes = _load_scenes(name, side, channels)
    cut = [
        # Each part has a generator of its own: more squares for one leave the others unchanged.
        _cut_squares(_select_part(scenes, part), count, side, np.random.default_rng([seed, order]))
        for order, (part, count) in enumerate(zip(_SHARES, counts, strict=True))
    ]
    return PhotographSquares(*cut)


def _load_scenes(name: str, side: int, channels: int) -> dict[str, Pixels]:
    """Return images (C, H, W) by name, each at least as large as a square."""
    if name == DRAWN:
        return {f"{each}": draw_scene(each, max(96, side), channels) for each in range(_DRAWN)}
    found = {}
    # Images are halved below, so that they need twice the side of a square.
    for output in ImageFolder(Path(name), 2 * side).read():
        if output.picture is not None:
            found[output.name] = _halve_image(output.picture, channels)
    if len(found) < 10:
        raise DataError(
            f"{name}: {len(found)} pictures with sides of {2 * side} pixels or more: expected 10 "
            "at least, so that owner, thief and test share none"
        )
    return found


def _select_part(scenes: dict[str, Pixels], part: str) -> list[Pixels]:
    """Return the images of a part, by the order of their names' digests, without any seed."""
    ordered = sorted(scenes, key=lambda name: hashlib.sha256(name.encode()).digest())
    # Rounded up: the parts follow each other without gap or overlap.
    first, end = (-(-share * len(ordered) // 100) for share in _SHARES[part])
    return [scenes[name] for name in ordered[first:end]]


def _cut_squares(
    scenes: list[Pixels], count: int, side: int, random: np.random.Generator
) -> Tensor:
    """Cut `count` squares at random from the images, as a tensor (count, C, S, S)."""
    found = np.empty((count, len(scenes[0]), side, side), dtype=np.uint8)
    for row in range(count):
        picture = scenes[int(random.integers(len(scenes)))]
        down, right = (int(random.integers(size - side + 1)) for size in picture.shape[1:])
        found[row] = picture[:, down : down + side, right : right + side]
    return torch.from_numpy(found)


def _halve_image(picture: Pixels, channels: int) -> Pixels:
    """Convert an image to `channels` channels and halve its height and width."""
    if channels == 1 and len(picture) == 3:
        picture = convert_to_grey(picture)
    elif channels == 3 and len(picture) == 1:
        picture = np.repeat(picture, 3, axis=0)
    half = average_areas(picture, picture.shape[1] // 2, picture.shape[2] // 2)
    levels: Pixels = np.rint(half).astype(np.uint8)
    return levels


def draw_scene(seed: int, side: int = 96, channels: int = 1) -> Pixels:
    """Draw a scene (C, S, S): a slanted ground, discs and bars, texture, a little blur."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    slope = random.normal(size=(channels, 2))
    picture = 0.5 + 0.25 * (slope[:, :1, None] * (x - 0.5) + slope[:, 1:, None] * (y - 0.5))
    for _ in range(int(random.integers(6, 14))):
        where, size = random.random(2), 0.05 + 0.25 * random.random()
        turn = random.random() * np.pi
        across = np.cos(turn) * (x - where[0]) + np.sin(turn) * (y - where[1])
        along = np.cos(turn) * (y - where[1]) - np.sin(turn) * (x - where[0])
        disc = np.hypot(across, along) < size / 2
        shape = disc if random.random() < 0.5 else (abs(across) < size / 4) & (abs(along) < size)
        colour = random.random(channels)[:, None, None]
        texture = 0.08 * np.sin(2 * np.pi * (across * random.integers(5, 30) + random.random()))
        picture = np.where(shape, colour + texture, picture)
    grain = 0.02 * random.normal(size=picture.shape)
    # A mean with the left and upper neighbours softens hard edges.
    softer = (picture + np.roll(picture, 1, 1) + np.roll(picture, 1, 2)) / 3
    drawn: Pixels = np.rint(255 * np.clip(softer + grain, 0, 1)).astype(np.uint8)
    return drawn
