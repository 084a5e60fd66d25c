"""The logo that a stego network hides: an image file of the owner, or an image drawn here.

The file is read once, before the key exists. The pixels or bits of the logo are frozen and enter
C0, so that a key never needs the file again.
"""

from __future__ import annotations

import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError, MissingExtraError
from countermark.images.image_files import Pixels, decode_image
from countermark.keys.messages import Bits
from countermark.predictors.base import Images

GRID = 8
"""Bits along a side of a logo in the keyed form, and of the tile that spreads it."""

MOST_BYTES = 1 << 26
"""Largest file of a logo, in bytes."""

_SIDE = 96  # pixels of the drawn logo
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601


def draw_emblem() -> Pixels:
    """Draw the default logo, uint8 (3, 96, 96): a ring, open to the right, with a bar in it."""
    y, x = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]  # (96, 96) each
    radius, opening = np.hypot(x, y), (x > 0) & (np.abs(y) < 0.3)
    ring = (radius > 0.55) & (radius < 0.85) & ~opening
    bar = (np.abs(x + 0.1) < 0.1) & (np.abs(y) < 0.4)
    paints = np.array([[24, 32, 96], [255, 200, 40], [255, 255, 255]], dtype=np.uint8)
    drawn: Pixels = paints[ring + 2 * bar]  # (96, 96, 3)
    return drawn.transpose(2, 0, 1)


def load_logo_pixels(path: str, shape: tuple[int, int, int]) -> Images:
    """Return the logo as an image of the covers' shape: uint8 (C, H, W).

    Args:
        path: of an image file; "" for the drawn logo.
        shape: C, H, W of the covers. If C differs from the channels of the file, the logo is made
            grey and repeated in each channel.

    Raises:
        ConfigError: there is no such image.
        MissingExtraError: reading a file needs pillow.
    """
    channels, height, width = shape
    picture = average_areas(read_logo(path) if path else draw_emblem(), height, width)  # (c, H, W)
    if len(picture) != channels:
        picture = np.repeat(_convert_to_grey(picture), channels, axis=0)
    pixels: Images = np.rint(picture).astype(np.uint8)
    return pixels


def load_logo_bits(path: str) -> Bits:
    """Return an image file as bits (8, 8): 1 where a part is brighter than the median part.

    The image is cut into 8 × 8 parts; each has the mean of its grey values.

    Where no part lies above the median, because more than half of the parts are equally bright, a
    part that reaches the median is 1.

    Raises:
        ConfigError: there is no such image, or all parts have one grey level.
        MissingExtraError: reading a file needs pillow.
    """
    means = np.rint(_convert_to_grey(average_areas(read_logo(path), GRID, GRID))[0])  # (8, 8)
    middle = np.median(means)
    bits: NDArray[np.bool_] = means > middle if (means > middle).any() else means >= middle
    # A uniform image would give 64 equal bits, whichever image it is.
    if bits.all():
        raise ConfigError(
            f"logo {path!r} is one grey level in 8 x 8 parts: expected a picture with light and "
            "dark parts; give another, or leave logo out"
        )
    return bits.astype(np.uint8)


def read_logo(path: str) -> Pixels:
    """Read an image file (C, H, W); transparent parts become white.

    Raises:
        ConfigError: the path is no regular file, the file is too large, or it cannot be decoded.
        MissingExtraError: pillow is not installed.
    """
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise MissingExtraError("reading a logo", "data") from error
    try:
        content = _read_content(Path(path))
        with warnings.catch_warnings():
            # pillow only warns of an image with very many pixels; here the warning refuses the
            # file.
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            return decode_image(BytesIO(content), on_white=True)
    except PIL.UnidentifiedImageError:  # its message names only a BytesIO object
        raise _make_image_error(path, "no such") from None
    except Exception as error:  # pillow's decoders raise exceptions of many types
        said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise _make_image_error(path, said.partition("\n")[0]) from None


def _make_image_error(path: str, got: str) -> ConfigError:
    """Make the error for a logo file that cannot be used."""
    return ConfigError(
        f"logo {path!r}: expected a picture file such as PNG, got: {got}; give another, or leave "
        "logo out"
    )


def average_areas(picture: Pixels, height: int, width: int) -> NDArray[np.float32]:
    """Resize an image (C, …) to (C, height, width) by averaging over equal parts of its area."""
    rows, columns = (
        _compute_shares(size, wanted)
        for size, wanted in zip(picture.shape[1:], (height, width), strict=True)
    )
    return np.stack([rows @ channel.astype(np.float32) @ columns.T for channel in picture])


def _compute_shares(size: int, wanted: int) -> NDArray[np.float32]:
    """Return the share (wanted, size) of each pixel in each of `wanted` equal parts.

    Each row sums to 1.
    """
    edges = np.arange(wanted + 1) * (size / wanted)
    left = np.maximum(edges[:-1, None], np.arange(size))
    right = np.minimum(edges[1:, None], np.arange(1, size + 1))
    shares: NDArray[np.float32] = (np.clip(right - left, 0, None) * (wanted / size)).astype(
        np.float32
    )
    return shares


def _convert_to_grey(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the grey values (1, H, W) of an image (C, H, W), C = 1 or 3."""
    # Unrounded, unlike `outputs.convert_to_grey`: the values are averaged before they are rounded.
    return picture if len(picture) == 1 else np.einsum("c,chw->hw", _LUMA, picture)[None]


def _read_content(path: Path) -> bytes:
    """Return the bytes of a logo file; raise `ValueError` if it is no regular file or too large."""
    status = path.stat()
    # A device or a pipe could block or deliver bytes without end.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("something that is no regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{status.st_size:,} bytes, the limit is {MOST_BYTES:,}")
    with path.open("rb") as file:
        # Bounded once more, because the file may have grown since its size was checked.
        return file.read(MOST_BYTES)
