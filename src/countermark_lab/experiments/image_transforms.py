"""Image transforms before a host sees the images: compression, resampling, smoothing.

A trigger may be sent as a JPEG, or enlarged from a thumbnail. A service that wants to avoid
answering triggers may smooth every image first, which costs accuracy.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import PositiveFloat

from countermark.images.image_files import decode_image
from countermark.predictors.base import Images, Labels, Predictor
from countermark_lab.experiments.spec import SpecModel

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageTransform(SpecModel):
    """One transform that is applied to every image, and its strength.

    Attributes:
        how: `jpeg` of quality `by`, 1 to 95; `resize` to a side of `by` pixels and back; `crop` to
            the middle `by` × `by` pixels, enlarged to the former size; `blur` by a Gaussian of
            radius `by`; `median` over `by` × `by` pixels, an odd number; `levels`, rounding to
            `by` levels of grey.
        by: the strength, in the unit of `how`.
    """

    how: Literal["jpeg", "resize", "crop", "blur", "median", "levels"]
    by: PositiveFloat

    @property
    def label(self) -> str:
        """Kind and strength as text, for example `jpeg 75`."""
        return f"{self.how} {self.by:g}"


def transform_images(images: Images, handling: ImageTransform) -> Images:
    """Transform images uint8 (n, C, H, W), C = 1 or 3; the result has the same shape.

    Pillow transforms the images. Its JPEG halves the resolution of colours, as most encoders do.
    """
    change = _HOW[handling.how]
    return np.stack([_make_pixels(change(_make_pil_image(each), handling.by)) for each in images])


def make_transformed_predictor(predict: Predictor, handling: ImageTransform) -> Predictor:
    """Return a predictor that transforms every image before `predict` sees it."""

    def predict_transformed(images: Images) -> Labels:
        """Return the classes of the transformed images."""
        return predict(transform_images(images, handling))

    return predict_transformed


def _make_pil_image(pixels: Images) -> Image:
    """Return pixels (C, H, W) as a pillow image."""
    import PIL.Image

    return PIL.Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _make_pixels(picture: Image) -> Images:
    """Return a pillow image as pixels (C, H, W)."""
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)


def _compress_jpeg(picture: Image, quality: float) -> Image:
    """Compress an image as JPEG and decode it again."""
    sent = io.BytesIO()
    picture.save(sent, "JPEG", quality=round(quality))
    # Pillow opens a buffer from its beginning, so it needs no seek after the write.
    return _make_pil_image(decode_image(sent))


def _resize_and_restore(picture: Image, side: float) -> Image:
    """Resize an image to a square and back to its own size."""
    from PIL.Image import Resampling

    small = picture.resize((round(side), round(side)), Resampling.BILINEAR)
    return small.resize(picture.size, Resampling.BILINEAR)


def _crop_middle(picture: Image, side: float) -> Image:
    """Cut out the middle square of an image and enlarge it to the size of the image."""
    from PIL.Image import Resampling

    left, top = ((length - round(side)) // 2 for length in picture.size)
    middle = picture.crop((left, top, left + round(side), top + round(side)))
    return middle.resize(picture.size, Resampling.BILINEAR)


def _blur(picture: Image, radius: float) -> Image:
    """Blur an image by a Gaussian."""
    from PIL.ImageFilter import GaussianBlur

    return picture.filter(GaussianBlur(radius))


def _filter_median(picture: Image, side: float) -> Image:
    """Replace every pixel by the median of the square around it."""
    from PIL.ImageFilter import MedianFilter

    return picture.filter(MedianFilter(round(side)))


def _reduce_levels(picture: Image, count: float) -> Image:
    """Round every channel to `count` levels."""
    step = 256 / count
    # Each level becomes the middle of its step; pillow wants one table of 256 for each channel.
    return picture.point(
        [min(255, int((level // step + 0.5) * step)) for level in range(256)]
        * len(picture.getbands())
    )


# By the name in a TOML file, which is part of a cell's hash: the names must not change.
_HOW: Mapping[str, Callable[[Image, float], Image]] = {
    "jpeg": _compress_jpeg, "resize": _resize_and_restore, "crop": _crop_middle, "blur": _blur,
    "median": _filter_median, "levels": _reduce_levels,
}  # fmt: skip
