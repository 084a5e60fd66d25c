"""Data sets as tensors: the bundled digits, a directory, or an id on the Hugging Face hub."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from countermark._internal.progress import show_progress
from countermark.errors import CountermarkError, DataError, MissingExtraError
from countermark.images.image_files import Pixels, decode_image

BUNDLED = "digits"
BATCH = 1000  # rows decoded between two updates of the progress bar

Split: TypeAlias = tuple[list[Pixels], list[int]]
Row: TypeAlias = tuple[Mapping[str, Any] | None, object]
Batch: TypeAlias = Mapping[str, list[Any]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, uint8 (N, C, H, W) with C = 1 or 3, and int64 labels (N,) below `classes`.

    Rows are in random order: the source is shuffled, or `load_data` has shuffled the rows. A model
    receives standardised pixels, or with `unit_pixels` levels from 0 to 1.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    unit_pixels: bool = False

    def normalised(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardise images with the mean and deviation of this set's training images.

        With `unit_pixels` the images are divided by 255 instead.

        Args:
            images: uint8 (N, C, H, W), of this set or of the same shape.
            dtype: dtype of the result.

        Returns: (N, C, H, W); a channel of the training images has mean 0 and deviation 1.
        """
        mean, deviation = (part.to(images.device, dtype) for part in self._channel_scale)
        # The difference takes the dtype of the mean; a data set is copied once, not thrice.
        return (images - mean).div_(deviation)

    @property
    def scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel in grey levels, as `normalised` uses them."""
        mean, deviation = (tuple(each.flatten().tolist()) for each in self._channel_scale)
        return mean, deviation

    def subset(self, train: int | None = None, test: int | None = None) -> Dataset:
        """Return the first `train` and first `test` rows, or all where None; tensors are shared.

        The first rows are a random sample, since rows are in random order. `normalised` of the
        result uses the mean and deviation of the remaining training images.

        Raises:
            DataError: fewer than one row is requested, or more than the set has.
        """
        _check_rows("train", train, len(self.train_labels))
        _check_rows("test", test, len(self.test_labels))
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    @cached_property
    def _channel_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation per channel in grey levels 0 to 255, float64 (C, 1, 1) each."""
        # Mean 0 and deviation 255 turn standardising into a division by 255.
        if self.unit_pixels:
            channels = self.train_images.shape[1]
            nothing = torch.zeros(channels, 1, 1, dtype=torch.float64)
            return nothing, nothing + 255
        levels = torch.arange(256, dtype=torch.float64)
        # Counting the 256 levels is exact and spares a float copy of all images.
        planes = self.train_images.cpu().unbind(1)
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in planes])
        shares = counts / counts.sum(1, keepdim=True, dtype=torch.float64)  # (C, 256)
        mean = shares @ levels
        variance = (shares * (levels - mean[:, None]) ** 2).sum(1)
        # A channel of one level has no deviation to divide by: it becomes 0 everywhere.
        deviation = torch.where(variance > 0, variance.sqrt(), 1.0)
        return mean.reshape(-1, 1, 1), deviation.reshape(-1, 1, 1)  # (C,) -> (C, 1, 1)


def load_data(name: str) -> Dataset:
    """Load the data set called `name`, decoded into memory.

    Args:
        name: `digits` (bundled), a directory (parquet as on the Hugging Face hub, or a folder
            of images by split and class), or a hub id `owner/name`, which needs the network.

    Raises:
        DataError: there is no such data set, it has no images, labels or splits, an image cannot
            be decoded, or the images differ in size.
        MissingExtraError: the extra `data` is missing; `digits` does not need it.
    """
    if name == BUNDLED:
        return _load_bundled_digits()
    is_directory = check_place(name)
    try:
        return _read_data_set(name, is_directory)
    except CountermarkError:
        raise
    except Exception as error:  # datasets, the hub and arrow share no base class
        wanted = "a data set in this directory" if is_directory else "a directory or a hub id"
        hint = "" if is_directory else " (hub ids need the network)"
        raise DataError(
            f"{name}: expected {wanted}{hint}, got: {_get_first_line(error)}"
        ) from error


def _load_bundled_digits() -> Dataset:
    """Load the digits that are part of the package."""
    path = Path(__file__).parent / "digits" / "digits.npz"
    with np.load(path, allow_pickle=False) as arrays:
        parts = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    labels = {key: parts[key].long() for key in ("train_labels", "test_labels")}
    images = {key: parts[key] for key in ("train_images", "test_images")}
    return Dataset(name=BUNDLED, classes=10, unit_pixels=False, **images, **labels)


def check_place(name: str) -> bool:
    """Return true if `name` is a directory, false if it has the form of a hub id.

    Raises:
        DataError: `name` is neither.
    """
    path = Path(name)
    if name and path.is_dir():
        return True
    # The hub is not asked for a misspelt `data/mnist` beside an existing `data`.
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not path.parent.exists():
        return False
    others = f"{BUNDLED!r} is bundled, a hub id reads owner/name and needs the network"
    raise DataError(f"no data directory {name!r} (looked for {path.absolute()}): {others}")


def _read_data_set(name: str, is_directory: bool) -> Dataset:
    """Read a directory or a hub id with the library `datasets`."""
    try:
        import datasets
        import PIL.Image  # noqa: F401 (decoding needs it)
    except ModuleNotFoundError as error:
        raise MissingExtraError("reading data sets", "data") from error
    # A streamed directory is read where it lies; without streaming the library would copy it
    # into its cache, 100 MB for CIFAR-10. What comes from the hub is cached, to come once.
    splits = datasets.load_dataset(name, streaming=is_directory)
    train, test = _choose_splits(name, splits)
    features = splits[train].features or {}
    image = _find_column(name, features, datasets.Image, "image")
    label = _find_column(name, features, datasets.ClassLabel, "class label")
    classes = features[label].num_classes
    parts = []
    for split in (train, test):
        # Cast the column, but drop none: dropping columns of a stream encodes images anew, WebP
        # with loss. Undecoded bytes let a bad image be reported with its row.
        raw = splits[split].cast_column(image, datasets.Image(decode=False))
        batches = _show_decoding(raw.iter(batch_size=BATCH), f"{name} {split}")
        rows = (row for batch in batches for row in zip(batch[image], batch[label], strict=True))
        parts.append(_decode_rows(f"{name} {split}", rows, classes))
    return _join_splits(name, parts[0], parts[1], classes)


def _choose_splits(name: str, splits: Iterable[str]) -> tuple[str, str]:
    """Choose the names of the training and the test split."""
    found = list(splits)
    test = next((split for split in ("test", "validation", "val") if split in found), None)
    if "train" not in found or test is None:
        got = ", ".join(found)
        raise DataError(f"{name}: expected the splits train and test (or validation), got {got}")
    return "train", test


def _find_column(name: str, features: Mapping[str, object], kind: type, what: str) -> str:
    """Find the first column whose feature has this type."""
    for column, feature in features.items():
        if isinstance(feature, kind):
            return column
    got = ", ".join(features) or "no described columns"
    raise DataError(f"{name}: expected a column with the feature {what}, got {got}")


def _decode_rows(where: str, rows: Iterable[Row], classes: int) -> Split:
    """Decode and check the rows of one split; `where` names it in messages."""
    import PIL.Image

    pictures: list[Pixels] = []
    labels: list[int] = []
    # A tiny file can decode to gigabytes; pillow only warns of that below twice its limit.
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        for cell, label in rows:
            here = f"{where} row {len(labels)}"
            pictures.append(_decode_image_cell(here, cell))
            labels.append(_check_label(here, label, classes))
            _check_image_size(here, pictures[-1], pictures[0])
    if not labels:
        raise DataError(f"{where}: expected at least one row, got none")
    return pictures, labels


def _decode_image_cell(here: str, cell: Mapping[str, Any] | None) -> Pixels:
    """Decode a cell of an image column to uint8 (C, H, W) with C = 1 or 3."""
    path, data = (cell["path"], cell["bytes"]) if cell else (None, b"")
    try:
        return decode_image(str(path) if data is None else io.BytesIO(data))
    except Exception as error:  # PIL's decoders raise whatever their format trips over
        named = f" ({path})" if path else ""
        message = f"{here}{named}: expected a picture, got: {_get_first_line(error)}"
        raise DataError(f"{message}; remove or repair it") from error


def _check_label(here: str, label: object, classes: int) -> int:
    """Return a label if it is a class of the data set; raise DataError otherwise."""
    # The hub marks rows without a class by -1, which no loss function takes.
    if isinstance(label, int) and 0 <= label < classes:
        return label
    raise DataError(f"{here}: expected a label from 0 to {classes - 1}, got {label}")


def _check_image_size(here: str, picture: Pixels, first: Pixels) -> None:
    """Raise DataError if an image has another height or width than the first one."""
    if picture.shape[1:] != first.shape[1:]:
        (height, width), (high, wide) = picture.shape[1:], first.shape[1:]
        message = f"{here}: all pictures must share one size, got {width}x{height}"
        raise DataError(f"{message} after {wide}x{high}: resize them beforehand")


def _join_splits(name: str, train: Split, test: Split, classes: int) -> Dataset:
    """Join two decoded splits to a data set."""
    _check_image_size(f"{name} test split", test[0][0], train[0][0])
    # A single grey image among coloured ones gets three equal channels.
    channels = max(len(picture) for picture in (*train[0], *test[0]))
    train_images, train_labels = _stack_split(train, channels)
    test_images, test_labels = _stack_split(test, channels)
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes)


def _stack_split(split: Split, channels: int) -> tuple[Tensor, Tensor]:
    """Stack a split to images uint8 (N, C, H, W) and labels (N,), in random order."""
    pictures, numbers = split
    shape = (channels, *pictures[0].shape[1:])
    # Into an array of our own: left alone, np.stack keeps PIL's layout, channels last.
    stacked = np.empty((len(pictures), *shape), dtype=np.uint8)
    images = torch.from_numpy(np.stack([np.broadcast_to(p, shape) for p in pictures], out=stacked))
    labels = torch.tensor(numbers)  # (N,) beside (N, C, H, W)
    if numbers == sorted(numbers):
        # An image folder lists class after class; its first rows would be of one class.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
    return images, labels


def _show_decoding(batches: Iterable[Batch], what: str) -> Iterator[Batch]:
    """Yield the batches and show a progress bar."""
    with show_progress(f"decoding {what}", None) as advance:
        for batch in batches:
            yield batch
            advance(BATCH)


def _check_rows(split: str, asked: int | None, there: int) -> None:
    """Raise DataError if a split does not have the requested number of rows."""
    if asked is not None and not 1 <= asked <= there:
        raise DataError(f"expected 1 to {there} {split} rows, got {asked}: None takes them all")


def _get_first_line(error: Exception) -> str:
    """Return the first line of an error of another library, for a message of one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
