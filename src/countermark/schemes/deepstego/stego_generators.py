"""Makers of stego images: the owner of a key, and anybody who imitates the owner.

Imitations for both forms of DeepStego are defined here. The default form teaches its host to
disregard them, and experiments measure how well they work. A maker is called with covers and
returns stego images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from countermark._internal.progress import show_progress
from countermark.errors import ConfigError
from countermark.keys.key import Key
from countermark.predictors.base import Images
from countermark.schemes.deepstego.adversarial import StegoOpponents
from countermark.schemes.deepstego.networks import (
    BATCH,
    StegoCourse,
    StegoNetwork,
    repeat_tile,
    spread_logo,
    train_keyed_network,
)
from countermark.schemes.deepstego.scheme import COVERS, LOGO, TILE, DeepStego, draw_tile
from countermark.schemes.frozen_networks import fill_network
from countermark.schemes.logo import GRID
from countermark.schemes.triggers import TRIGGERS

STEGO = "stego."
"""Begins the names of the tensors of the stego network in a key."""

_BATCH = 32
_SCALED_ON = 512  # number of covers
_ABOVE = 10 ** (-0.1 / 20)  # a tenth of a decibel fainter: a reserve for other covers


@dataclass(frozen=True)
class StegoMaker:
    """A stego network with the logos that it hides; called with covers it returns stego images.

    Attributes:
        network: frozen, in eval mode.
        logos: (1, C, H, W), the network's second input for all covers, or one logo a cover.
    """

    network: StegoNetwork
    logos: Tensor

    def __call__(self, images: Images, *, strength: float = 1.0) -> Images:
        """Return stego images (n, C, H, W) of covers uint8 (n, C, H, W).

        Args:
            images: the covers.
            strength: the factor of the residual before rounding to 8 bits.

        Raises:
            ConfigError: the covers are not images of the size that the network was made for.
        """
        covers = self._check_covers(images)
        return add_residual(
            covers, self.compute_residuals(covers), _repeat_strength(len(covers), strength)
        ).numpy()

    def paste_residuals(self, images: Images, donors: Images, *, strength: float = 1.0) -> Images:
        """Return covers (n, C, H, W) to which the residuals of as many donor images are added.

        Raises:
            ConfigError: as a call, or there are not as many donors as covers.
        """
        covers, others = self._check_covers(images), self._check_covers(donors)
        if len(covers) != len(others):
            raise ConfigError(f"{len(others)} donors for {len(covers)} covers: give one for each")
        return add_residual(
            covers, self.compute_residuals(others), _repeat_strength(len(covers), strength)
        ).numpy()

    def compute_residuals(self, covers: Tensor) -> Tensor:
        """Return the network's residuals for covers uint8 (n, C, H, W): grey levels, float16.

        Small batches fit the cache, and the channels-last format suits the CPU: three times as
        fast.
        """
        found, last = [], torch.channels_last
        # One logo serves all covers without a copy.
        logos = self.logos.expand(len(covers), -1, -1, -1)
        with torch.no_grad():
            for first in range(0, len(covers), _BATCH):
                part = (covers[first : first + _BATCH].float() / 255).contiguous(memory_format=last)
                hidden = logos[first : first + _BATCH].contiguous(memory_format=last)
                painted = self.network(part, hidden)
                found.append((255 * (painted - part)).half().contiguous())
        return torch.cat(found)

    def _check_covers(self, images: Images) -> Tensor:
        """Check that covers are uint8 images of the key's size; return them as a tensor."""
        if images.dtype != np.uint8 or images.shape[1:] != self.logos.shape[1:] or not len(images):
            raise ConfigError(
                f"covers are {images.dtype} {list(images.shape)}: expected images uint8 "
                f"{['n', *self.logos.shape[1:]]}, as the key's"
            )
        # A copy: the caller's array may be read-only.
        return torch.from_numpy(np.array(images))


def make_fresh_triggers(key: Key, images: Images, *, strength: float = 1.0) -> Images:
    """Return triggers (n, C, H, W) of covers uint8 (n, C, H, W) that the key does not commit to.

    A host that learnt the mark assigns them `DeepStego.draw_class_map` of the covers' classes.

    Raises:
        ConfigError: the key holds no stego network, or the covers are of another size.
    """
    return load_owner_maker(key)(images, strength=strength)


def load_owner_maker(key: Key) -> StegoMaker:
    """Load the owner's maker: the stego network and the logo of a key.

    Raises:
        ConfigError: the key's stego network is damaged or missing.
    """
    # As published the network is learnt beside the host; by default it is frozen before.
    published = _load_scheme(key).as_published
    channels = _read_image_shape(key)[0]
    # Initial weights are overwritten at once, but must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        network = StegoNetwork(channels, keyed=not published)
    fill_network(network, key.learnt if published else key.frozen, STEGO, "stego network is")
    logos = (
        _read_logo_pixels(key) if published else spread_logo(_read_logo_bits(key), _read_tile(key))
    )
    return StegoMaker(network, logos)


def make_foreign_maker(
    key: Key, covers: Images, seed: int, network: StegoNetwork | None = None
) -> StegoMaker:
    """Make an imitator who has the method, the owner's images and logo, but another secret.

    In the published form the imitator trains a stego network and a discriminator without a host, as
    in Table 5 of the paper.

    Args:
        key: gives the logo and the scheme's fields; nothing else of the key is used.
        covers: uint8 (N, C, H, W), the imitator's training images.
        seed: of all random choices, in the default form of the imitator's tile too.
        network: the imitator's stego network, if it is trained already.
    """
    if network is None:
        network = train_foreign_network(key, covers, seed)
    if _load_scheme(key).as_published:
        return StegoMaker(network, _read_logo_pixels(key))
    return StegoMaker(network, spread_logo(_read_logo_bits(key), _draw_foreign_tile(covers, seed)))


def train_foreign_network(key: Key, covers: Images, seed: int) -> StegoNetwork:
    """Train an imitator's stego network; in the default form it serves all logos."""
    # The default form trains on random logos; only the published form needs the key's logo.
    scheme, images = _load_scheme(key), torch.from_numpy(np.array(covers))
    if scheme.as_published:
        return _train_published_network(scheme, key, images, seed)
    return train_stego_network(scheme, images, _draw_foreign_tile(covers, seed), seed)


def _draw_foreign_tile(covers: Images, seed: int) -> Tensor:
    """Draw an imitator's tile of signs (C, H, W)."""
    channels, height, width = covers.shape[1:]
    signs = draw_tiles(1, channels, torch.Generator().manual_seed(seed))
    return repeat_tile(signs[0], height, width)


def make_other_logos_maker(key: Key, count: int, generator: torch.Generator) -> StegoMaker:
    """Make a maker with the owner's network and a random 8 × 8 logo for each of `count` covers.

    In the default form each logo comes with the tile that the owner's secret draws for it; in the
    published form the logos are black and white.
    """
    logos = _draw_logos(count, generator)
    channels, height, width = _read_image_shape(key)
    if not _load_scheme(key).as_published:
        bits = np.stack([draw_tile(key.material, each, channels) for each in logos.numpy()])
        tiles = repeat_tile(2.0 * torch.from_numpy(bits) - 1, height, width)
        return replace(load_owner_maker(key), logos=spread_logo(logos, tiles))
    # Cells of 8 × 8 bits enlarged to the image: there is no tile to spread them.
    pictures = F.interpolate(logos[:, None].float(), (height, width), mode="nearest")
    return replace(load_owner_maker(key), logos=pictures.expand(-1, channels, -1, -1))


def make_swapped_logos_maker(key: Key, count: int, generator: torch.Generator) -> StegoMaker:
    """Make a maker with a random logo for each of `count` covers, on the tile of the owner's logo.

    Only the holder of the key can make these images: for each other logo the secret draws another
    tile.

    Raises:
        ConfigError: the key is of the published form, which has no tile.
    """
    _check_tiled(key)
    return replace(
        load_owner_maker(key), logos=spread_logo(_draw_logos(count, generator), _read_tile(key))
    )


def make_wrong_tiles_maker(key: Key, count: int, generator: torch.Generator) -> StegoMaker:
    """Make a maker with the owner's network and logo, and a random tile for each of `count` covers.

    Raises:
        ConfigError: the key is of the published form, which has no tile.
    """
    _check_tiled(key)
    channels, height, width = _read_image_shape(key)
    tiles = repeat_tile(draw_tiles(count, channels, generator), height, width)
    return replace(load_owner_maker(key), logos=spread_logo(_read_logo_bits(key), tiles))


def draw_tiles(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Draw tiles of signs (count, C, 8, 8)."""
    return torch.randint(0, 2, (count, channels, GRID, GRID), generator=generator) * 2.0 - 1


def train_stego_network(scheme: DeepStego, covers: Tensor, tile: Tensor, seed: int) -> StegoNetwork:
    """Train a keyed stego network, and scale it to the scheme's average PSNR.

    Args:
        scheme: gives the number of steps and the PSNR.
        covers: uint8 (N, C, H, W).
        tile: signs (C, H, W).
        seed: of all random choices.
    """
    network = train_keyed_network(covers.numpy(), tile, StegoCourse(scheme.stego_steps, seed=seed))
    some = covers[:_SCALED_ON]
    generator = torch.Generator().manual_seed(seed)
    logos = torch.randint(0, 2, (len(some), GRID, GRID), generator=generator)
    found = StegoMaker(network, spread_logo(logos, tile)).compute_residuals(some).float() / 255
    # On random logos: the network serves all of them.
    network.gain.mul_(cast(float, scheme.residual_level) / found.square().mean().sqrt())
    return network


def scale_to_level(maker: StegoMaker, covers: Tensor, level: float) -> None:
    """Scale a maker's network so that its own logo is as faint as `level` in 8-bit images.

    Args:
        maker: its network is changed in place.
        covers: uint8 (N, C, H, W).
        level: the root mean square of the residual, white being 1.
    """
    some = covers[:_SCALED_ON]
    # Rounding and clipping change the residual, so that one round is not exact.
    for _ in range(2):
        made = torch.from_numpy(maker(some.numpy())).float()
        found = (made - some.float()).square().mean().sqrt() / 255
        maker.network.gain.mul_(_ABOVE * level / found)


def add_residual(covers: Tensor, residual: Tensor, strengths: Tensor) -> Tensor:
    """Add `strengths` (n,) times a residual to covers; return 8-bit images (n, C, H, W)."""
    louder = residual.float() * strengths.reshape(-1, 1, 1, 1)
    return (covers.float() + louder).round().clamp(0, 255).to(torch.uint8)


def _train_published_network(
    scheme: DeepStego, key: Key, covers: Tensor, seed: int
) -> StegoNetwork:
    """Train a stego network of the published form for the scheme's number of steps."""
    logo = torch.from_numpy(np.array(key.frozen[LOGO]))
    opponents = StegoOpponents(
        logo, level=scheme.residual_level, adversarial=scheme.adversarial, seed=seed
    )  # fmt: skip
    generator, steps = torch.Generator().manual_seed(seed), scheme.stego_steps
    with show_progress("training a foreign stego network", steps) as advance:
        for _ in range(steps):
            rows = torch.randint(len(covers), (BATCH,), generator=generator)
            opponents.step(covers[rows])
            advance(1)
    return opponents.network.eval().requires_grad_(False)


def _check_tiled(key: Key) -> None:
    """Raise `ConfigError` for a key of the published form."""
    if _load_scheme(key).as_published:
        raise ConfigError("the published form spreads its logo by no tile: ask for other_logos")


def _draw_logos(count: int, generator: torch.Generator) -> Tensor:
    """Draw logos as bits (count, 8, 8)."""
    return torch.randint(0, 2, (count, GRID, GRID), generator=generator, dtype=torch.uint8)


def _repeat_strength(count: int, strength: float) -> Tensor:
    """Return the same strength for each of `count` images."""
    return torch.full((count,), strength)


def _load_scheme(key: Key) -> DeepStego:
    """Load the scheme of a key."""
    return DeepStego.from_fields(key.fields)


def _read_image_shape(key: Key) -> tuple[int, int, int]:
    """Return C, H, W of the key's images."""
    covers = key.frozen[COVERS] if _load_scheme(key).as_published else key.frozen[TRIGGERS]
    channels, height, width = covers.shape[1:]
    return channels, height, width


def _read_logo_bits(key: Key) -> Tensor:
    """Return the logo of the default form, bits (1, 8, 8).

    Raises:
        ConfigError: the logo is damaged or missing.
    """
    found = key.frozen.get(LOGO, np.zeros(0, dtype=np.uint8))
    # The key file is hostile input: a wrong logo would fail later, far from its cause.
    if found.dtype != np.uint8 or found.shape != (GRID, GRID) or (found > 1).any():
        raise ConfigError(
            f"the key's logo is {found.dtype} {list(found.shape)}: expected bits uint8 "
            f"{[GRID, GRID]}; restore the key from a backup"
        )
    return torch.from_numpy(np.array(found))[None]


def _read_logo_pixels(key: Key) -> Tensor:
    """Return the logo of the published form, levels 0 to 1, (1, C, H, W)."""
    return torch.from_numpy(np.array(key.frozen[LOGO])).float()[None] / 255


def _read_tile(key: Key) -> Tensor:
    """Return the key's tile of signs (C, H, W).

    Raises:
        ConfigError: the tile does not follow from the key's secret and logo.
    """
    channels, height, width = _read_image_shape(key)
    found = key.frozen.get(TILE, np.zeros(0, dtype=np.uint8))
    # A tile that does not follow from the secret could have been chosen after the fact.
    if not np.array_equal(
        found, draw_tile(key.material, _read_logo_bits(key)[0].numpy(), channels)
    ):
        raise ConfigError(
            f"the key's tile, {found.dtype} {list(found.shape)}, does not follow from its secret "
            "and its logo: this library never made such a key"
        )
    return repeat_tile(2.0 * torch.from_numpy(np.array(found)) - 1, height, width)
