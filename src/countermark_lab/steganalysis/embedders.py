"""Embedders turn covers into stego images: LSB matching, noise as a control, and adaptive methods.

All embed a random message, which nobody reads here. An embedder is called with images uint8 (n, C,
H, W) and a seed, and returns images of the same shape. In colour images each channel counts as an
image by itself: a payload of 0.4 bits a pixel is 0.4 in each channel, 1.2 for the three channels of
a coloured pixel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from countermark._internal.progress import show_progress
from countermark.errors import ConfigError, MissingExtraError, find_by_name
from countermark_lab.steganalysis.images import Embed, Images, check_images

Method: TypeAlias = Literal["wow", "hugo", "s_uniward"]

PAYLOAD = 0.4  # bits a pixel, as in the tables of Li et al. 2019


def _check_payload(payload: float) -> None:
    """Raise `ConfigError` unless the payload lies in 0 to 1 bits a pixel."""
    if not 0 <= payload <= 1:
        raise ConfigError(f"a payload is 0 to 1 bits a pixel, got {payload}")


@dataclass(frozen=True)
class LsbMatching:
    """An embedder by LSB matching, also called ±1 embedding.

    J. Mielikainen describes the method in IEEE SPL 13(5), 2006. A pixel is used with probability
    `payload`. A used pixel shall hold a random bit: if its lowest bit differs, it goes up or down
    by 1 with equal probability, 0 only up and 255 only down. So payload/2 of the pixels change, by
    one level.

    Attributes:
        payload: bits a pixel, 0 to 1.
    """

    payload: float = PAYLOAD

    def __post_init__(self) -> None:
        _check_payload(self.payload)

    def __call__(self, images: Images, seed: int) -> Images:
        """Return the stego images, uint8 (n, C, H, W)."""
        rng, shape = np.random.default_rng(seed), check_images(images).shape
        used = rng.random(shape) < self.payload
        bits = rng.integers(0, 2, shape, dtype=np.uint8)
        up = rng.integers(0, 2, shape, dtype=np.uint8) == 1
        # uint8 must not wrap around: 0 goes up and 255 goes down.
        up = (up | (images == 0)) & (images < 255)
        step = np.where(up, 1, -1)  # (n, C, H, W)
        changed: Images = (images + step * (used & (images % 2 != bits))).astype(np.uint8)
        return changed


@dataclass(frozen=True)
class UniformNoise:
    """An embedder that hides nothing: each pixel moves by −k to k with equal probability, clipped.

    It is a control: a detector that does not find ±4 finds nothing.

    Attributes:
        amplitude: k in grey levels, 1 to 255.
    """

    amplitude: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.amplitude <= 255:
            raise ConfigError(
                f"the amplitude of noise is 1 to 255 grey levels, got {self.amplitude}"
            )

    def __call__(self, images: Images, seed: int) -> Images:
        """Return the noisy images, uint8 (n, C, H, W)."""
        rng, k = np.random.default_rng(seed), self.amplitude
        # int16, so that the sum can leave 0 to 255 before it is clipped.
        moved = check_images(images) + rng.integers(-k, k + 1, images.shape, dtype=np.int16)
        return moved.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class AdaptiveEmbedder:
    """An embedder that changes pixels by ±1 where it costs least, simulated at its coding bound.

    `wow`: V. Holub, J. Fridrich, WIFS 2012. `hugo`: T. Pevný, T. Filler, P. Bas, IH 2010.
    `s_uniward`: V. Holub, J. Fridrich, T. Denemark, EURASIP JIS 2014:1. The costs and the simulator
    are those of the package conseal; a channel of 32×32 takes some 10 to 40 ms. A channel that
    cannot hold the payload, such as a constant channel with `wow`, carries less.

    Attributes:
        method: name of the method that defines the costs.
        payload: bits a pixel, 0 to 1.
    """

    method: Method
    payload: float = PAYLOAD

    def __post_init__(self) -> None:
        find_by_name("adaptive method", self.method, dict.fromkeys(get_args(Method)))
        _check_payload(self.payload)

    def __call__(self, images: Images, seed: int) -> Images:
        """Return the stego images, uint8 (n, C, H, W).

        Raises:
            MissingExtraError: conseal is not installed.
        """
        simulate = _load_simulator(self.method)
        count, channels, height, width = check_images(images).shape
        # conseal works on one grey channel at a time.
        planes = images.reshape(-1, height, width)
        # A seed for each channel: equal seeds would change the same pixels in every channel.
        seeds = np.random.default_rng(seed).integers(2**63, size=len(planes))
        stego = np.empty_like(planes)
        with show_progress(f"embedding with {self.method}", len(planes)) as advance:
            for row, (plane, inner) in enumerate(zip(planes, seeds, strict=True)):
                stego[row] = simulate(plane, self.payload, seed=int(inner))
                advance(1)
        return stego.reshape(count, channels, height, width)


EMBEDDERS: Mapping[str, Embed] = {
    "wow": AdaptiveEmbedder("wow"),
    "hugo": AdaptiveEmbedder("hugo"),
    "s_uniward": AdaptiveEmbedder("s_uniward"),
    "lsb_matching": LsbMatching(),
    "uniform_noise": UniformNoise(),
}


def find_embedder(name: str) -> Embed:
    """Return the named embedder, with the default payload (0.4 bits a pixel) or amplitude (4).

    Raises:
        ConfigError: no embedder has this name; the message names the nearest.
    """
    return find_by_name("embedder", name, EMBEDDERS)


def _load_simulator(method: Method) -> Callable[..., NDArray[np.uint8]]:
    """Return conseal's function for one channel (H, W), without its warnings of missed payloads.

    Raises:
        MissingExtraError: conseal is not installed.
    """
    try:
        import conseal
    except ImportError as error:
        raise MissingExtraError(f"embedding with {method}", "stego") from error
    family = {"wow": conseal.wow, "hugo": conseal.hugo, "s_uniward": conseal.suniward}[method]

    def simulate_channel(plane: Images, payload: float, *, seed: int) -> Any:
        """Embed into one channel (H, W)."""
        with warnings.catch_warnings():
            # A constant channel cannot hold the payload, which is expected.
            warnings.simplefilter("ignore", RuntimeWarning)
            return family.simulate_single_channel(plane, payload, seed=seed)

    return simulate_channel
