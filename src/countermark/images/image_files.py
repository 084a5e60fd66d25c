"""Decode image files into arrays, and encode arrays as PNG.

Image files are hostile input: format, pixel mode and size are limited before anything is decoded.
"""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels: TypeAlias = NDArray[np.uint8]
"""One picture (C, H, W), C = 1 or 3, grey levels 0 to 255."""

MAX_PIXELS = 64_000_000
"""Most pixels of one image; a few kB of PNG can claim far more."""

# Formats that PIL decodes by itself; others (EPS) would start a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_GREY = ("1", "L", "LA")
_OTHER_COLOUR = ("CMYK", "YCbCr")
_COLOUR = ("RGB", "RGBA", "P", *_OTHER_COLOUR)


def decode_image(source: str | IO[bytes], *, on_white: bool = False, plain: bool = False) -> Pixels:
    """Decode an image file into uint8 (C, H, W), one channel of grey or three of colour.

    Args:
        source: path of the file, or the open file itself.
        on_white: put transparent pixels on a white ground; else transparency is ignored.
        plain: accept only still images in grey, RGB or with a palette. CMYK, YCbCr, animations and
            several pages are refused, since different programs show different pixels for them.

    Raises:
        Exception: PIL's decoders raise errors of many types. `ValueError` means more than
            `MAX_PIXELS` or another kind of pixels. The caller says which image it was.
    """
    import PIL.Image

    with PIL.Image.open(source, formats=_FORMATS) as image:
        width, height = image.size
        # Opening reads the header only: the claim is refused before memory is asked for.
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels, the limit is {MAX_PIXELS:,}")
        if image.mode not in _GREY + _COLOUR:
            raise ValueError(f"pixel mode {image.mode!r}, not 8 bits of grey or colour")
        if plain and image.mode in _OTHER_COLOUR:
            raise ValueError(f"pixel mode {image.mode!r}, not grey or RGB")
        # The tile names the raw mode in the file, such as "RGB;16B", which PIL hides behind "RGB".
        if plain and any("16" in str(each[3]) for each in image.tile):
            raise ValueError("16 bits a channel, not 8")  # PIL would drop the lower half
        if plain and getattr(image, "is_animated", False):
            raise ValueError("several frames, not a still picture")
        return _extract_pixels(
            _flatten_on_white(image) if on_white and _has_transparency(image) else image
        )


def encode_png(picture: Pixels) -> bytes:
    """Encode an image uint8 (C, H, W), C = 1 or 3, as the content of a PNG file."""
    import PIL.Image

    file = io.BytesIO()
    shown = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
    PIL.Image.fromarray(np.ascontiguousarray(shown)).save(file, "PNG")
    return file.getvalue()


def _has_transparency(image: Image) -> bool:
    """Return true if an image has an alpha channel or a transparent colour."""
    return image.mode in ("LA", "RGBA") or "transparency" in image.info


def _flatten_on_white(image: Image) -> Image:
    """Return an image in RGB, with transparent pixels blended into white."""
    import PIL.Image

    # Blended before the alpha channel is dropped: hidden pixels may hold any colour.
    ground = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _extract_pixels(image: Image) -> Pixels:
    """Return the pixels of an image as uint8 (C, H, W), one channel of grey or three of colour."""
    if image.mode in _GREY:
        return np.asarray(image.convert("L"))[None]  # (1, H, W)
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)  # (3, H, W)
