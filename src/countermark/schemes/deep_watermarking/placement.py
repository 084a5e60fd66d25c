"""Placement of a message's bits in an image: H and R of the default form, for any message.

The tile placement gives every bit a cell of a square, and repeats the square over the image; H and
R are those of the paper, with the message as the hidden image. In the other placement bits have no
places: the message chooses a filter, the filtered features of the image are added, and R correlates
features and image over all places, so that shifts and crops change nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark.schemes.deep_watermarking.networks import SIZES, Hider, Revealer
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking

_CLIPPED = 3.0  # standard deviations at which the residual is bounded
_FEATURES, _TAPS = 8, 7  # number of features, and side of the filters
_NEAR, _AROUND = 7, 15  # pixels: widths over which means and contrast are taken
_DARK = 1e-4  # of contrast, squared: keeps flat areas from being amplified
_MATCHED = 0.3  # initial weights of R's last layer, as a multiple of the filters


class ResidualAdder(nn.Module):
    """Base class of networks that add a residual to images at a fixed strength."""

    rms: Tensor
    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rms", torch.ones(()))
        self.register_buffer("gain", torch.ones(()))

    def add_residual(self, images: Tensor, painted: Tensor, level: float) -> Tensor:
        """Add a residual to images (N, C, H, W) at the root mean square `level`, white being 1.

        In training the batch has the level exactly; later all images together have it on average.
        """
        painted, rms = painted.float(), self.rms
        # The running mean makes the level after training independent of the batch.
        if self.training:
            rms = painted.square().mean().sqrt() + 1e-12
            self.rms.mul_(0.95).add_(0.05 * rms.detach())
        # Bounded, because single loud pixels would be seen.
        bounded = _CLIPPED * torch.tanh(painted / (_CLIPPED * rms))
        return images + level * self.gain * bounded


class Placement(ResidualAdder, ABC):
    """Base class of H and R for messages of T bits.

    Args:
        scheme: gives channels, bits, side and sizes.
    """

    def __init__(self, scheme: DeepWatermarking) -> None:
        super().__init__()
        self.scheme = scheme

    @abstractmethod
    def paint_residual(self, images: Tensor, bits: Tensor) -> Tensor:
        """Return H's residual for images (N, C, H, W) and bits (N, T), not yet scaled."""

    @abstractmethod
    def iterate_reader_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of R."""

    @abstractmethod
    def compute_scores(self, images: Tensor) -> Tensor:
        """Return R's score of each bit (N, T) in images (N, C, H, W): above 0 for a 1."""

    def hide_bits(self, images: Tensor, bits: Tensor, level: float) -> Tensor:
        """Return images (N, C, H, W) marked with bits (N, T) at a root mean square `level`."""
        return self.add_residual(images, self.paint_residual(images, bits), level)


class TilePlacement(Placement):
    """A placement with a cell for each bit in an S × S square, which is repeated over the image."""

    def __init__(self, scheme: DeepWatermarking) -> None:
        super().__init__(scheme)
        sizes = SIZES[scheme.sizes]
        self.hider = Hider(scheme.channels, sizes)
        self.revealer = Revealer(scheme.channels, sizes)
        self.register_buffer("cells", _make_cells(scheme.grid_size, scheme.side), persistent=False)

    def paint_residual(self, images: Tensor, bits: Tensor) -> Tensor:
        """Return the U-Net's output for images and the message drawn as an image."""
        picture = draw_bits_as_image(bits, self.scheme.side, (images.shape[2], images.shape[3]))
        return self.hider.paint_image(images, picture.expand(-1, images.shape[1], -1, -1))

    def iterate_reader_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of R."""
        return self.revealer.parameters()

    def compute_shifted_scores(self, images: Tensor) -> Tensor:
        """Return the scores (N, S·S, T) at every shift of the square, down and to the right."""
        side, cells = self.scheme.side, cast(Tensor, self.cells)
        painted = self.revealer.paint_image(images).float().mean(1)  # (N, H, W)
        # All repeats are folded onto one square first, and every shift is read from it.
        places = [torch.arange(size, device=painted.device) % side for size in painted.shape[1:]]
        rows, columns = (F.one_hot(each, side).float().t() for each in places)  # (S, H), (S, W)
        folded = (rows @ painted @ columns.t()) / torch.outer(
            rows.sum(1), columns.sum(1)
        ).clamp_min(1)
        means = cells / cells.sum(1, keepdim=True)
        moved = torch.stack([means.roll(shift, 1) for shift in range(side)])  # (S, G, S)
        found = torch.einsum("agh,nhw,bfw->nabgf", moved, folded, moved)
        return found.flatten(3).flatten(1, 2)

    def compute_scores(self, images: Tensor) -> Tensor:
        """Return the mean (N, T) of R's output in each cell, over all squares."""
        painted = self.revealer.paint_image(images).float().mean(1)  # (N, H, W)
        side, cells = self.scheme.side, cast(Tensor, self.cells)
        rows, columns = (_make_cell_means(cells, size, side) for size in painted.shape[1:])
        found = torch.einsum("gh,nhw,fw->ngf", rows, painted, columns)  # (N, G, G)
        return found.flatten(1)


class EverywherePlacement(Placement):
    """A placement of all bits at every place of the image.

    H adds features of the image, filtered as the message says. R computes the features of the
    marked image again and correlates them with the image at near places. H and R begin with the
    same features and filters, so that R is a matched filter from the start; two networks with
    unrelated weights would not begin to learn.
    """

    def __init__(self, scheme: DeepWatermarking) -> None:
        super().__init__(scheme)
        channels, statistics = scheme.channels, _FEATURES * _TAPS**2
        self.hider, self.seen = _FeatureProducts(channels), _FeatureProducts(channels)
        # Equal at first; both are trained apart from here.
        self.seen.load_state_dict(self.hider.state_dict())
        filters = torch.randn(scheme.bits, statistics) / scheme.bits**0.5
        self.filters = nn.Parameter(filters)
        self.sharp = nn.Conv2d(channels, 1, 5, padding=2, padding_mode="replicate", bias=False)
        self.norm = nn.BatchNorm1d(statistics)
        self.revealer = nn.Linear(statistics, scheme.bits)
        with torch.no_grad():
            self.sharp.weight.copy_(_make_sharpening_filter(channels))
            self.revealer.weight.copy_(_MATCHED * filters)
            self.revealer.bias.zero_()

    def paint_residual(self, images: Tensor, bits: Tensor) -> Tensor:
        """Return features of the image, filtered as the message says, the same for all channels."""
        count, _, height, width = images.shape
        features = F.pad(self.hider(images), (_TAPS // 2,) * 4, mode="replicate")
        chosen = (2 * bits - 1) @ self.filters  # (N, F·taps)
        kernels = chosen.reshape(count, _FEATURES, _TAPS, _TAPS)
        together = features.reshape(1, -1, *features.shape[2:])
        # One group an image: each image has the filter of its own message.
        filtered = F.conv2d(together, kernels, groups=count)
        return filtered.reshape(count, 1, height, width).expand(-1, images.shape[1], -1, -1)

    def iterate_reader_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of R's features, their norm and the last layer."""
        parts = (self.seen, self.sharp, self.norm, self.revealer)
        return (each for part in parts for each in part.parameters())

    def compute_scores(self, images: Tensor) -> Tensor:
        """Return scores (N, T) from correlations of features and image at near places."""
        inner = slice(_TAPS // 2, -(_TAPS // 2))
        image = _equalise_contrast(self.sharp(images), _NEAR)[..., inner, inner]
        # Soft clipping: a few loud edges must not outweigh the rest of the correlation.
        image = image / (1 + (image / _CLIPPED).square()).sqrt()
        seen = self.seen(images).flatten(2)
        moved = F.unfold(image.flip(2, 3), _TAPS, padding=_TAPS - 1).flip(2)  # (N, taps, H·W)
        found = seen @ moved.transpose(1, 2) / (image.shape[2] * image.shape[3])  # (N, F, taps)
        return cast(Tensor, self.revealer(self.norm(found.flatten(1))))


class _FeatureProducts(nn.Module):
    """A network whose features (N, F, H, W) are products of two filter responses to an image.

    The contrast of the image is made the same everywhere first. A response alone is odd in the
    image, as a filtered image is, and would correlate with it; a product is even and does not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pairs = nn.Conv2d(channels, 2 * _FEATURES, _TAPS, padding=_TAPS // 2, bias=False)
        with torch.no_grad():
            weight = self.pairs.weight
            weight.copy_(_average_boxes(torch.randn_like(weight), 3))  # the finest is lost first
            weight -= weight.mean((2, 3), keepdim=True)
            weight /= weight.flatten(1).norm(dim=1)[:, None, None, None]

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, F, H, W) of images (N, C, H, W)."""
        shown = _equalise_contrast(images - _average_boxes(images, _NEAR), _AROUND)
        one, other = torch.tanh(self.pairs(shown)).chunk(2, 1)
        products = one * other
        return products - _average_boxes(products, _AROUND)


def _average_boxes(images: Tensor, width: int) -> Tensor:
    """Return the means of images (N, C, H, W) over squares of an odd width."""
    padded = F.pad(images, (width // 2,) * 4, mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, (width, 1), 1), (1, width), 1)


def _equalise_contrast(images: Tensor, width: int) -> Tensor:
    """Divide images (N, C, H, W) by their root mean square over squares of an odd width."""
    return images / (_average_boxes(images.square(), width) + _DARK).sqrt()


def _make_sharpening_filter(channels: int) -> Tensor:
    """Return a filter (1, C, 5, 5) that keeps the differences between neighbouring pixels."""
    once = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])[None, None] / 4
    return F.conv2d(once, once, padding=2).expand(1, channels, -1, -1) / channels


def make_placement(scheme: DeepWatermarking) -> Placement:
    """Make untrained H and R of a scheme."""
    return (TilePlacement if scheme.placement == "tile" else EverywherePlacement)(scheme)


def draw_bits_as_image(bits: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Draw bits (N, T) as images (N, 1, H, W): cells of a square of the given side, repeated."""
    grid = round(bits.shape[1] ** 0.5)
    square = bits.float().reshape(-1, 1, grid, grid)
    square = F.interpolate(square, (side, side), mode="nearest")
    return repeat_square(square, size)


def repeat_square(square: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat squares (N, C, S, S) over (N, C, H, W), beginning with a whole square."""
    side = square.shape[-1]
    times = [-(-each // side) for each in size]
    return square.repeat(1, 1, *times)[..., : size[0], : size[1]]


def _make_cells(grid: int, side: int) -> Tensor:
    """Return the 0/1 matrix (G, S) of which of S pixels lie in each of G cells."""
    # The same cells as `F.interpolate` draws with its nearest neighbours.
    at = (torch.arange(side) * grid) // side
    return F.one_hot(at, grid).t().float()


def _make_cell_means(cells: Tensor, size: int, side: int) -> Tensor:
    """Return the matrix (G, size) that takes means over the cells (G, S) of repeated squares."""
    # A small image may hold no pixel of a cell: its row is then 0, not NaN.
    over = cells.repeat(1, -(-size // side))[:, :size]
    return over / over.sum(1, keepdim=True).clamp_min(1)
