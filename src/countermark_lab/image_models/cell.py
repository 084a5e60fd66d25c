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
from countermark.schemes.outputs_training import load_networks
from countermark.training.image_squares import DRAWN, PhotographSquares, photographs
from countermark.training.image_tasks import compare_images, spoil_images
from countermark.training.loop import Checkpoint
from countermark.verification.verify import examine
from countermark_lab.image_models.barriers import load_barrier_key, make_cell_scheme
from countermark_lab.image_models.breaks import SPOILS, subtract_shared_pattern
from countermark_lab.image_models.experiment import ImagingCell, SurrogateSpec
from countermark_lab.image_models.surrogates import (
    load_features,
    load_or_train_surrogate,
    remove_mark,
    train_absorbing_network,
)

_PAYLOADS = 20_000
_FIRST_SIBLING = 5_000_000  # seeds that no twin has
_KINDS: tuple[Architecture, ...] = ("unet", "cnet", "res9")
_TERMS = VerificationOptions(assume_dated=True, blind_choice=True, allow_test_key=True)


def check_cell(cell: ImagingCell) -> None:
    """Check a cell before anything is computed.

    Raises:
        CountermarkError: a wrong field of the scheme, or a missing data directory.
    """
    make_cell_scheme(cell)
    for name in (cell.images.data, cell.copies.features_data):
        if name not in ("", DRAWN) and not Path(name).is_dir():
            raise DataError(f"no data directory {name!r} (looked for {Path(name).absolute()})")


def compute_cell(cell: ImagingCell, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train the networks that the cell names, and measure them.

    Returns: of a barrier by itself `psnr` (dB) and `ssim` of marked images against the network's
        own, `image_ber` of single images, the reading of marked images and, as `unmarked`, of
        others, and the agreement of random `payloads` with the others. Of a copied barrier `psnr`
        of the copy against the truth, the reading of the copy's images, and the same of its
        unmarked `twin`.
    """
    data = _load_cell_data(cell)
    siblings = _make_sibling_images(cell, data)
    key = load_barrier_key(cell, data, siblings)
    if cell.surrogate is None:
        return _measure_barrier(key, data)
    saving = Checkpoint(checkpoint) if checkpoint else None
    figures = _measure_copy(cell, cell.surrogate, key, data, saving)
    if saving:
        saving.remove()
    return figures


def read_images(images: Images, key: Key) -> dict[str, Any]:
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


def _measure_barrier(key: Key, data: PhotographSquares) -> dict[str, Any]:
    """Measure a barrier that nobody copied."""
    scheme = DeepWatermarking.from_fields(key.fields)
    marked = scheme.mark_outputs(data.test.numpy(), key)
    figures = compare_images(torch.from_numpy(marked), data.test) | read_images(marked, key)
    figures["unmarked"] = read_images(data.test.numpy(), key)
    figures["pictures"] = {
        "cover": _encode_base64_png(data.test[0].numpy()), "marked": _encode_base64_png(marked[0]),
        "revealed": _reveal_image(marked[0], key), "in_cover": _reveal_image(data.test[0].numpy(), key),
    }  # fmt: skip
    figures["moved"] = {name: read_images(made, key) for name, made in _move_images(marked).items()}
    # The published form reveals a logo: it has no bits in single images.
    if scheme.as_published:
        return figures
    live = scheme.load_networks(key)
    single = np.stack([np.atleast_2d(live.read_scores(each))[0] > 0 for each in marked])  # (n, T)
    figures["image_ber"] = float(np.mean(single != key.message.astype(bool)))
    figures["payloads"] = _count_payload_matches(scheme.extract(list(data.test.numpy()), key).read)
    return figures


def _encode_base64_png(picture: Pixels) -> str:
    """Encode an image as PNG in base64."""
    return base64.b64encode(encode_png(picture)).decode()


def _reveal_image(picture: Pixels, key: Key) -> str:
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
    return _encode_base64_png(np.rint(255 * np.clip(levels, 0, 1)).astype(np.uint8))


def _move_images(marked: Images) -> dict[str, Images]:
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


def _count_payload_matches(read: np.ndarray[Any, Any]) -> dict[str, float]:
    """Count the bits of random payloads that agree with the bits read.

    Returns: the number of payloads, and mean and variance of the counts.
    """
    # The payloads are the same in every cell.
    drawn = np.random.default_rng(0).integers(0, 2, (_PAYLOADS, len(read)))
    agree = (drawn == read).sum(1)
    return {"draws": _PAYLOADS, "mean": float(agree.mean()), "variance": float(agree.var())}


def _measure_copy(
    cell: ImagingCell, surrogate: SurrogateSpec, key: Key, data: PhotographSquares,
    saving: Checkpoint | None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a copy of the marked images, or a network that absorbed the mark, and its twin."""
    given, asked = _make_inputs(cell, data)
    copying = _make_copying_options(cell, surrogate)
    scheme = DeepWatermarking.from_fields(key.fields)
    if surrogate.absorbed:
        own = spoil_images(data.owner, cell.images.task, 3)
        network: nn.Module = train_absorbing_network(
            (own, data.owner),
            load_networks(scheme, key),
            copying,
            saving,
            strength=surrogate.strength or 1.0,
        )
        # The twin learns the same task from the same images, but without the mark.
        twin = load_or_train_surrogate(
            own, data.owner, copying, _describe_training_images(cell, "owner")
        )
    else:
        marked = torch.from_numpy(scheme.mark_outputs(data.thief.numpy(), key))
        network = load_or_train_surrogate(
            given, _spoil_images(surrogate, marked, scheme, data), copying, None, saving
        )
        twin = load_or_train_surrogate(given, _spoil_images(surrogate, data.thief, scheme, data), copying,
                      _describe_training_images(cell, "thief", surrogate.spoil))  # fmt: skip
    made, of_twin = run_network(network, asked), run_network(twin, asked)
    return {
        **compare_images(made, data.test),
        **read_images(made.numpy(), key),
        "twin": compare_images(of_twin, data.test) | read_images(of_twin.numpy(), key),
        "pictures": {
            "made": _encode_base64_png(made[0].numpy()),
            "revealed": _reveal_image(made[0].numpy(), key),
            "in_twin": _reveal_image(of_twin[0].numpy(), key),
        },
    }


def _spoil_images(
    surrogate: SurrogateSpec, images: Tensor, scheme: DeepWatermarking, data: PhotographSquares
) -> Tensor:
    """Apply the attack of a thief who changes the images before learning from them."""
    if surrogate.spoil == "average":
        return subtract_shared_pattern(images)
    if surrogate.spoil in ("remover", "replace"):
        return remove_mark(images, scheme, data, surrogate.spoil)
    return images


def _make_copying_options(cell: ImagingCell, surrogate: SurrogateSpec) -> CopyingOptions:
    """Make the options of a training that copies."""
    features = None
    if surrogate.loss == "perceptual":
        features = load_features(cell.copies.features_data)
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


def _make_inputs(cell: ImagingCell, data: PhotographSquares) -> tuple[Tensor, Tensor]:
    """Return the inputs of the thief's queries, and those of the tests of the copies."""
    task = cell.images.task
    # Seeds 1, 2 and 3 (owner) keep rain and noise of the three parts apart.
    return spoil_images(data.thief, task, 1), spoil_images(data.test, task, 2)


def _describe_training_images(cell: ImagingCell, who: str, spoil: str = "") -> dict[str, Any]:
    """Return everything that determines an unmarked network, apart from its training options."""
    return {
        "images": cell.images.model_dump(mode="json"), "who": who, "spoil": spoil,
        "features": cell.copies.features_data,
    }  # fmt: skip


def _make_sibling_images(cell: ImagingCell, data: PhotographSquares) -> list[Images]:
    """Make images with unmarked networks, for the published form."""
    if not cell.form.fields.get("as_published") or not cell.siblings:
        return []
    given, _ = _make_inputs(cell, data)
    own = spoil_images(data.owner[: cell.images.test], cell.images.task, 3)
    found = []
    for number in range(cell.siblings):
        copying = _make_copying_options(
            cell, SurrogateSpec(label="", architecture=_KINDS[number % len(_KINDS)])
        )
        # A quarter of the steps: siblings are many, and need not be as good as the copy.
        copying = replace(copying, seed=_FIRST_SIBLING + number, steps=max(1, copying.steps // 4))
        network = load_or_train_surrogate(
            given, data.thief, copying, _describe_training_images(cell, "thief")
        )
        found.append(run_network(network, own).numpy())
    return found


@lru_cache(maxsize=2)
def _load_cached_photographs(
    name: str, counts: tuple[int, int, int], side: int, channels: int
) -> PhotographSquares:
    """Load photographs; the last two sets are cached."""
    return photographs(name, counts, side=side, channels=channels)


def _load_cell_data(cell: ImagingCell) -> PhotographSquares:
    """Load the photographs of a cell."""
    images = cell.images
    counts = (images.owner, images.thief, images.test)
    return _load_cached_photographs(images.data, counts, images.side, images.channels)
