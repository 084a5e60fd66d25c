"""Picture files as arrays. They are hostile input: what is decoded is limited in kind and size."""

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
"""Of one picture; a few kB of PNG can claim far more."""

# Formats that PIL decodes by itself; others (EPS) would start a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_GREY = ("1", "L", "LA")
_OTHER_COLOUR = ("CMYK", "YCbCr")
_COLOUR = ("RGB", "RGBA", "P", *_OTHER_COLOUR)


def decoded(source: str | IO[bytes], *, on_white: bool = False, plain: bool = False) -> Pixels:
    """The picture in a file, uint8 (C, H, W), one channel of grey or three of colour.

    Args:
        source: its path, or the file itself.
        on_white: put what is transparent on a white ground; else transparency is left out.
        plain: refuse what is no still picture of grey, RGB or a palette, since what it shows
            depends on who shows it: CMYK and YCbCr, animations, several pages.

    Raises:
        Exception: whatever PIL's decoders trip over; `ValueError` for more than `MAX_PIXELS` or
            another kind of pixels. The caller says which picture it was.
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
        if plain and any("16" in str(each[3]) for each in image.tile):
            raise ValueError("16 bits a channel, not 8")  # PIL would drop the lower half
        if plain and getattr(image, "is_animated", False):
            raise ValueError("several frames, not a still picture")
        return _pixels(_grounded(image) if on_white and _transparent(image) else image)


def as_png(picture: Pixels) -> bytes:
    """A picture (C, H, W), C = 1 or 3, as the content of a PNG file."""
    import PIL.Image

    file = io.BytesIO()
    shown = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
    PIL.Image.fromarray(np.ascontiguousarray(shown)).save(file, "PNG")
    return file.getvalue()


def _transparent(image: Image) -> bool:
    return image.mode in ("LA", "RGBA") or "transparency" in image.info


def _grounded(image: Image) -> Image:
    import PIL.Image

    ground = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _pixels(image: Image) -> Pixels:
    if image.mode in _GREY:
        return np.asarray(image.convert("L"))[None]  # (1, H, W)
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)  # (3, H, W)
