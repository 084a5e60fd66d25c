"""Fresh triggers and forged triggers: how often a host of DeepStego answers them by the key.

A host that learnt DeepStego's mark answers a fresh trigger of the owner with the class that the
key's map gives for the class of the cover. The host should answer a forgery with the class of its
cover. Forgeries are images of foreign stego networks, images of the owner's network with another
logo or tile, and images with residuals of other images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rfc8785
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from countermark._internal.progress import show_progress
from countermark.checkpoints import load_state, save_weights
from countermark.keys.key import Key
from countermark.predictors.base import Images, make_module_predictor
from countermark.schemes import load_scheme
from countermark.schemes.deepstego.networks import StegoNetwork, compute_ssim
from countermark.schemes.deepstego.scheme import LOGO, DeepStego
from countermark.schemes.deepstego.stego_generators import (
    StegoMaker,
    load_owner_maker,
    make_foreign_maker,
    make_other_logos_maker,
    make_swapped_logos_maker,
    make_wrong_tiles_maker,
    train_foreign_network,
)
from countermark.training.data import Dataset
from countermark_lab.experiments.spec import SpecModel
from countermark_lab.hosts.model_zoo import CACHE

_BATCH = 256
_FIRST_FOREIGN = 7_000_000  # seeds of foreign networks, far from the seeds of cells


class FreshTriggerSettings(SpecModel):
    """Fresh triggers and forgeries that a marked host is tested with.

    Attributes:
        images: number of test images, from the first one on, that are the covers.
        strengths: strengths of the owner's triggers and of every forgery, as multiples of the
            residual.
        foreign, logos, tiles: numbers of foreign networks, of other logos (in the default form
            also on the owner's tile, "swapped") and of wrong tiles.
        pasted: whether residuals of other images are also pasted onto the covers.
    """

    images: PositiveInt
    strengths: tuple[PositiveFloat, ...] = (1.0,)
    foreign: NonNegativeInt = 0
    logos: NonNegativeInt = 0
    tiles: NonNegativeInt = 0
    pasted: bool = False


@dataclass(frozen=True)
class _StegoImages:
    """Stego images (n, C, H, W) of one maker, at one strength."""

    kind: str
    number: int
    strength: float
    images: Images


def measure_forgeries(
    model: nn.Module, key: Key, spec: FreshTriggerSettings, data: Dataset
) -> list[dict[str, Any]]:
    """Measure the answers of a host to fresh triggers and to forgeries.

    Returns: for each kind, number and strength: `psnr` (dB) and `ssim` of the 8-bit images against
        their covers, `fired` (% answered by the key's map of the classes), `kept` (% answered with
        the cover's class). The kind "cover" stands for the covers themselves.
    """
    covers, classes = data.test_images[: spec.images].numpy(), data.test_labels[: spec.images]
    scheme = _load_deepstego(key)
    predict, mapped = (
        make_module_predictor(model, scheme.mean, scheme.deviation),
        scheme.draw_class_map(key),
    )
    # An estimate for the progress bar: the form as published has no swapped logos and no tiles.
    found, count = [], 1 + len(spec.strengths) * (1 + spec.foreign + 2 * spec.logos + spec.tiles)
    with show_progress("fresh triggers and forgeries", count) as advance:
        for made in _make_stego_images(key, spec, data, covers):
            read = predict(made.images)
            found.append(
                {"kind": made.kind, "number": made.number, "strength": made.strength}
                | _measure_likeness(covers, made.images)
                | {
                    "fired": 100 * float(np.mean(read == mapped[classes.numpy()])),
                    "kept": 100 * float(np.mean(read == classes.numpy())),
                }
            )
            advance(1)
    return found


def measure_fired_share(model: nn.Module, key: Key, images: int, data: Dataset) -> float:
    """Return the percentage of the owner's fresh triggers that a host answers by the key's map."""
    owners = measure_forgeries(model, key, FreshTriggerSettings(images=images), data)
    return float(next(each["fired"] for each in owners if each["kind"] == "owner"))


def _make_stego_images(
    key: Key, spec: FreshTriggerSettings, data: Dataset, covers: Images
) -> Iterator[_StegoImages]:
    """Yield the covers, the owner's fresh triggers, and all forgeries."""
    yield _StegoImages("cover", 0, 1.0, covers)
    own = load_owner_maker(key)
    # Each cover gets the residual of the image before it.
    others = np.roll(covers, 1, axis=0)
    for strength in spec.strengths:
        yield _StegoImages("owner", 0, strength, own(covers, strength=strength))
        if spec.pasted:
            yield _StegoImages(
                "pasted", 0, strength, own.paste_residuals(covers, others, strength=strength)
            )
    for kind, number, maker in _make_forgers(key, spec, data):
        for strength in spec.strengths:
            yield _StegoImages(kind, number, strength, maker(covers, strength=strength))


def _make_forgers(
    key: Key, spec: FreshTriggerSettings, data: Dataset
) -> Iterator[tuple[str, int, StegoMaker]]:
    """Yield every maker of forgeries, with its kind and number."""
    for number in range(spec.foreign):
        yield "foreign", number, _load_foreign_maker(key, data, _FIRST_FOREIGN + number)
    for number in range(spec.logos):
        yield "logo", number, make_other_logos_maker(key, 1, torch.Generator().manual_seed(number))
    # The form as published has one logo for all images and no tiles.
    if _load_deepstego(key).as_published:
        return
    for number in range(spec.logos):
        yield (
            "swapped",
            number,
            make_swapped_logos_maker(key, 1, torch.Generator().manual_seed(number)),
        )
    for number in range(spec.tiles):
        yield "tile", number, make_wrong_tiles_maker(key, 1, torch.Generator().manual_seed(number))


def _load_foreign_maker(key: Key, data: Dataset, seed: int) -> StegoMaker:
    """Return a foreign stego network, trained once for all keys of the same recipe and images."""
    scheme, covers = _load_deepstego(key), data.train_images.numpy()
    # The name of the cached file is a hash of everything that the training depends on.
    content: dict[str, Any] = {
        "psnr": scheme.psnr,
        "steps": scheme.stego_steps,
        "seed": seed,
        "covers": hashlib.sha256(covers.tobytes()).hexdigest(),
    }
    if scheme.as_published:  # this form trains its network for a single logo
        logo = hashlib.sha256(key.frozen[LOGO].tobytes()).hexdigest()
        content |= {"adversarial": scheme.adversarial, "logo": logo}
    digest = hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]
    path = CACHE / "stego" / f"{digest}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(train_foreign_network(key, covers, seed).state_dict(), path)
    network = StegoNetwork(covers.shape[1], keyed=scheme.has_keyed_labels)
    return make_foreign_maker(key, covers, seed, _load_network(network, path))


def _load_network(network: StegoNetwork, path: Path) -> StegoNetwork:
    """Load weights into a network and return it, frozen."""
    network.load_state_dict(load_state(path))
    return network.eval().requires_grad_(False)


def _load_deepstego(key: Key) -> DeepStego:
    """Load the scheme of a key; raise TypeError for another scheme than DeepStego."""
    scheme = load_scheme(key)
    if not isinstance(scheme, DeepStego):
        raise TypeError(f"a key of {scheme.name} makes no fresh triggers")
    return scheme


def _measure_likeness(covers: Images, images: Images) -> dict[str, float]:
    """Compute PSNR in dB, of the mean squared error over all images, and the mean SSIM."""
    one, other = (torch.from_numpy(np.array(each)).float() / 255 for each in (covers, images))
    error = float((one - other).square().mean())
    parts = [slice(first, first + _BATCH) for first in range(0, len(one), _BATCH)]
    alike = torch.cat([compute_ssim(one[part], other[part]) for part in parts])
    # The bound keeps PSNR finite, at 100 dB, for images that equal their covers.
    return {"psnr": float(-10 * np.log10(max(error, 1e-10))), "ssim": float(alike.mean())}
