"""The logo that a stego network hides: a picture of the owner's, or one that is drawn here.

It is read once, before there is a key. The pixels or bits that come of it are frozen and enter C0,
so a key never needs the file again.
"""

from __future__ import annotations

import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from countermark.answers import Images
from countermark.errors import ConfigError, MissingExtraError
from countermark.message import Bits
from countermark.pictures import Pixels, decoded

GRID = 8
"""A logo is 8 × 8 bits in the keyed form, and so is the tile that spreads it."""

MOST_BYTES = 1 << 26
"""Of a logo's file."""

_SIDE = 96  # pixels of the drawn logo
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601


def emblem() -> Pixels:
    """A ring that is open to the right, with a bar in it: uint8 (3, 96, 96), drawn."""
    y, x = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]  # (96, 96) each
    radius, opening = np.hypot(x, y), (x > 0) & (np.abs(y) < 0.3)
    ring = (radius > 0.55) & (radius < 0.85) & ~opening
    bar = (np.abs(x + 0.1) < 0.1) & (np.abs(y) < 0.4)
    paints = np.array([[24, 32, 96], [255, 200, 40], [255, 255, 255]], dtype=np.uint8)
    drawn: Pixels = paints[ring + 2 * bar]  # (96, 96, 3)
    return drawn.transpose(2, 0, 1)


def logo_pixels(path: str, shape: tuple[int, int, int]) -> Images:
    """The logo as an image of the covers' shape: uint8 (C, H, W).

    Args:
        path: of a picture file; "" for the drawn one.
        shape: C, H, W; grey joins the colours, or stands in each channel.

    Raises:
        ConfigError: there is no such picture.
        MissingExtraError: reading one needs pillow.
    """
    channels, height, width = shape
    picture = reduced(read_logo(path) if path else emblem(), height, width)  # (c, H, W)
    if len(picture) != channels:
        picture = np.repeat(_grey(picture), channels, axis=0)
    pixels: Images = np.rint(picture).astype(np.uint8)
    return pixels


def logo_bits(path: str) -> Bits:
    """A picture file as bits (8, 8): 1 where the mean of its grey lies above the median of all 64.

    Where more than half of them are as bright as the median, 1 where it is reached.

    Raises:
        ConfigError: there is no such picture, or it is of one colour.
        MissingExtraError: reading one needs pillow.
    """
    means = np.rint(_grey(reduced(read_logo(path), GRID, GRID))[0])  # (8, 8)
    middle = np.median(means)
    bits: NDArray[np.bool_] = means > middle if (means > middle).any() else means >= middle
    if bits.all():
        raise ConfigError(
            f"logo {path!r} is one grey level in 8 x 8 parts: expected a picture with light and "
            "dark parts; give another, or leave logo out"
        )
    return bits.astype(np.uint8)


def read_logo(path: str) -> Pixels:
    """A picture file (C, H, W), transparent parts on white.

    Raises:
        ConfigError: no regular file, too large, or no picture that can be decoded.
        MissingExtraError: without pillow.
    """
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise MissingExtraError("reading a logo", "data") from error
    try:
        content = _content(Path(path))
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            return decoded(BytesIO(content), on_white=True)
    except PIL.UnidentifiedImageError:  # its own words name an object in memory
        raise _no_picture(path, "no such") from None
    except Exception as error:  # PIL's decoders raise whatever their format trips over
        said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise _no_picture(path, said.partition("\n")[0]) from None


def _no_picture(path: str, got: str) -> ConfigError:
    return ConfigError(
        f"logo {path!r}: expected a picture file such as PNG, got: {got}; give another, or leave "
        "logo out"
    )


def reduced(picture: Pixels, height: int, width: int) -> NDArray[np.float32]:
    """A picture (C, …) as (C, height, width), each value the mean over its part of the area."""
    rows, columns = (
        _shares(size, wanted)
        for size, wanted in zip(picture.shape[1:], (height, width), strict=True)
    )
    return np.stack([rows @ channel.astype(np.float32) @ columns.T for channel in picture])


def _shares(size: int, wanted: int) -> NDArray[np.float32]:
    """How much of each of `size` pixels lies in each of `wanted` equal parts: (wanted, size)."""
    edges = np.arange(wanted + 1) * (size / wanted)
    left = np.maximum(edges[:-1, None], np.arange(size))
    right = np.minimum(edges[1:, None], np.arange(1, size + 1))
    shares: NDArray[np.float32] = (np.clip(right - left, 0, None) * (wanted / size)).astype(
        np.float32
    )
    return shares


def _grey(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey (1, H, W) of a picture (C, H, W), C = 1 or 3."""
    return picture if len(picture) == 1 else np.einsum("c,chw->hw", _LUMA, picture)[None]


def _content(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("something that is no regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{status.st_size:,} bytes, the limit is {MOST_BYTES:,}")
    with path.open("rb") as file:
        return file.read(MOST_BYTES)
