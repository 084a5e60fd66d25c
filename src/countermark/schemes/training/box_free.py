"""What the training half of an output scheme is, and its networks at work.

`OutputTraining` makes what a key holds; `Live` marks images and reads them with what a key holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from countermark.answers import Images
from countermark.errors import ConfigError
from countermark.key import Key, KeyMaterial
from countermark.pictures import Pixels
from countermark.schemes.box_free import OutputScheme
from countermark.schemes.deep_watermarking import DeepWatermarking
from countermark.xof import Stream

NETWORKS = "networks."
"""Begins the names of the tensors of H and R in a key."""

_WINDOW = 512  # pixels: of a larger picture parts are read one by one, so that memory is bounded
_BATCH = 16
_READ_IN = 1e-4  # weight of what R misses in the loss of an absorbed barrier, beside squared errors


class Saving(Protocol):
    """Where a training is saved now and then, so that it can be interrupted."""

    def due(self) -> bool:
        """Whether the last save is long enough ago."""

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""

    def load(self) -> dict[str, Any] | None:
        """The state of the last save; None when there is none."""


Given: TypeAlias = tuple[Tensor, Tensor | None]
"""Images uint8 (N, C, H, W) like those that will be marked, and what they were made of."""


class OutputTraining(ABC):
    """The training half of an output scheme: what is frozen before the message, and learnt after.

    Args:
        scheme: the configuration.
        material: the secret, by which everything random is drawn.
        given: images uint8 (N, C, H, W) like those that will be marked, and what the network was
            given to make them, or None.
        saving: where a long training is saved; None keeps it in memory.
    """

    def __init__(
        self,
        scheme: OutputScheme,
        material: KeyMaterial,
        given: Given,
        saving: Saving | None = None,
    ) -> None:
        self.scheme = cast(DeepWatermarking, scheme)
        self.material, self.saving = material, saving
        self.outputs, self._inputs = given

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Squares uint8 (n, C, S, S) of inputs and outputs, from the same places, for a teacher.

        Raises:
            ConfigError: the inputs are not known.
        """
        if self._inputs is None:
            raise ConfigError(
                "teachers copy the network, for which its inputs are needed beside its outputs: "
                "give inputs, or leave teachers out"
            )
        side = self.scheme.side
        return self._inputs[..., :side, :side], self.outputs[..., :side, :side]

    @abstractmethod
    def frozen(self) -> dict[str, NDArray[Any]]:
        """What is fixed before the message is drawn, by name."""

    def learnt(self, key: Key) -> dict[str, NDArray[Any]]:  # noqa: ARG002 - most learn nothing
        """What is trained on what the key says, by name."""
        return {}


class Hiding(Protocol):
    """Networks that are filled from a key, and do what it says."""

    def hide(self, images: Tensor) -> Tensor:
        """Marked images of images (N, C, H, W), levels 0 to 1."""

    def reveal(self, images: Tensor) -> Tensor:
        """What is read in each image: scores (N, T) or (N, shifts, T), or pictures (N, C, S, S)."""

    def missed(self, images: Tensor) -> Tensor:
        """How far images (N, C, H, W) are from bearing the mark: a loss ()."""

    def to(self, device: torch.device) -> object:
        """Move the networks."""


class Live:
    """A key's networks at work on 8-bit images.

    Args:
        scheme: of the key.
        hiding: its networks, frozen and in eval mode.
    """

    def __init__(self, scheme: DeepWatermarking, hiding: Hiding) -> None:
        self._scheme, self._hiding = scheme, hiding

    def marked(self, outputs: Images) -> Images:
        """Marked images (n, C, H, W) of images uint8 (n, C, H, W).

        Raises:
            ConfigError: they are no such images, or of other channels than the key's.
        """
        wanted = self._scheme.channels
        if outputs.dtype != np.uint8 or outputs.ndim != 4 or outputs.shape[1] != wanted:
            raise ConfigError(
                f"outputs are {outputs.dtype} {list(outputs.shape)}: expected images uint8 "
                f"{['n', wanted, 'H', 'W']}, as the key's"
            )
        found = np.empty_like(outputs)
        with torch.no_grad():
            for first in range(0, len(outputs), _BATCH):
                rows = slice(first, first + _BATCH)
                images = torch.from_numpy(outputs[rows].copy()).float() / 255
                found[rows] = eight_bit(self._hiding.hide(images)).numpy()
        return found

    def hidden(self, images: Tensor) -> Tensor:
        """Marked images, levels 0 to 1, of a network's own (N, C, H, W).

        Raises:
            ConfigError: they have other channels than the key's.
        """
        wanted = self._scheme.channels
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != wanted:
            shown = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ConfigError(
                f"the network puts out {shown}: expected images {['n', wanted, 'H', 'W']}, levels "
                "0 to 1, as the key's"
            )
        self._hiding.to(images.device)
        return self._hiding.hide(images.float()).clamp(0, 1)

    def absorbed(self, outputs: Tensor, targets: Tensor, strength: float = 1.0) -> Tensor:
        """The loss () of outputs (N, C, H, W) that shall be the targets, and bear the mark.

        They shall be what the barrier would make of the targets, with its residual times
        `strength`, and R shall read the mark in them.
        """
        wanted = torch.lerp(targets.float(), self.hidden(targets).detach(), strength)
        return F.mse_loss(outputs, wanted) + self.missed(outputs)

    def missed(self, outputs: Tensor) -> Tensor:
        """What R misses of the mark in outputs (N, C, H, W), weighed to stand beside an error."""
        return _READ_IN * self._hiding.missed(outputs)

    def scores(self, picture: Pixels) -> NDArray[np.float64]:
        """The mean scores (T,), or (shifts, T), of all parts of a picture (C, H, W), by area."""
        return self._mean(picture)

    def revealed(self, picture: Pixels) -> NDArray[np.float64]:
        """The mean picture (C, S, S) that is revealed in the parts of a picture (C, H, W)."""
        return self._mean(picture)

    def _mean(self, picture: Pixels) -> NDArray[np.float64]:
        total: NDArray[np.float64] | float = 0.0
        area = 0
        with torch.no_grad():
            for part in self._parts(picture):
                image = torch.from_numpy(part.copy()).float()[None] / 255
                found = self._hiding.reveal(image)[0].double().numpy()
                size = part.shape[1] * part.shape[2]
                total, area = total + size * np.nan_to_num(found), area + size
        return cast(NDArray[np.float64], total / area)

    def _parts(self, picture: Pixels) -> Iterator[Pixels]:
        """Parts that begin where a square does, so that each of them holds whole ones."""
        side = self._scheme.side
        window = max(side, _WINDOW // side * side)
        for top in range(0, picture.shape[1], window):
            for left in range(0, picture.shape[2], window):
                part = picture[:, top : top + window, left : left + window]
                if min(part.shape[1:]) >= min(side, *picture.shape[1:]):  # no rims
                    yield part


def live(scheme: DeepWatermarking, key: Key) -> Live:
    """The networks of a key.

    Raises:
        ConfigError: they are damaged, or not there.
    """
    hiding = scheme.half().hiding(scheme, key)
    return Live(scheme, hiding.eval().requires_grad_(False))


def eight_bit(images: Tensor) -> Tensor:
    """Images with levels 0 to 1 as uint8, shaped alike."""
    return (255 * images).round().clamp(0, 255).to(torch.uint8)


def squares(outputs: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Random squares (count, C, S, S), levels 0 to 1, of images uint8 (N, C, H, W)."""
    chosen = torch.randint(len(outputs), (count,), generator=generator)
    height, width = outputs.shape[2:]
    down = torch.randint(height - side + 1, (count,), generator=generator).tolist()
    right = torch.randint(width - side + 1, (count,), generator=generator).tolist()
    cut = [
        outputs[row, :, d : d + side, r : r + side]
        for row, d, r in zip(chosen.tolist(), down, right, strict=True)
    ]
    return torch.stack(cut).float() / 255


def seed_of(stream: Stream) -> int:
    """The next word of a stream as a seed for torch."""
    return int(stream.words(1)[0]) >> 1
