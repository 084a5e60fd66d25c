"""Data sets cut to the input of a host: grey images of 28 x 28, and a range of training rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from countermark.errors import DataError
from countermark.training.data import Dataset

SIDE, CLASSES = 28, 10  # the MLP of `build("mlp", {})` reads 28 x 28 pixels
_LUMA = (19595, 38470, 7471)  # Rec. 601: 0.299, 0.587, 0.114, times 2^16


def convert_to_grey28(data: Dataset) -> Dataset:
    """Convert images to grey (Rec. 601 luma) and crop each to its middle 28 x 28 pixels.

    Raises:
        DataError: the images are smaller than 28 x 28.
    """
    train, test = (
        _convert_images_to_grey28(data.name, data.train_images),
        _convert_images_to_grey28(data.name, data.test_images),
    )
    return replace(data, train_images=train, test_images=test)


def select_training_rows(data: Dataset, rows: tuple[int, int] | None) -> Dataset:
    """Keep only the training rows from `rows[0]` up to, but without, `rows[1]`.

    The pixel scale then follows from these rows. None keeps all rows.

    Raises:
        DataError: the range is empty, or reaches beyond the training rows.
    """
    if rows is None:
        return data
    first, end = rows
    if not 0 <= first < end <= len(data.train_labels):
        most = len(data.train_labels)
        raise DataError(f"{data.name}: expected rows within 0 to {most}, got {first} to {end}")
    images, labels = data.train_images[first:end], data.train_labels[first:end]
    return replace(data, train_images=images, train_labels=labels)


def check_fits_mlp(data: Dataset) -> None:
    """Raise an error if the MLP without arguments does not take these images and classes.

    Raises:
        DataError: the images are not 1 x 28 x 28, or there are more than 10 classes.
    """
    shape = list(data.train_images.shape[1:])
    if shape != [1, SIDE, SIDE] or data.classes > CLASSES:
        raise DataError(
            f"{data.name}: expected at most {CLASSES} classes and pictures of shape "
            f"[1, {SIDE}, {SIDE}], got {data.classes} and {shape}; grey28 adapts larger pictures"
        )


def _convert_images_to_grey28(name: str, images: Tensor) -> Tensor:
    """Convert images uint8 (N, C, H, W) to luma (N, 1, 28, 28), the middle of each image."""
    height, width = images.shape[2:]
    if min(height, width) < SIDE:
        raise DataError(f"{name}: grey28 needs pictures of 28 x 28 or more, got {height} x {width}")
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    middle = images[:, :, top : top + SIDE, left : left + SIDE]
    if len(middle[0]) == 1:
        return middle.contiguous()
    # The weights sum to 2^16: integers give the same bytes on every machine.
    red, green, blue = (w * part.int() for w, part in zip(_LUMA, middle.unbind(1), strict=True))
    # Adding half of 2^16 before the shift rounds to the nearest level.
    return ((red + green + blue + 0x8000) >> 16).to(torch.uint8)[:, None]  # (N, 1, 28, 28)
