"""Who makes stego images: the owner of a key, and whoever would pass for him.

What others can do stands here once, for both forms of DeepStego. The default form teaches its host
to disregard it, and experiments measure what it is worth. A maker is called with covers and returns
stego images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from countermark.answers import Images
from countermark.errors import ConfigError
from countermark.key import Key
from countermark.progress import progress
from countermark.schemes.black_box import TRIGGERS
from countermark.schemes.deepstego import COVERS, LOGO, TILE, DeepStego, tile_of
from countermark.schemes.logo import GRID
from countermark.schemes.training.opponents import Opponents
from countermark.schemes.training.stego import (
    BATCH,
    StegoCourse,
    StegoNetwork,
    spread,
    tiled,
    train_keyed,
)
from countermark.schemes.training.stored import filled

STEGO = "stego."
"""Begins the names of the tensors of the stego network in a key."""

_BATCH = 32
_SCALED_ON = 512  # covers
_ABOVE = 10 ** (-0.1 / 20)  # a tenth of a decibel, for covers that it was not scaled on


@dataclass(frozen=True)
class Maker:
    """A stego network, with the logo that it hides.

    Attributes:
        network: frozen, in eval mode.
        logos: (1, C, H, W), what the network is fed with beside each cover, or one for each cover.
    """

    network: StegoNetwork
    logos: Tensor

    def __call__(self, images: Images, *, strength: float = 1.0) -> Images:
        """Stego images (n, C, H, W) of covers uint8 (n, C, H, W).

        Args:
            images: the covers.
            strength: the residual is multiplied by it before it is rounded to 8 bits.

        Raises:
            ConfigError: the covers are not images of the size that the network was made for.
        """
        covers = self._covers(images)
        return added(covers, self.residuals(covers), _all(len(covers), strength)).numpy()

    def pasted(self, images: Images, donors: Images, *, strength: float = 1.0) -> Images:
        """Covers (n, C, H, W) with the residuals of as many other images pasted on them.

        Raises:
            ConfigError: as a call, or there are not as many donors as covers.
        """
        covers, others = self._covers(images), self._covers(donors)
        if len(covers) != len(others):
            raise ConfigError(f"{len(others)} donors for {len(covers)} covers: give one for each")
        return added(covers, self.residuals(others), _all(len(covers), strength)).numpy()

    def residuals(self, covers: Tensor) -> Tensor:
        """What the network adds to covers uint8 (n, C, H, W): grey levels, float16.

        Few images at a time fit the cache, and channels last suit the CPU: three times as fast.
        """
        found, last = [], torch.channels_last
        logos = self.logos.expand(len(covers), -1, -1, -1)
        with torch.no_grad():
            for first in range(0, len(covers), _BATCH):
                part = (covers[first : first + _BATCH].float() / 255).contiguous(memory_format=last)
                hidden = logos[first : first + _BATCH].contiguous(memory_format=last)
                painted = self.network(part, hidden)
                found.append((255 * (painted - part)).half().contiguous())
        return torch.cat(found)

    def _covers(self, images: Images) -> Tensor:
        if images.dtype != np.uint8 or images.shape[1:] != self.logos.shape[1:] or not len(images):
            raise ConfigError(
                f"covers are {images.dtype} {list(images.shape)}: expected images uint8 "
                f"{['n', *self.logos.shape[1:]]}, as the key's"
            )
        return torch.from_numpy(np.array(images))


def fresh(key: Key, images: Images, *, strength: float = 1.0) -> Images:
    """The owner's triggers (n, C, H, W) of covers uint8 (n, C, H, W) that nobody committed to.

    A host that learnt the mark takes them for `DeepStego.class_map` of the covers' classes.

    Raises:
        ConfigError: the key holds no stego network, or the covers are of another size.
    """
    return owner(key)(images, strength=strength)


def owner(key: Key) -> Maker:
    """The owner: the stego network and the logo of a key.

    Raises:
        ConfigError: the key's stego network is damaged, or not there.
    """
    published = _scheme(key).as_published
    channels = _shape(key)[0]
    with torch.random.fork_rng(devices=[]):
        network = StegoNetwork(channels, keyed=not published)
    filled(network, key.learnt if published else key.frozen, STEGO, "stego network is")
    logos = _pixels(key) if published else spread(_bits(key), _tile(key))
    return Maker(network, logos)


def foreign(key: Key, covers: Images, seed: int, network: StegoNetwork | None = None) -> Maker:
    """Somebody with the recipe, the owner's images and his logo, but another secret.

    As published he trains a stego network and a discriminator without any host, which is how Table
    5 of the paper has it.

    Args:
        key: whose logo he hides; nothing else of it is used but the scheme's fields.
        covers: uint8 (N, C, H, W), what he trains on.
        seed: of all that is random, in the default form his tile included.
        network: his `foreign_network`, where it is there already.
    """
    if network is None:
        network = foreign_network(key, covers, seed)
    if _scheme(key).as_published:
        return Maker(network, _pixels(key))
    return Maker(network, spread(_bits(key), _foreign_tile(covers, seed)))


def foreign_network(key: Key, covers: Images, seed: int) -> StegoNetwork:
    """The stego network of `foreign`; that of the default form serves all logos."""
    scheme, images = _scheme(key), torch.from_numpy(np.array(covers))
    if scheme.as_published:
        return _without_a_host(scheme, key, images, seed)
    return trained(scheme, images, _foreign_tile(covers, seed), seed)


def _foreign_tile(covers: Images, seed: int) -> Tensor:
    channels, height, width = covers.shape[1:]
    signs = random_tiles(1, channels, torch.Generator().manual_seed(seed))
    return tiled(signs[0], height, width)


def other_logos(key: Key, count: int, generator: torch.Generator) -> Maker:
    """The owner's network with another random logo, 8 × 8 bits, for each of `count` covers.

    In the default form each comes with the tile that the owner's secret draws for it; as published
    they are black and white.
    """
    logos = _random_logos(count, generator)
    channels, height, width = _shape(key)
    if not _scheme(key).as_published:
        bits = np.stack([tile_of(key.material, each, channels) for each in logos.numpy()])
        tiles = tiled(2.0 * torch.from_numpy(bits) - 1, height, width)
        return replace(owner(key), logos=spread(logos, tiles))
    pictures = F.interpolate(logos[:, None].float(), (height, width), mode="nearest")
    return replace(owner(key), logos=pictures.expand(-1, channels, -1, -1))


def swapped_logos(key: Key, count: int, generator: torch.Generator) -> Maker:
    """Other random logos for `count` covers, on the tile that the owner's own has.

    Only who holds the key can make such images: the secret draws another tile for each logo.

    Raises:
        ConfigError: the key is of the published form, which has no tile.
    """
    _check_tiled(key)
    return replace(owner(key), logos=spread(_random_logos(count, generator), _tile(key)))


def wrong_tiles(key: Key, count: int, generator: torch.Generator) -> Maker:
    """The owner's network and logo, with another random tile for each of `count` covers.

    Raises:
        ConfigError: the key is of the published form, which has no tile.
    """
    _check_tiled(key)
    channels, height, width = _shape(key)
    tiles = tiled(random_tiles(count, channels, generator), height, width)
    return replace(owner(key), logos=spread(_bits(key), tiles))


def random_tiles(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Tiles of signs (count, C, 8, 8)."""
    return torch.randint(0, 2, (count, channels, GRID, GRID), generator=generator) * 2.0 - 1


def trained(scheme: DeepStego, covers: Tensor, tile: Tensor, seed: int) -> StegoNetwork:
    """A keyed stego network, scaled so that its images have the scheme's PSNR on average.

    Args:
        scheme: says how long it is trained, and its PSNR.
        covers: uint8 (N, C, H, W).
        tile: signs (C, H, W).
        seed: of all that is random.
    """
    network = train_keyed(covers.numpy(), tile, StegoCourse(scheme.stego_steps, seed=seed))
    some = covers[:_SCALED_ON]
    generator = torch.Generator().manual_seed(seed)
    logos = torch.randint(0, 2, (len(some), GRID, GRID), generator=generator)
    found = Maker(network, spread(logos, tile)).residuals(some).float() / 255
    network.gain.mul_(cast(float, scheme.level) / found.square().mean().sqrt())
    return network


def hold(maker: Maker, covers: Tensor, level: float) -> None:
    """Scale a maker's network so that its own logo is as faint as `level` in 8-bit images.

    Args:
        maker: whose network is changed.
        covers: uint8 (N, C, H, W).
        level: the root mean square of what is added, white being 1.
    """
    some = covers[:_SCALED_ON]
    for _ in range(2):  # rounding and clipping change what is added
        made = torch.from_numpy(maker(some.numpy())).float()
        found = (made - some.float()).square().mean().sqrt() / 255
        maker.network.gain.mul_(_ABOVE * level / found)


def added(covers: Tensor, residual: Tensor, strengths: Tensor) -> Tensor:
    """Covers with `strengths` (n,) times a residual, as 8-bit images (n, C, H, W)."""
    louder = residual.float() * strengths.reshape(-1, 1, 1, 1)
    return (covers.float() + louder).round().clamp(0, 255).to(torch.uint8)


def _without_a_host(scheme: DeepStego, key: Key, covers: Tensor, seed: int) -> StegoNetwork:
    """A stego network of the published form, trained for as many steps as the scheme says."""
    logo = torch.from_numpy(np.array(key.frozen[LOGO]))
    opponents = Opponents(
        logo, level=scheme.level, adversarial=scheme.adversarial, seed=seed
    )  # fmt: skip
    generator, steps = torch.Generator().manual_seed(seed), scheme.stego_steps
    with progress("training a foreign stego network", steps) as advance:
        for _ in range(steps):
            rows = torch.randint(len(covers), (BATCH,), generator=generator)
            opponents.step(covers[rows])
            advance(1)
    return opponents.network.eval().requires_grad_(False)


def _check_tiled(key: Key) -> None:
    if _scheme(key).as_published:
        raise ConfigError("the published form spreads its logo by no tile: ask for other_logos")


def _random_logos(count: int, generator: torch.Generator) -> Tensor:
    """Bits (count, 8, 8)."""
    return torch.randint(0, 2, (count, GRID, GRID), generator=generator, dtype=torch.uint8)


def _all(count: int, strength: float) -> Tensor:
    return torch.full((count,), strength)


def _scheme(key: Key) -> DeepStego:
    return DeepStego.from_fields(key.fields)


def _shape(key: Key) -> tuple[int, int, int]:
    """C, H, W of the key's images."""
    covers = key.frozen[COVERS] if _scheme(key).as_published else key.frozen[TRIGGERS]
    channels, height, width = covers.shape[1:]
    return channels, height, width


def _bits(key: Key) -> Tensor:
    """The logo of the default form, bits (1, 8, 8).

    Raises:
        ConfigError: it is damaged, or not there.
    """
    found = key.frozen.get(LOGO, np.zeros(0, dtype=np.uint8))
    if found.dtype != np.uint8 or found.shape != (GRID, GRID) or (found > 1).any():
        raise ConfigError(
            f"the key's logo is {found.dtype} {list(found.shape)}: expected bits uint8 "
            f"{[GRID, GRID]}; restore the key from a backup"
        )
    return torch.from_numpy(np.array(found))[None]


def _pixels(key: Key) -> Tensor:
    """The logo of the published form, levels 0 to 1, (1, C, H, W)."""
    return torch.from_numpy(np.array(key.frozen[LOGO])).float()[None] / 255


def _tile(key: Key) -> Tensor:
    """The key's tile of signs (C, H, W).

    Raises:
        ConfigError: it does not follow from the key's secret and logo.
    """
    channels, height, width = _shape(key)
    found = key.frozen.get(TILE, np.zeros(0, dtype=np.uint8))
    if not np.array_equal(found, tile_of(key.material, _bits(key)[0].numpy(), channels)):
        raise ConfigError(
            f"the key's tile, {found.dtype} {list(found.shape)}, does not follow from its secret "
            "and its logo: this library never made such a key"
        )
    return tiled(2.0 * torch.from_numpy(np.array(found)) - 1, height, width)
