"""Where the bits of a message go in an image: H and R of the default form, for any message.

`Tile` gives every bit a cell of a square that is repeated over the image; H and R are those of the
paper, with the message as their picture. `Everywhere` has no places: the message chooses a filter,
the filtered features of the image are what is added, and R correlates features over all places, so
that shifts and crops change nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark.schemes.deep_watermarking import DeepWatermarking
from countermark.schemes.training.hiding import SIZES, Hider, Revealer

_CLIPPED = 3.0  # deviations at which what is added is bounded
_TAPS = 5
_SEEN, _BESIDE = 16, 3  # features of R, and those that they are correlated with


class Held(nn.Module):
    """Adds to images what something paints, at a strength that is held."""

    rms: Tensor
    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rms", torch.ones(()))
        self.register_buffer("gain", torch.ones(()))

    def added(self, images: Tensor, painted: Tensor, level: float) -> Tensor:
        """Images (N, C, H, W), off by the root mean square `level`, white being 1.

        In training the batch has that level exactly; later all images together do, on average.
        """
        painted, rms = painted.float(), self.rms
        if self.training:
            rms = painted.square().mean().sqrt() + 1e-12
            self.rms.mul_(0.95).add_(0.05 * rms.detach())
        bounded = _CLIPPED * torch.tanh(painted / (_CLIPPED * rms))
        return images + level * self.gain * bounded


class Placement(Held, ABC):
    """H and R for messages of T bits.

    Args:
        scheme: channels, bits, side and sizes.
    """

    def __init__(self, scheme: DeepWatermarking) -> None:
        super().__init__()
        self.scheme = scheme

    @abstractmethod
    def painted(self, images: Tensor, bits: Tensor) -> Tensor:
        """What H would add to images (N, C, H, W) for bits (N, T), at no particular strength."""

    @abstractmethod
    def reader_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of R."""

    @abstractmethod
    def scores(self, images: Tensor) -> Tensor:
        """What R says of each bit (N, T) in images (N, C, H, W): above 0 for a 1."""

    def hidden(self, images: Tensor, bits: Tensor, level: float) -> Tensor:
        """Marked images (N, C, H, W), off by the root mean square `level`, see `added`."""
        return self.added(images, self.painted(images, bits), level)


class Tile(Placement):
    """Each bit in a cell of an S × S square, which is repeated over the image."""

    def __init__(self, scheme: DeepWatermarking) -> None:
        super().__init__(scheme)
        sizes = SIZES[scheme.sizes]
        self.hider = Hider(scheme.channels, sizes)
        self.revealer = Revealer(scheme.channels, sizes)
        self.register_buffer("cells", _cells(scheme.grid, scheme.side), persistent=False)

    def painted(self, images: Tensor, bits: Tensor) -> Tensor:
        """By the U-Net, beside the message as a picture."""
        picture = spread(bits, self.scheme.side, (images.shape[2], images.shape[3]))
        return self.hider.painted(images, picture.expand(-1, images.shape[1], -1, -1))

    def reader_parameters(self) -> Iterator[nn.Parameter]:
        """Those of R."""
        return self.revealer.parameters()

    def shifted(self, images: Tensor) -> Tensor:
        """The scores (N, S·S, T) at every shift of the square, downwards and to the right."""
        side, cells = self.scheme.side, cast(Tensor, self.cells)
        painted = self.revealer.painted(images).float().mean(1)  # (N, H, W)
        places = [torch.arange(size, device=painted.device) % side for size in painted.shape[1:]]
        rows, columns = (F.one_hot(each, side).float().t() for each in places)  # (S, H), (S, W)
        folded = (rows @ painted @ columns.t()) / torch.outer(
            rows.sum(1), columns.sum(1)
        ).clamp_min(1)
        means = cells / cells.sum(1, keepdim=True)
        moved = torch.stack([means.roll(shift, 1) for shift in range(side)])  # (S, G, S)
        found = torch.einsum("agh,nhw,bfw->nabgf", moved, folded, moved)
        return found.flatten(3).flatten(1, 2)

    def scores(self, images: Tensor) -> Tensor:
        """The mean of what R paints in each cell, over all squares."""
        painted = self.revealer.painted(images).float().mean(1)  # (N, H, W)
        side, cells = self.scheme.side, cast(Tensor, self.cells)
        rows, columns = (_repeated(cells, size, side) for size in painted.shape[1:])
        found = torch.einsum("gh,nhw,fw->ngf", rows, painted, columns)  # (N, G, G)
        return found.flatten(1)


class Everywhere(Placement):
    """All bits at every place of the image."""

    def __init__(self, scheme: DeepWatermarking, width: int = _SEEN) -> None:
        super().__init__(scheme)
        channels, self.width = scheme.channels, width
        self.hider = _features(channels, width, nn.Tanh())
        filters = torch.randn(scheme.bits, width * _TAPS**2) / scheme.bits**0.5
        self.filters = nn.Parameter(filters)
        self.seen = _features(channels, width, nn.Identity())
        self.beside = nn.Conv2d(channels, _BESIDE, 5, padding=2, bias=False)
        statistics = width * _BESIDE * _TAPS**2
        self.norm = nn.BatchNorm1d(statistics)
        self.revealer = nn.Linear(statistics, scheme.bits)
        self._without_brightness()

    def _without_brightness(self) -> None:
        """Begin with features that see no brightness, and a last layer that says nothing.

        Photographs are smooth: features that see brightness all see the same, and what they say at
        first is noise that takes long to unlearn.
        """
        with torch.no_grad():
            for layer in cast(list[nn.Conv2d], [self.hider[0], self.seen[0], self.beside]):
                layer.weight -= layer.weight.mean((2, 3), keepdim=True)
            self.revealer.weight.zero_()

    def painted(self, images: Tensor, bits: Tensor) -> Tensor:
        """Features of the image, filtered as the message says; colours are all alike."""
        count, _, height, width = images.shape
        features = F.pad(self.hider(images), (_TAPS // 2,) * 4, mode="replicate")
        chosen = (2 * bits - 1) @ self.filters  # (N, F·taps)
        kernels = chosen.reshape(count, self.width, _TAPS, _TAPS)
        together = features.reshape(1, -1, *features.shape[2:])
        filtered = F.conv2d(together, kernels, groups=count)
        return filtered.reshape(count, 1, height, width).expand(-1, images.shape[1], -1, -1)

    def reader_parameters(self) -> Iterator[nn.Parameter]:
        """Those of its features, their norm and the last layer."""
        parts = (self.seen, self.beside, self.norm, self.revealer)
        return (each for part in parts for each in part.parameters())

    def scores(self, images: Tensor) -> Tensor:
        """Of correlations between features at near places, over the whole image."""
        seen, beside = _standard(self.seen(images)), _standard(self.beside(images))
        height, width = images.shape[2] - _TAPS + 1, images.shape[3] - _TAPS + 1
        half = _TAPS // 2
        middle = beside[:, :, half : half + height, half : half + width].flatten(2)
        found = [
            seen[:, :, down : down + height, right : right + width].flatten(2)
            @ middle.transpose(1, 2)
            / (height * width)
            for down in range(_TAPS)
            for right in range(_TAPS)
        ]  # each (N, F, B)
        return cast(Tensor, self.revealer(self.norm(torch.cat(found, 1).flatten(1))))


def placement(scheme: DeepWatermarking) -> Placement:
    """Untrained H and R of a scheme."""
    return (Tile if scheme.placement == "tile" else Everywhere)(scheme)


def spread(bits: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Bits (N, T) as pictures (N, 1, H, W): cells of a square of that side, repeated."""
    grid = round(bits.shape[1] ** 0.5)
    square = bits.float().reshape(-1, 1, grid, grid)
    square = F.interpolate(square, (side, side), mode="nearest")
    return repeated(square, size)


def repeated(square: Tensor, size: tuple[int, int]) -> Tensor:
    """Squares (N, C, S, S) repeated over (N, C, H, W), the first one whole in the corner."""
    side = square.shape[-1]
    times = [-(-each // side) for each in size]
    return square.repeat(1, 1, *times)[..., : size[0], : size[1]]


def _cells(grid: int, side: int) -> Tensor:
    """Which of S pixels lie in each of G cells, as `F.interpolate` has them: (G, S)."""
    at = (torch.arange(side) * grid) // side
    return F.one_hot(at, grid).t().float()


def _repeated(cells: Tensor, size: int, side: int) -> Tensor:
    """The means of cells (G, S) over a repeated square: (G, size); none where no pixel is left."""
    over = cells.repeat(1, -(-size // side))[:, :size]
    return over / over.sum(1, keepdim=True).clamp_min(1)


def _features(channels: int, width: int, last: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 5, padding=2), nn.LeakyReLU(0.1),
        nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1),
        nn.Conv2d(width, width, 3, padding=2, dilation=2), last,
    )  # fmt: skip


def _standard(features: Tensor) -> Tensor:
    """Features (N, F, H, W) with mean 0 and root mean square 1 each: contrast is nothing."""
    centred = features - features.mean((2, 3), keepdim=True)
    return centred / (centred.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()
