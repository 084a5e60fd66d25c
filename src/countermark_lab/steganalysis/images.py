"""Types and checks of batches of 8-bit images, and of the functions that embed into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError

Images: TypeAlias = NDArray[np.uint8]  # (n, C, H, W), grey levels 0 to 255
Flags: TypeAlias = NDArray[np.bool_]  # (n,), True for stego
Embed: TypeAlias = Callable[[Images, int], Images]  # (images, seed) -> images of the same shape

SMALLEST = 4  # pixels a side: SPAM needs three differences in a row


@dataclass(frozen=True, eq=False)
class MixedImages:
    """A set of covers and stego images.

    Attributes:
        images: uint8 (n, C, H, W).
        stego: (n,) true for stego images.
    """

    images: Images
    stego: Flags


def check_images(images: Images) -> Images:
    """Return the images if they are valid.

    Raises:
        ConfigError: the images are not a uint8 array (n, C, H, W) with n and C at least 1 and
            sides of at least 4.
    """
    wanted = f"expected images as a numpy array, uint8 (n, C, H, W) of {SMALLEST} pixels a side"
    # Embedders are foreign code, so their outputs pass this check too.
    if not isinstance(images, np.ndarray):
        raise ConfigError(
            f"{wanted} or more, got {type(images).__name__}: call numpy() on a tensor"
        )
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ConfigError(f"{wanted} or more, got {images.dtype} {images.shape}")
    if min(images.shape[:2]) < 1 or min(images.shape[2:]) < SMALLEST:
        raise ConfigError(f"{wanted} or more, got {images.shape}")
    return images


def embed_images(embed: Embed, images: Images, seed: int) -> Images:
    """Return the embedder's output for the images, in the same shape.

    Raises:
        ConfigError: the embedder returns another type or shape.
    """
    stego = check_images(embed(images, seed))
    if stego.shape != images.shape:
        raise ConfigError(
            f"an embedder keeps the shape of the images: expected {images.shape}, got {stego.shape}"
        )
    return stego


def make_half_stego(covers: Images, embed: Embed, *, seed: int) -> MixedImages:
    """Make a random half of the covers stego images; keep the order.

    No image is in the set both as cover and as stego image, so that images count independently.

    Args:
        covers: uint8 (n, C, H, W), n even.
        embed: makes the stego images.
        seed: draws the half, and the embedder's seed.

    Raises:
        ConfigError: n is odd, or the covers, the embedder's output or the seed are invalid.
    """
    count = len(check_images(covers))
    if count % 2:
        raise ConfigError(f"half of the images become stego: expected an even number, got {count}")
    draw, inner = derive_seeds(seed, "mix", 2)
    stego = np.zeros(count, dtype=np.bool_)
    stego[np.random.default_rng(draw).permutation(count)[: count // 2]] = True
    # The caller's covers stay unchanged.
    images = covers.copy()
    images[stego] = embed_images(embed, covers[stego], inner)
    return MixedImages(images, stego)


def derive_seeds(seed: int, purpose: str, count: int) -> list[int]:
    """Return `count` seeds for one purpose, which differ from each other and from other purposes.

    A thief who embeds anew must not hit the owner's pixels only because both use seed 0.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"a seed is 0 or more, got {seed}")
    # SeedSequence hashes its entropy, so neighbouring seeds give unrelated streams.
    source = np.random.SeedSequence([seed, *purpose.encode()])
    return [int(state) for state in source.generate_state(count, np.uint64)]
