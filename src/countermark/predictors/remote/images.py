"""Prepare images for a remote suspect: as numbers or as image files; and their digests."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError
from countermark.keys.streams import frame
from countermark.predictors.base import Images
from countermark.predictors.remote.options import RemoteOptions

# The label of an image without a readable answer; no class has this number.
NO_LABEL = -1


def check_images(images: Images) -> Images:
    """Return the images as an array, after checking dtype and shape.

    Raises:
        ConfigError: the images are not uint8 (n, C, H, W), or are empty.
    """
    found = np.asarray(images)
    if found.dtype != np.uint8 or found.ndim != 4 or 0 in found.shape[1:]:
        raise ConfigError(
            "expected images as uint8 (n, C, H, W) of 0 to 255, "
            f"came {found.dtype} {found.shape}: convert them first"
        )
    return found


def check_sendable(images: Images, options: RemoteOptions) -> Images:
    """Return the images, after checking that the options can send them.

    Raises:
        ConfigError: the images are not uint8 (n, C, H, W), or have a number of channels that the
            options cannot send.
    """
    channels = check_images(images).shape[1]
    if options.pixels == "normalised" and len(options.mean) != channels:
        raise ConfigError(
            f"mean and std are for {len(options.mean)} channel(s), the images have {channels}: "
            "give one number for each"
        )
    if options.needs_image_files and channels not in {1, 3}:
        raise ConfigError(
            f"a {options.picture} has 1 or 3 channels, the images have {channels}: "
            "use a protocol that sends numbers"
        )
    return images


def digest_image(image: Images) -> str:
    """Compute SHA-256 (hex) of one image (C, H, W).

    The digest is over frame("uint8 [C, H, W]", bytes of the image in C order).
    """
    # The shape enters the digest: the same bytes in another shape are another image.
    about = f"uint8 {list(image.shape)}"
    return hashlib.sha256(frame(about.encode(), image.tobytes())).hexdigest()


def convert_pixels(images: Images, options: RemoteOptions) -> NDArray[Any]:
    """Convert images (n, C, H, W) to the numbers that are sent.

    Returns: (n, C, H, W) or (n, H, W, C), scaled as the options say.
    """
    numbers: NDArray[Any] = images
    if options.pixels != "uint8":
        numbers = images / 255
        if options.pixels == "normalised":
            mean, std = (np.reshape(each, (-1, 1, 1)) for each in (options.mean, options.std))
            numbers = (numbers - mean) / std
        numbers = numbers.round(7)  # as fine as float32, at half the text of all its digits
    return numbers if options.layout == "nchw" else numbers.transpose(0, 2, 3, 1)  # (n, H, W, C)


def encode_image(image: Images, options: RemoteOptions) -> bytes:
    """Encode one image (C, H, W), C of 1 or 3, as a PNG or JPEG file."""
    import PIL.Image

    rows = image[0] if len(image) == 1 else image.transpose(1, 2, 0)  # (H, W) or (H, W, 3)
    file = io.BytesIO()
    quality = {"quality": options.jpeg_quality} if options.picture == "jpeg" else {}
    PIL.Image.fromarray(np.ascontiguousarray(rows)).save(file, options.picture, **quality)
    return file.getvalue()
