"""The stego network of DeepStego (Li and Guo 2019), and its training before there is a host.

The network hides a logo invisibly in a cover. In the paper the network paints the whole image, and
its loss lets the logo vanish. In the keyed form the network paints a bounded residual; a secret
tile of signs spreads the logo, and a decoder, which is discarded later, must read the logo back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark._internal.progress import show_progress
from countermark.schemes.logo import GRID

_AMPLITUDE = 20 / 255  # of the residual before it is scaled to its PSNR
BATCH = 48
"""Covers a step, wherever a stego network is trained without a host."""

_RATE = 3e-3  # initial learning rate of Adam
_C1, _C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for levels 0 to 1
_WINDOW, _SIGMA = 11, 1.5


class StegoNetwork(nn.Module):
    """A network from covers and logos (N, C, H, W) to stego images, one branch for each input.

    Args:
        channels: C.
        width: channels inside.
        keyed: true to paint a bounded residual that is added to the cover, false to paint the
            image.
    """

    def __init__(self, channels: int, width: int = 16, *, keyed: bool = True) -> None:
        super().__init__()
        self.keyed = keyed
        self.of_cover, self.of_logo = _make_branch(channels, width), _make_branch(channels, width)
        self.enter = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.inner = _make_block(width)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        self.gain: Tensor
        # Part of the state: a key must reproduce the level of its triggers.
        self.register_buffer("gain", torch.ones(()))

    def forward(self, covers: Tensor, logos: Tensor) -> Tensor:
        """Return stego images (N, C, H, W), levels 0 to 1, of covers and logos shaped alike."""
        joined = torch.cat([self.of_cover(covers), self.of_logo(logos)], dim=1)
        x = F.leaky_relu(self.enter(joined), 0.1)
        x = F.leaky_relu(x + self.inner(x), 0.1)
        painted = self.leave(x)
        if not self.keyed:
            return torch.sigmoid(painted)
        return covers + self.gain * _AMPLITUDE * torch.tanh(painted)


class Discriminator(nn.Module):
    """Linear layers that tell stego images from covers (N, C, H, W): logits (N,) of "cover"."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * height * width, 128), nn.LeakyReLU(0.1),
            nn.Linear(128, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N,)."""
        return cast(Tensor, self.layers(images))[:, 0]


class Decoder(nn.Module):
    """A network that reads the logo from stego images and their tile: logits (N, 8, 8)."""

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1), nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(width, 1, 1),
        )  # fmt: skip

    def forward(self, images: Tensor, tile: Tensor) -> Tensor:
        """Return logits (N, 8, 8)."""
        seen = torch.cat([images, images * tile], dim=1)
        return F.adaptive_avg_pool2d(self.layers(seen), GRID)[:, 0]


def spread_logo(bits: Tensor, tile: Tensor) -> Tensor:
    """Spread logos of 0/1 bits (N, 8, 8) as signs over tiles (C, H, W) or (N, C, H, W)."""
    # The tile is secret: only the key gives the signs that spread the logo.
    signs = 2.0 * bits[:, None].float() - 1
    return F.interpolate(signs, tile.shape[-2:], mode="nearest") * tile


def repeat_tile(signs: Tensor, height: int, width: int) -> Tensor:
    """Repeat tiles of signs (…, C, 8, 8) over an image (…, C, H, W)."""
    repeats = -(-height // GRID), -(-width // GRID)
    return signs.repeat(*[1] * (signs.dim() - 2), *repeats)[..., :height, :width]


def compute_ssim(one: Tensor, other: Tensor) -> Tensor:
    """Compute the structural similarity (N,) of images (N, C, H, W), levels 0 to 1."""
    # Local means, then local variances as the mean of products minus the product of means.
    means = _blur_images(one), _blur_images(other)
    products = means[0].square(), means[1].square(), means[0] * means[1]
    variances = [
        _blur_images(a * b) - product
        for (a, b), product in zip(
            ((one, one), (other, other), (one, other)), products, strict=True
        )
    ]
    # Eq. (2), Wang et al. 2004
    similar = (2 * products[2] + _C1) * (2 * variances[2] + _C2)
    apart = (products[0] + products[1] + _C1) * (variances[0] + variances[1] + _C2)
    return (similar / apart).mean(dim=(1, 2, 3))


def _blur_images(images: Tensor) -> Tensor:
    """Blur images (N, C, H, W) with a Gaussian window, without padding."""
    rows, columns = (_make_band(size).to(images) for size in images.shape[2:])
    return rows @ images @ columns.t()


@cache
def _make_band(size: int) -> Tensor:
    """Return a Gaussian window as a band matrix (size − 10, size), applied to rows and columns."""
    # An image smaller than the window is blurred over its whole side.
    window = min(_WINDOW, size)
    at = torch.arange(window) - (window - 1) / 2
    weights = torch.exp(-at.square() / (2 * _SIGMA**2))
    band = torch.zeros(size - window + 1, size)
    for row in range(len(band)):
        band[row, row : row + window] = weights / weights.sum()
    return band


def _make_branch(channels: int, width: int) -> nn.Sequential:
    """Make a branch of transposed convolutions for one input."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels, width, 3, padding=1), nn.BatchNorm2d(width),
        nn.LeakyReLU(0.1), nn.ConvTranspose2d(width, channels, 3, padding=1),
        nn.BatchNorm2d(channels), nn.LeakyReLU(0.1),
    )  # fmt: skip


def _make_block(width: int) -> nn.Sequential:
    """Make a residual block."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.1),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
    )  # fmt: skip


@dataclass(frozen=True)
class StegoCourse:
    """Options of a keyed stego network's training: the number of steps, and the seed."""

    steps: int = 600
    seed: int = 0


def train_keyed_network(
    covers: NDArray[np.uint8], tile: Tensor, course: StegoCourse
) -> StegoNetwork:
    """Train a keyed stego network on covers uint8 (N, C, H, W); return it frozen, in eval mode.

    Every step has random logos, so that one network serves all logos. It never sees a host.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(course.seed)
        shape = covers.shape[1:]
        network, decoder = StegoNetwork(shape[0]), Decoder(shape[0])
        discriminator = Discriminator(*shape)
        trained = [*network.parameters(), *decoder.parameters()]
        optimizer = torch.optim.Adam(trained, _RATE, betas=(0.5, 0.999))
        against = torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.5, 0.999))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.steps)
        with (
            torch.enable_grad(),
            show_progress("training the stego network", course.steps) as advance,
        ):
            for step in range(course.steps):
                rows = torch.randint(len(covers), (BATCH,))
                real = torch.from_numpy(covers[rows.numpy()]).float() / 255
                # Random logos in each step keep the network from learning a single one.
                bits = torch.randint(0, 2, (BATCH, GRID, GRID))
                stego = network(real, spread_logo(bits, tile))
                # The image losses grow from 20 % to 60 % of the steps: the decoder must read first.
                ramp = min(1.0, max(0.0, 2.5 * step / course.steps - 0.5))
                told = discriminator(stego.detach()), discriminator(real)
                against.zero_grad()
                (F.softplus(told[0]).mean() + F.softplus(-told[1]).mean()).backward()  # type: ignore[no-untyped-call]
                against.step()
                # One grey level of noise: the decoder must not rely on more precision than 8 bits.
                noisy = stego + torch.randn_like(stego) / 255
                loss = (
                    ramp
                    * (40 * F.mse_loss(stego, real) + 4 * (1 - compute_ssim(stego, real).mean()))
                    + 0.4 * F.binary_cross_entropy_with_logits(decoder(noisy, tile), bits.float())
                    + 0.02 * F.softplus(-discriminator(stego)).mean()
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                advance(1)
        network.eval().requires_grad_(False)
    return network
