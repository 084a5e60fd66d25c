"""The image that published deep watermarking hides: bits, a QR code, or an image file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError, MissingExtraError
from countermark.keys.key import KeyMaterial
from countermark.predictors.base import Images
from countermark.schemes.logo import load_logo_pixels

if TYPE_CHECKING:
    from countermark.schemes.deep_watermarking.scheme import DeepWatermarking

_DARK, _LIGHT = 0, 255


def make_hidden_image(scheme: DeepWatermarking, material: KeyMaterial) -> Images:
    """Return the hidden image of the published form, uint8 (C, S, S).

    The scheme's field `picture` names a file, or is "qr:TEXT" for a QR code, or "" for bits that
    are drawn from the secret. Half of the drawn bits are dark on average, so that no blank image
    resembles the hidden one.

    Raises:
        ConfigError: there is no such image, or the text is too long for the square.
        MissingExtraError: a QR code needs segno, a file pillow.
    """
    shape = (scheme.channels, scheme.side, scheme.side)
    if scheme.picture.startswith("qr:"):
        return make_qr_image(scheme.picture.removeprefix("qr:"), shape)
    if scheme.picture:
        return load_logo_pixels(scheme.picture, shape)
    bits = (
        material.make_stream("picture")
        .take_bits(scheme.bits)
        .reshape(scheme.grid_size, scheme.grid_size)
    )
    return draw_bits_image(bits, shape)


def draw_bits_image(bits: NDArray[np.uint8], shape: tuple[int, int, int]) -> Images:
    """Draw bits (G, G) as cells of an image uint8 (C, H, W): light for 1, dark for 0."""
    channels, height, width = shape
    # Integer division also divides sides that are no multiple of G; cells then differ by 1 pixel.
    rows = np.arange(height) * len(bits) // height
    columns = np.arange(width) * bits.shape[1] // width
    picture: Images = np.where(bits[rows][:, columns], _LIGHT, _DARK).astype(np.uint8)
    return np.repeat(picture[None], channels, axis=0)


def read_image_bits(picture: NDArray[np.float64], grid: int) -> NDArray[np.uint8]:
    """Return the bits (G, G) of a revealed image (C, H, W), levels 0 to 1: 1 for light cells."""
    levels = picture.mean(0)  # (H, W)
    # The cells are those of `draw_bits_image`; a cell is light if its mean level is above ½.
    rows, columns = (np.arange(size) * grid // size for size in levels.shape)
    sums, counts = np.zeros((grid, grid)), np.zeros((grid, grid))
    np.add.at(sums, (rows[:, None], columns[None]), levels)
    np.add.at(counts, (rows[:, None], columns[None]), 1)
    return (sums > counts / 2).astype(np.uint8)


def make_qr_image(text: str, shape: tuple[int, int, int]) -> Images:
    """Return a QR code as an image uint8 (C, H, W), with the highest error correction that fits.

    Raises:
        ConfigError: no QR code holds the text, or its code needs more than half as many modules in
            a row as the square has pixels.
        MissingExtraError: segno is not installed.
    """
    try:
        import segno  # an optional dependency, the extra `qr`
    except ModuleNotFoundError as error:
        raise MissingExtraError("a QR code", "qr") from error
    try:
        # boost_error raises the error correction as long as the code keeps its size.
        code = segno.make_qr(text, error="m", boost_error=True)
    except segno.DataOverflowError:
        raise ConfigError("the text is too long for any QR code: give a shorter one") from None
    modules = np.array([list(row) for row in code.matrix], dtype=np.uint8)
    modules = np.pad(1 - modules, 1, constant_values=1)  # light rim; QR codes have 1 for dark
    if 2 * len(modules) > min(shape[1:]):
        raise ConfigError(
            f"a QR code of this text has {len(modules)} modules in a row, the square "
            f"{min(shape[1:])} pixels: give a shorter text or a larger side"
        )
    return draw_bits_image(modules, shape)
