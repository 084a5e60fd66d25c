"""What images go through before a host sees them: compression, resampling, smoothing.

A trigger may be sent as a JPEG or come back from a thumbnail; a service that would rather not
answer triggers may smooth every image first, at a cost in accuracy.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import PositiveFloat

from countermark.bench.strict import Strict
from countermark.images.image_files import decode_image
from countermark.predictors.base import Images, Labels, Predictor

if TYPE_CHECKING:
    from PIL.Image import Image


class Handling(Strict):
    """One thing that is done to every image, and how strongly.

    Attributes:
        how: `jpeg` at a quality of 1 to 95; `resize` to a side of so many pixels and back; `crop`
            to the middle of so many pixels and back to the size before; `blur` by a Gaussian of
            this radius; `median` of so many pixels a side, an odd number; `levels` of grey.
        by: the number that `how` speaks of.
    """

    how: Literal["jpeg", "resize", "crop", "blur", "median", "levels"]
    by: PositiveFloat

    @property
    def label(self) -> str:
        """In a word and a number: `jpeg 75`."""
        return f"{self.how} {self.by:g}"


def handled(images: Images, handling: Handling) -> Images:
    """Images uint8 (n, C, H, W), C = 1 or 3, after that; of the same size.

    Pillow does the work: its JPEG halves the colours' resolution, as most do.
    """
    change = _HOW[handling.how]
    return np.stack([_back(change(_picture(each), handling.by)) for each in images])


def behind(predict: Predictor, handling: Handling) -> Predictor:
    """A suspect that sees every image only after that."""

    def answer(images: Images) -> Labels:
        return predict(handled(images, handling))

    return answer


def _picture(pixels: Images) -> Image:
    """Pixels (C, H, W) as a picture."""
    import PIL.Image

    return PIL.Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _back(picture: Image) -> Images:
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)


def _jpeg(picture: Image, quality: float) -> Image:
    sent = io.BytesIO()
    picture.save(sent, "JPEG", quality=round(quality))
    return _picture(decode_image(sent))


def _resize(picture: Image, side: float) -> Image:
    from PIL.Image import Resampling

    small = picture.resize((round(side), round(side)), Resampling.BILINEAR)
    return small.resize(picture.size, Resampling.BILINEAR)


def _crop(picture: Image, side: float) -> Image:
    from PIL.Image import Resampling

    left, top = ((length - round(side)) // 2 for length in picture.size)
    middle = picture.crop((left, top, left + round(side), top + round(side)))
    return middle.resize(picture.size, Resampling.BILINEAR)


def _blur(picture: Image, radius: float) -> Image:
    from PIL.ImageFilter import GaussianBlur

    return picture.filter(GaussianBlur(radius))


def _median(picture: Image, side: float) -> Image:
    from PIL.ImageFilter import MedianFilter

    return picture.filter(MedianFilter(round(side)))


def _levels(picture: Image, count: float) -> Image:
    step = 256 / count
    return picture.point(
        [min(255, int((level // step + 0.5) * step)) for level in range(256)]
        * len(picture.getbands())
    )


_HOW: Mapping[str, Callable[[Image, float], Image]] = {
    "jpeg": _jpeg, "resize": _resize, "crop": _crop, "blur": _blur, "median": _median,
    "levels": _levels,
}  # fmt: skip
