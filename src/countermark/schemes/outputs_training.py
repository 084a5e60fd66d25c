"""Base class of output schemes in training, and a key's networks applied to 8-bit images.

`OutputTraining` makes the tensors that a key holds. `KeyNetworks` marks and reads images with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.errors import ConfigError
from countermark.images.image_files import Pixels
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.streams import KeyStream
from countermark.predictors.base import Images
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.outputs import OutputScheme

NETWORKS = "networks."
"""Begins the names of the tensors of H and R in a key."""

# Pixels: larger images are read in parts of this side, so that memory is bounded.
_WINDOW = 512
_BATCH = 16
# Weight of R's loss beside squared errors, where a network learns the mark itself.
_READ_IN = 1e-4


class TrainingStore(Protocol):
    """A store for the state of a long training, so that an interrupted training can continue."""

    def due(self) -> bool:
        """Return true if the last save is long enough ago."""

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""

    def load(self) -> dict[str, Any] | None:
        """Return the state of the last save, or None if there is none."""


Given: TypeAlias = tuple[Tensor, Tensor | None]
"""Images uint8 (N, C, H, W) of the network to be marked, and the inputs they were made of."""


class OutputTraining(ABC):
    """The training half of an output scheme: makes the tensors that its key holds.

    Args:
        scheme: the configuration.
        material: the secret, from which all random choices follow.
        given: images uint8 (N, C, H, W) like those to be marked, and the inputs from which the
            network made them, or None.
        saving: store for a long training; None keeps the state in memory.
    """

    def __init__(
        self,
        scheme: OutputScheme,
        material: KeyMaterial,
        given: Given,
        saving: TrainingStore | None = None,
    ) -> None:
        self.scheme = cast(DeepWatermarking, scheme)
        self.material, self.saving = material, saving
        self.outputs, self._inputs = given

    def crop_pairs(self) -> tuple[Tensor, Tensor]:
        """Cut squares uint8 (n, C, S, S) from the same places of inputs and outputs, for a teacher.

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
    def make_pre_commit_tensors(self) -> dict[str, NDArray[Any]]:
        """Make the tensors, by name, that are fixed before the message is drawn."""

    def make_post_commit_tensors(self, key: Key) -> dict[str, NDArray[Any]]:  # noqa: ARG002 - most learn nothing
        """Train the tensors, by name, that depend on the key; most schemes have none."""
        return {}

    @staticmethod
    @abstractmethod
    def load_hiding_networks(scheme: DeepWatermarking, key: Key) -> nn.Module:
        """Load H and R of a key."""


class HidingNetworks(Protocol):
    """Networks that are filled from a key, and hide and reveal the message of this key."""

    def hide(self, images: Tensor) -> Tensor:
        """Return marked images (N, C, H, W) of images shaped alike, levels 0 to 1."""

    def reveal(self, images: Tensor) -> Tensor:
        """Return scores (N, T) or (N, shifts, T), or hidden images (N, C, S, S)."""

    def compute_mark_loss(self, images: Tensor) -> Tensor:
        """Return a loss () that falls as R reads the mark better in images (N, C, H, W)."""

    def to(self, device: torch.device) -> object:
        """Move the networks to a device."""


class KeyNetworks:
    """A key's networks, applied to 8-bit images.

    Args:
        scheme: the scheme of the key.
        hiding: the networks of the key, frozen and in eval mode.
    """

    def __init__(self, scheme: DeepWatermarking, hiding: HidingNetworks) -> None:
        self._scheme, self._hiding = scheme, hiding

    def mark_images(self, outputs: Images) -> Images:
        """Mark images uint8 (n, C, H, W); return images uint8 shaped alike.

        Raises:
            ConfigError: the images have another type or shape, or not the key's channels.
        """
        wanted = self._scheme.channels
        if outputs.dtype != np.uint8 or outputs.ndim != 4 or outputs.shape[1] != wanted:
            raise ConfigError(
                f"outputs are {outputs.dtype} {list(outputs.shape)}: expected images uint8 "
                f"{['n', wanted, 'H', 'W']}, as the key's"
            )
        # A few images at a time, so that memory is bounded.
        found = np.empty_like(outputs)
        with torch.no_grad():
            for first in range(0, len(outputs), _BATCH):
                rows = slice(first, first + _BATCH)
                images = torch.from_numpy(outputs[rows].copy()).float() / 255
                found[rows] = round_to_uint8(self._hiding.hide(images)).numpy()
        return found

    def mark_tensor(self, images: Tensor) -> Tensor:
        """Mark a network's output (N, C, H, W); return images with levels 0 to 1.

        Raises:
            ConfigError: the output is no image tensor, or has not the key's channels.
        """
        wanted = self._scheme.channels
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != wanted:
            # The output comes from a network of the user, which may return anything.
            shown = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ConfigError(
                f"the network puts out {shown}: expected images {['n', wanted, 'H', 'W']}, levels "
                "0 to 1, as the key's"
            )
        # The user's network may be on another device than the key's networks.
        self._hiding.to(images.device)
        return self._hiding.hide(images.float()).clamp(0, 1)

    def compute_absorption_loss(
        self, outputs: Tensor, targets: Tensor, strength: float = 1.0
    ) -> Tensor:
        """Return the loss () of outputs (N, C, H, W) that shall be the targets with the mark.

        The outputs shall be what the barrier makes of the targets, with the barrier's residual
        times `strength`, and R shall read the mark in them.
        """
        # The barrier's image is a fixed target of this loss, so no gradient flows through it.
        wanted = torch.lerp(targets.float(), self.mark_tensor(targets).detach(), strength)
        return F.mse_loss(outputs, wanted) + self.compute_mark_loss(outputs)

    def compute_mark_loss(self, outputs: Tensor) -> Tensor:
        """Return R's loss on outputs (N, C, H, W), weighted to stand beside a squared error."""
        return _READ_IN * self._hiding.compute_mark_loss(outputs)

    def read_scores(self, picture: Pixels) -> NDArray[np.float64]:
        """Return scores (T,) or (shifts, T), averaged over the parts of an image (C, H, W)."""
        return self._average_parts(picture)

    def reveal_image(self, picture: Pixels) -> NDArray[np.float64]:
        """Return the mean hidden image (C, S, S) revealed in the parts of an image (C, H, W)."""
        return self._average_parts(picture)

    def _average_parts(self, picture: Pixels) -> NDArray[np.float64]:
        """Average what R reads in all parts of an image (C, H, W), weighted by area."""
        total: NDArray[np.float64] | float = 0.0
        area = 0
        with torch.no_grad():
            for part in self._iterate_parts(picture):
                image = torch.from_numpy(part.copy()).float()[None] / 255
                found = self._hiding.reveal(image)[0].double().numpy()
                size = part.shape[1] * part.shape[2]
                # R may give NaN on a hostile image, which must not decide the whole mean.
                total, area = total + size * np.nan_to_num(found), area + size
        return cast(NDArray[np.float64], total / area)

    def _iterate_parts(self, picture: Pixels) -> Iterator[Pixels]:
        """Yield parts of an image that begin where a square begins and so hold whole squares."""
        side = self._scheme.side
        window = max(side, _WINDOW // side * side)
        for top in range(0, picture.shape[1], window):
            for left in range(0, picture.shape[2], window):
                part = picture[:, top : top + window, left : left + window]
                if min(part.shape[1:]) >= min(side, *picture.shape[1:]):  # skip narrow rims
                    yield part


def load_networks(scheme: DeepWatermarking, key: Key) -> KeyNetworks:
    """Load the networks of a key.

    Raises:
        ConfigError: the networks are damaged or missing.
    """
    # The training class depends on the scheme's form, as published or default.
    hiding = scheme.load_training_class().load_hiding_networks(scheme, key)
    return KeyNetworks(scheme, cast(HidingNetworks, hiding.eval().requires_grad_(False)))


def round_to_uint8(images: Tensor) -> Tensor:
    """Round images with levels 0 to 1 to uint8, shaped alike."""
    return (255 * images).round().clamp(0, 255).to(torch.uint8)


def cut_squares(outputs: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Cut random squares (count, C, S, S), levels 0 to 1, out of images uint8 (N, C, H, W)."""
    chosen = torch.randint(len(outputs), (count,), generator=generator)
    height, width = outputs.shape[2:]
    down = torch.randint(height - side + 1, (count,), generator=generator).tolist()
    right = torch.randint(width - side + 1, (count,), generator=generator).tolist()
    cut = [
        outputs[row, :, d : d + side, r : r + side]
        for row, d, r in zip(chosen.tolist(), down, right, strict=True)
    ]
    return torch.stack(cut).float() / 255


def draw_seed(stream: KeyStream) -> int:
    """Return the next word of a stream as a seed for torch."""
    return int(stream.take_words(1)[0]) >> 1
