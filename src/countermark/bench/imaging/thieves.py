"""Networks of experiments on images: copies, unmarked twins, and what takes a mark away."""

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

from countermark.bench.imaging.barriers import CACHE, kept_key
from countermark.bench.imaging.photographs import Photographs
from countermark.bench.models import build
from countermark.bench.train import Checkpoint
from countermark.bench.zoo import CACHE as HOSTS
from countermark.bench.zoo import HostSpec, host_path, train_hosts
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
from countermark.schemes.outputs_training import KeyNetworks

_THIEFS_SECRET = 987_654_321
_FEATURES = 13  # layers of VGG16: to the second halving


def cached(
    given: Tensor, wanted: Tensor, copying: CopyingOptions, about: Mapping[str, Any] | None,
    saving: Checkpoint | None = None,
) -> nn.Module:  # fmt: skip
    """A surrogate; of what `about` says it follows from there is only one, kept in the cache.

    Args:
        given: what it is given in training, uint8 (N, C, S, S).
        wanted: what it is to make of it.
        copying: how it is trained.
        about: what the images are; None trains it anew.
        saving: for one that is trained anew.
    """
    if about is None:
        return train_surrogate(given, wanted, copying, saving)
    names = ("architecture", "loss", "adversarial", "steps", "batch", "seed", "width", "precision")
    content = {**about, **{name: getattr(copying, name) for name in names}}
    digest = hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]
    path = CACHE / f"{digest}.safetensors"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            checkpoint = Checkpoint(path.with_suffix(".pt"))
            save_weights(train_surrogate(given, wanted, copying, checkpoint).state_dict(), path)
            checkpoint.remove()
    network = make_surrogate(copying.architecture, wanted.shape[1], copying.width)
    network.load_state_dict(load_state(path))
    return network.eval().requires_grad_(False)


def absorbing(
    pairs: tuple[Tensor, Tensor], live: KeyNetworks, copying: CopyingOptions,
    saving: Checkpoint | None = None, *, network: nn.Module | None = None, strength: float = 1.0,
) -> nn.Module:  # fmt: skip
    """A network that learns from the owner's images its task and the mark in one.

    Args:
        pairs: what it is given in training, and what it is to make of it without the mark, both
            uint8 (N, C, S, S).
        live: the barrier that it absorbs.
        copying: how it is trained.
        saving: where the training is saved.
        network: what goes on learning; None for a fresh one.
        strength: of the mark, as a multiple of the barrier's residual.
    """
    given, wanted = pairs
    loud = torch.from_numpy(live.mark_images(wanted.numpy())).float()
    marked = torch.lerp(wanted.float(), loud, strength).round().to(torch.uint8)
    return train_surrogate(
        given, marked, copying, saving, also=live.compute_mark_loss, network=network
    )


def removed(images: Tensor, scheme: DeepWatermarking, data: Photographs, how: str) -> Tensor:
    """Images uint8 (N, C, S, S) after a thief who has the recipe used a barrier of his own.

    "replace" puts his mark over the owner's; "remover" is a network that learnt, from pairs with
    and without his mark, to take it away.
    """
    own = _thiefs_barrier(scheme, data)
    if how == "replace":
        return torch.from_numpy(own.mark_images(images.numpy()))
    pairs = torch.from_numpy(own.mark_images(data.test.numpy())), data.test
    remover = train_surrogate(
        *pairs, CopyingOptions("unet", steps=max(1, scheme.steps // 4), seed=_THIEFS_SECRET)
    )
    return run_network(remover, images)


def _thiefs_barrier(scheme: DeepWatermarking, data: Photographs) -> KeyNetworks:
    """His barrier, trained on his images if nobody did before, and kept in the cache."""
    digest = hashlib.sha256(rfc8785.dumps(scheme.to_fields()))
    digest.update(data.thief.numpy().tobytes())
    folder = CACHE / f"thief-{digest.hexdigest()[:16]}.key"
    material, given = KeyMaterial.from_test_seed(_THIEFS_SECRET), (data.thief, data.thief)
    return scheme.load_networks(kept_key(folder, scheme, material, given, "a thief"))


@lru_cache(maxsize=1)
def features_of(data: str) -> Features:
    """What an unmarked VGG16 of width .25, trained on CIFAR-10 here, sees in images (N, C, H, W).

    Not the VGG19 on ImageNet of the paper, which cannot be had here.

    Raises:
        ConfigError: the experiment names no data for it.
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

    def seen(images: Tensor) -> Tensor:
        found: Tensor = layers(images.expand(-1, 3, -1, -1))
        return found

    return seen
