"""Networks of experiments on images: copies, unmarked twins, and networks that remove a mark."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import rfc8785
import torch
from filelock import FileLock
from torch import Tensor, nn

from countermark.checkpoints import load_state, save_weights
from countermark.errors import ConfigError
from countermark.keys.key import KeyMaterial
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.deep_watermarking.surrogates import (
    CopyingOptions,
    Features,
    make_surrogate,
    run_network,
    train_surrogate,
)
from countermark.schemes.outputs_training import KeyNetworks, load_networks
from countermark.training.image_squares import PhotographSquares
from countermark.training.loop import Checkpoint
from countermark.training.models import build
from countermark_lab.hosts.model_zoo import CACHE as HOSTS
from countermark_lab.hosts.model_zoo import HostSpec, host_path, train_hosts
from countermark_lab.image_models.barriers import CACHE, load_or_train_key

_THIEFS_SECRET = 987_654_321
_FEATURES = 13  # layers of VGG16, up to the second halving of the image


def load_or_train_surrogate(
    given: Tensor, wanted: Tensor, copying: CopyingOptions, about: Mapping[str, Any] | None,
    saving: Checkpoint | None = None,
) -> nn.Module:  # fmt: skip
    """Train a surrogate, or load it from the cache.

    Args:
        given: training inputs, uint8 (N, C, S, S).
        wanted: the outputs that it learns to produce.
        copying: training options.
        about: everything that determines the images; the cache key. None trains without the cache.
        saving: checkpoint of a training without the cache.
    """
    if about is None:
        return train_surrogate(given, wanted, copying, saving)
    # Only these options change a cached network; an attack on the images stands in `about`.
    names = ("architecture", "loss", "adversarial", "steps", "batch", "seed", "width", "precision")
    content = {**about, **{name: getattr(copying, name) for name in names}}
    digest = hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]
    path = CACHE / f"{digest}.safetensors"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Cells that run side by side wait here and then share the network.
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            checkpoint = Checkpoint(path.with_suffix(".pt"))
            save_weights(train_surrogate(given, wanted, copying, checkpoint).state_dict(), path)
            checkpoint.remove()
    network = make_surrogate(copying.architecture, wanted.shape[1], copying.width)
    network.load_state_dict(load_state(path))
    # The loaded network has no training state: it only makes images.
    return network.eval().requires_grad_(False)


def train_absorbing_network(
    pairs: tuple[Tensor, Tensor], live: KeyNetworks, copying: CopyingOptions,
    saving: Checkpoint | None = None, *, network: nn.Module | None = None, strength: float = 1.0,
) -> nn.Module:  # fmt: skip
    """Train a network on the owner's images that learns its task and the mark in one.

    Args:
        pairs: training inputs, and their outputs without the mark, both uint8 (N, C, S, S).
        live: the barrier that the network absorbs.
        copying: training options.
        saving: checkpoint of the training.
        network: a network to train further; None for a new one.
        strength: of the mark, as a multiple of the barrier's residual.
    """
    given, wanted = pairs
    loud = torch.from_numpy(live.mark_images(wanted.numpy())).float()
    # lerp scales the residual of the barrier by `strength`.
    marked = torch.lerp(wanted.float(), loud, strength).round().to(torch.uint8)
    return train_surrogate(
        given, marked, copying, saving, also=live.compute_mark_loss, network=network
    )


def remove_mark(
    images: Tensor, scheme: DeepWatermarking, data: PhotographSquares, how: str
) -> Tensor:
    """Return images uint8 (N, C, S, S) after an attack with the thief's own barrier.

    Args:
        images: the owner's marked images.
        scheme: the scheme that the thief uses too.
        data: the thief trains the barrier on the thief's part.
        how: "replace" puts the thief's mark over the owner's; "remover" applies a network that
            learnt to remove the thief's mark, from pairs with and without it.
    """
    own = _load_thiefs_barrier(scheme, data)
    if how == "replace":
        return torch.from_numpy(own.mark_images(images.numpy()))
    pairs = torch.from_numpy(own.mark_images(data.test.numpy())), data.test
    remover = train_surrogate(
        *pairs, CopyingOptions("unet", steps=max(1, scheme.steps // 4), seed=_THIEFS_SECRET)
    )
    return run_network(remover, images)


def _load_thiefs_barrier(scheme: DeepWatermarking, data: PhotographSquares) -> KeyNetworks:
    """Load the thief's barrier from the cache; train it on the thief's images first."""
    digest = hashlib.sha256(rfc8785.dumps(scheme.to_fields()))
    # Other images give another barrier, even with the same scheme.
    digest.update(data.thief.numpy().tobytes())
    folder = CACHE / f"thief-{digest.hexdigest()[:16]}.key"
    material, given = KeyMaterial.from_test_seed(_THIEFS_SECRET), (data.thief, data.thief)
    return load_networks(scheme, load_or_train_key(folder, scheme, material, given, "a thief"))


@lru_cache(maxsize=1)
def load_features(data: str) -> Features:
    """Return the features of an unmarked VGG16 of width .25, as a function of images (N, C, H, W).

    The network is trained on CIFAR-10 here. The VGG19 of the paper, trained on ImageNet, is not
    available.

    Args:
        data: the folder of CIFAR-10.

    Raises:
        ConfigError: the experiment names no data for the features.
    """
    if not data:
        raise ConfigError("a perceptual loss needs copies.features_data: a folder of CIFAR-10")
    spec = HostSpec(
        data, 1, epochs=3, model="vgg16", arguments=(("width", 0.25),), rows=(0, 10_000),
        unit_pixels=True,
    )  # fmt: skip
    train_hosts([spec], HOSTS)
    model = build("vgg16", {"width": 0.25})
    model.load_state_dict(load_state(Path(host_path(spec, HOSTS))))
    layers = nn.Sequential(*list(model.eval().requires_grad_(False).features)[:_FEATURES])  # type: ignore[arg-type]

    def compute_features(images: Tensor) -> Tensor:
        """Compute the features of images (N, C, H, W); grey becomes three equal channels."""
        found: Tensor = layers(images.expand(-1, 3, -1, -1))
        return found

    return compute_features
