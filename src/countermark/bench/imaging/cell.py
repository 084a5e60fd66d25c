"""One cell of an experiment on images: a barrier, its copy, and what its key reads."""

from __future__ import annotations

import base64
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from countermark.bench.imaging.barriers import barrier_key, scheme_in
from countermark.bench.imaging.breaks import SPOILS, averaged_out
from countermark.bench.imaging.experiment import ImagingCell, Surrogate
from countermark.bench.imaging.photographs import DRAWN, Photographs, photographs
from countermark.bench.imaging.tasks import spoilt
from countermark.bench.imaging.thieves import absorbing, cached, features_of, removed
from countermark.bench.train import Checkpoint
from countermark.errors import DataError
from countermark.images.image_files import Pixels, encode_png
from countermark.keys.key import Key
from countermark.predictors.base import Images
from countermark.results.verdict import VerificationOptions
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.deep_watermarking.surrogates import (
    Architecture,
    CopyingOptions,
    run_network,
)
from countermark.schemes.deepstego.networks import compute_ssim
from countermark.verification.verify import examine

_PAYLOADS = 20_000
_FIRST_SIBLING = 5_000_000  # seeds that no twin has
_KINDS: tuple[Architecture, ...] = ("unet", "cnet", "res9")
_TERMS = VerificationOptions(assume_dated=True, blind_choice=True, allow_test_key=True)


def check(cell: ImagingCell) -> None:
    """Check a cell before anything is computed.

    Raises:
        CountermarkError: a wrong field of the scheme, or a missing data directory.
    """
    scheme_in(cell)
    for name in (cell.images.data, cell.copies.features_data):
        if name not in ("", DRAWN) and not Path(name).is_dir():
            raise DataError(f"no data directory {name!r} (looked for {Path(name).absolute()})")


def compute(cell: ImagingCell, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train the networks that the cell names, and measure them.

    Returns: of a barrier by itself `psnr` (dB) and `ssim` of marked images against the network's
        own, `image_ber` of single images, the reading of marked images and, as `unmarked`, of
        others, and the agreement of random `payloads` with the others. Of a copied barrier `psnr`
        of the copy against the truth, the reading of the copy's images, and the same of its
        unmarked `twin`.
    """
    data = _data(cell)
    siblings = _siblings(cell, data)
    key = barrier_key(cell, data, siblings)
    if cell.surrogate is None:
        return _by_itself(key, data)
    saving = Checkpoint(checkpoint) if checkpoint else None
    figures = _copied(cell, cell.surrogate, key, data, saving)
    if saving:
        saving.remove()
    return figures


def read_in(images: Images, key: Key) -> dict[str, Any]:
    """Read a key in images uint8 (n, C, H, W) and return the verdict as figures."""
    verdict = examine(list(images), key, _TERMS)
    likeness = verdict.likeness
    return {
        "bits": verdict.bits,
        "wrong": verdict.bits - (verdict.matched or 0),
        "log10_p": verdict.log10_p,
        "outcome": verdict.outcome,
        "nc": likeness.nc if likeness else None,
        "nc_blank": likeness.nc_blank if likeness else None,
    }


def likeness(one: Tensor, other: Tensor) -> dict[str, float]:
    """Compute PSNR and SSIM between two sets of images uint8 (n, C, H, W).

    Returns: `psnr` in dB of the mean squared error over all images, and the mean `ssim`.
    """
    a, b = (each.float() / 255 for each in (one, other))
    # Equal images would have an infinite PSNR, which JSON cannot hold; this bound gives 100 dB.
    error = max(float((a - b).square().mean()), 1e-10)
    return {"psnr": -10 * float(np.log10(error)), "ssim": float(compute_ssim(a, b).mean())}


def _by_itself(key: Key, data: Photographs) -> dict[str, Any]:
    """Measure a barrier that nobody copied."""
    scheme = DeepWatermarking.from_fields(key.fields)
    marked = scheme.mark_outputs(data.test.numpy(), key)
    figures = likeness(torch.from_numpy(marked), data.test) | read_in(marked, key)
    figures["unmarked"] = read_in(data.test.numpy(), key)
    figures["pictures"] = {
        "cover": _png(data.test[0].numpy()), "marked": _png(marked[0]),
        "revealed": _revealed(marked[0], key), "in_cover": _revealed(data.test[0].numpy(), key),
    }  # fmt: skip
    figures["moved"] = {name: read_in(made, key) for name, made in _moved(marked).items()}
    # The published form reveals a logo: it has no bits in single images.
    if scheme.as_published:
        return figures
    live = scheme.load_networks(key)
    single = np.stack([np.atleast_2d(live.read_scores(each))[0] > 0 for each in marked])  # (n, T)
    figures["image_ber"] = float(np.mean(single != key.message.astype(bool)))
    figures["payloads"] = _payloads(scheme.extract(list(data.test.numpy()), key).read)
    return figures


def _png(picture: Pixels) -> str:
    """Encode an image as PNG in base64."""
    return base64.b64encode(encode_png(picture)).decode()


def _revealed(picture: Pixels, key: Key) -> str:
    """Return the image that the network R reveals in one image, as PNG in base64.

    In the default form, grey levels show how sure R is of each bit.
    """
    scheme = DeepWatermarking.from_fields(key.fields)
    live = scheme.load_networks(key)
    if scheme.as_published:
        levels = live.reveal_image(picture)
    else:
        scores = np.atleast_2d(live.read_scores(picture))[0]
        # The logistic function of the score, written with tanh, cannot overflow.
        levels = (0.5 + 0.5 * np.tanh(scores / 2)).reshape(1, scheme.grid_size, scheme.grid_size)
    return _png(np.rint(255 * np.clip(levels, 0, 1)).astype(np.uint8))


def _moved(marked: Images) -> dict[str, Images]:
    """Return the marked images shifted, and cropped and enlarged again, by name."""
    levels = torch.from_numpy(marked).float()
    # 4 pixels on each side are the 8 pixels of the crop.
    inner = levels[..., 4:-4, 4:-4]
    large = F.interpolate(inner, levels.shape[2:], mode="bilinear", align_corners=False)
    return {
        "shifted by 1": np.roll(marked, 1, 3),
        "shifted by 5 and 11": np.roll(marked, (5, 11), (2, 3)),
        "cropped by 8 and enlarged": large.round().clamp(0, 255).to(torch.uint8).numpy(),
    }


def _payloads(read: np.ndarray[Any, Any]) -> dict[str, float]:
    """Count the bits of random payloads that agree with the bits read.

    Returns: the number of payloads, and mean and variance of the counts.
    """
    # The payloads are the same in every cell.
    drawn = np.random.default_rng(0).integers(0, 2, (_PAYLOADS, len(read)))
    agree = (drawn == read).sum(1)
    return {"draws": _PAYLOADS, "mean": float(agree.mean()), "variance": float(agree.var())}


def _copied(
    cell: ImagingCell, surrogate: Surrogate, key: Key, data: Photographs,
    saving: Checkpoint | None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a copy of the marked images, or a network that absorbed the mark, and its twin."""
    given, asked = _inputs(cell, data)
    copying = _copying(cell, surrogate)
    scheme = DeepWatermarking.from_fields(key.fields)
    if surrogate.absorbed:
        own = spoilt(data.owner, cell.images.task, 3)
        network: nn.Module = absorbing(
            (own, data.owner),
            scheme.load_networks(key),
            copying,
            saving,
            strength=surrogate.strength or 1.0,
        )
        # The twin learns the same task from the same images, but without the mark.
        twin = cached(own, data.owner, copying, _about(cell, "owner"))
    else:
        marked = torch.from_numpy(scheme.mark_outputs(data.thief.numpy(), key))
        network = cached(given, _spoilt(surrogate, marked, scheme, data), copying, None, saving)
        twin = cached(given, _spoilt(surrogate, data.thief, scheme, data), copying,
                      _about(cell, "thief", surrogate.spoil))  # fmt: skip
    made, of_twin = run_network(network, asked), run_network(twin, asked)
    return {
        **likeness(made, data.test),
        **read_in(made.numpy(), key),
        "twin": likeness(of_twin, data.test) | read_in(of_twin.numpy(), key),
        "pictures": {
            "made": _png(made[0].numpy()),
            "revealed": _revealed(made[0].numpy(), key),
            "in_twin": _revealed(of_twin[0].numpy(), key),
        },
    }


def _spoilt(
    surrogate: Surrogate, images: Tensor, scheme: DeepWatermarking, data: Photographs
) -> Tensor:
    """Apply the attack of a thief who changes the images before learning from them."""
    if surrogate.spoil == "average":
        return averaged_out(images)
    if surrogate.spoil in ("remover", "replace"):
        return removed(images, scheme, data, surrogate.spoil)
    return images


def _copying(cell: ImagingCell, surrogate: Surrogate) -> CopyingOptions:
    """Make the options of a training that copies."""
    features = None
    if surrogate.loss == "perceptual":
        features = features_of(cell.copies.features_data)
    return CopyingOptions(
        surrogate.architecture,
        surrogate.loss,
        surrogate.adversarial,
        steps=cell.copies.steps,
        batch=cell.copies.batch,
        seed=cell.seed,
        precision=cell.copies.precision,
        features=features,
        spoil=SPOILS.get(surrogate.spoil),
    )


def _inputs(cell: ImagingCell, data: Photographs) -> tuple[Tensor, Tensor]:
    """Return the inputs of the thief's queries, and those of the tests of the copies."""
    task = cell.images.task
    # Seeds 1, 2 and 3 (owner) keep rain and noise of the three parts apart.
    return spoilt(data.thief, task, 1), spoilt(data.test, task, 2)


def _about(cell: ImagingCell, who: str, spoil: str = "") -> dict[str, Any]:
    """Return everything that determines an unmarked network, apart from its training options."""
    return {
        "images": cell.images.model_dump(mode="json"), "who": who, "spoil": spoil,
        "features": cell.copies.features_data,
    }  # fmt: skip


def _siblings(cell: ImagingCell, data: Photographs) -> list[Images]:
    """Make images with unmarked networks, for the published form."""
    if not cell.form.fields.get("as_published") or not cell.siblings:
        return []
    given, _ = _inputs(cell, data)
    own = spoilt(data.owner[: cell.images.test], cell.images.task, 3)
    found = []
    for number in range(cell.siblings):
        copying = _copying(cell, Surrogate(label="", architecture=_KINDS[number % len(_KINDS)]))
        # A quarter of the steps: siblings are many, and need not be as good as the copy.
        copying = replace(copying, seed=_FIRST_SIBLING + number, steps=max(1, copying.steps // 4))
        network = cached(given, data.thief, copying, _about(cell, "thief"))
        found.append(run_network(network, own).numpy())
    return found


@lru_cache(maxsize=2)
def _loaded(name: str, counts: tuple[int, int, int], side: int, channels: int) -> Photographs:
    """Load photographs; the last two sets are cached."""
    return photographs(name, counts, side=side, channels=channels)


def _data(cell: ImagingCell) -> Photographs:
    """Load the photographs of a cell."""
    images = cell.images
    counts = (images.owner, images.thief, images.test)
    return _loaded(images.data, counts, images.side, images.channels)
