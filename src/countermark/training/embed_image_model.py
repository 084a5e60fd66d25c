"""`countermark embed` for networks from images to images: train a network and its barrier.

As in `embed_classifier`, `OUT.resume/` holds order, secret and checkpoints until both files are written.
The network's own weights bear no mark: the mark is in the barrier, which is made from the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from countermark._internal.files import write_bytes
from countermark.checkpoints import save_weights
from countermark.embedding import OutputEmbedding
from countermark.errors import ConfigError, CountermarkError
from countermark.images.image_files import encode_png
from countermark.keys.key import Key
from countermark.predictors.base import Images
from countermark.schemes import find_scheme_class
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.deep_watermarking.surrogates import (
    CopyingOptions,
    run_network,
    train_surrogate,
)
from countermark.training.embed_classifier import (
    UNMARKED,
    Order,
    check_output_places,
    embed,
    is_key_saved,
    load_or_make_material,
    record_writing,
    remove_resume_folder,
    save_resume_state,
)
from countermark.training.image_squares import DRAWN, PhotographSquares, photographs
from countermark.training.image_tasks import Task, compare_images, spoil_images
from countermark.training.loop import Checkpoint, seed_torch
from countermark.training.models import build

_SQUARES = {DRAWN: (256, 1, 64)}  # of owner, thief and test: enough for a demonstration
_OF_PHOTOGRAPHS = 3000, 1, 200  # the same numbers for photographs
_BATCH = 16


def find_embed_function(name: str) -> tuple[Callable[[Order, str | None], dict[str, Any]], str]:
    """Return the function that carries out an order with a scheme, and the default model.

    The default model is "" where the user has to name one.

    Raises:
        ConfigError: there is no such scheme.
    """
    if name != UNMARKED and find_scheme_class(name).family == "outputs":
        return embed_outputs, "unet"
    return embed, ""


def embed_outputs(order: Order, passphrase: str | None = None) -> dict[str, Any]:
    """Train the network of an order for the scheme's task, and make a key to its outputs' mark.

    Args:
        order: the whole order; `epochs` are the network's passes over the owner's squares.
        passphrase: encrypts the key.

    Returns: files of model and key, the network's PSNR on test squares, that of marked outputs
        against its own, and the reading of the marked outputs.

    Raises:
        CountermarkError: a wrong name or field, an existing key or model, a mark that failed;
            nothing is written then.
    """
    scheme = _make_order_scheme(order)
    resume = Path(order.out + ".resume")
    check_output_places(order, resume)
    counts = _SQUARES.get(order.data, _OF_PHOTOGRAPHS)
    data = photographs(order.data, counts, side=scheme.side, channels=scheme.channels)
    seed_torch(order.seed, "init")
    network = _build_network(order, data)
    material = load_or_make_material(order, resume)
    save_resume_state(order, resume, material)
    try:
        given = spoil_images(data.owner, get_task(scheme), order.seed)
        trained = _train_network(network, given, data.owner, order, resume)
        mark = OutputEmbedding(
            scheme, trained, owner=order.owner, outputs=run_network(trained, given), inputs=given,
            material=material, siblings=_make_sibling_images(order, scheme, data, resume),
        )  # fmt: skip
        mark.saving = Checkpoint(resume / "barrier.pt")
        with mark:
            barrier = mark.wrap()
        key = mark.key
    except CountermarkError:  # a repeated command would fail here again
        remove_resume_folder(resume)
        raise
    # Another seed than for training: the test noise is new to the network.
    asked = spoil_images(data.test, get_task(scheme), order.seed + 1)
    plain = run_network(trained, asked)
    figures = _measure_marked_outputs(plain, barrier, asked, data, key)
    for number, each in enumerate(plain.numpy() if order.outputs else ()):
        write_bytes(Path(str(order.outputs)) / f"{number:05}.png", encode_png(each))
    # From here on only files are written: a repeated command finishes them.
    record_writing(resume)
    save_weights(trained.state_dict(), Path(order.out))
    # An interrupted command may have written the key already.
    if order.key and not is_key_saved(Path(order.key), key):
        key.with_model(order.model, order.model_arguments).save(order.key, passphrase)
    remove_resume_folder(resume)
    return {"model": order.out, "key": order.key, "scheme": order.scheme} | figures | {
        "epochs": order.epochs, "seed": order.seed, "torch": torch.__version__
    }  # fmt: skip


def make_output_scheme(name: str, fields: Mapping[str, Any]) -> DeepWatermarking:
    """Make the scheme of that name; its fields must name the task of the network.

    Raises:
        ConfigError: the scheme marks no outputs, a field is wrong, or the task is missing.
    """
    scheme = find_scheme_class(name).from_fields(fields)
    if not isinstance(scheme, DeepWatermarking):
        raise ConfigError(f"{scheme.name} has no barrier: expected deep_watermarking")
    get_task(scheme)
    return scheme


def _make_order_scheme(order: Order) -> DeepWatermarking:
    """Make the scheme of an order; refuse options that only classifiers have."""
    scheme = make_output_scheme(order.scheme, order.fields)
    for name in ("start", "teacher"):
        if getattr(order, name):
            raise ConfigError(f"--{name} is for classifiers: leave it out")
    return scheme


def get_task(scheme: DeepWatermarking) -> Task:
    """Return the task of the network.

    Raises:
        ConfigError: the scheme's fields do not name a task.
    """
    if not scheme.task:
        raise ConfigError(
            "what shall the network do? Give --set task=derain, denoise or super_resolution"
        )
    return scheme.task


def _build_network(order: Order, data: PhotographSquares) -> nn.Module:
    """Build the network, and check that it turns an image into an image of the same shape."""
    channels = data.owner.shape[1]
    arguments = dict(order.model_arguments)
    if order.model == "unet":
        # A U-Net must have the channels of the data, unless the order sets them.
        arguments.setdefault("channels", channels)
    model = build(order.model, arguments)
    image = data.owner[:1].float() / 255
    try:
        with torch.no_grad():
            made = model.eval()(image)
    except Exception as error:  # a module:factory is foreign code and may raise anything
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"model {order.model} does not take images {list(image.shape)} ({said}): choose "
            "another model, or set --model-arg"
        ) from None
    if not isinstance(made, Tensor) or made.shape != image.shape:
        shown = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ConfigError(
            f"model {order.model} makes {shown} of images {list(image.shape)}: expected images of "
            "the same shape, as unet makes them"
        )
    return model


def _train_network(
    network: nn.Module, given: Tensor, wanted: Tensor, order: Order, resume: Path
) -> nn.Module:
    """Train the network itself, by the squared error."""
    # Epochs become steps, because surrogates count steps.
    steps = max(1, order.epochs * len(wanted) // _BATCH)
    precision: Literal["fp32", "bf16"] = "bf16" if order.precision == "bf16" else "fp32"
    copying = CopyingOptions(steps=steps, batch=_BATCH, seed=order.seed, precision=precision)
    return train_surrogate(
        given, wanted, copying, Checkpoint(resume / "network.pt"), network=network
    )


def _make_sibling_images(
    order: Order, scheme: DeepWatermarking, data: PhotographSquares, resume: Path
) -> list[Images]:
    """Make images with unmarked networks from inputs of their own, if the form needs them."""
    if not scheme.needs_siblings:
        return []
    found = []
    for number in range(order.siblings):
        given = spoil_images(data.owner, get_task(scheme), order.seed + 2 + number)
        copying = CopyingOptions(
            ("unet", "cnet", "res9")[number % 3],
            # A quarter of the network's own training.
            steps=max(1, order.epochs * len(given) // (4 * _BATCH)), seed=order.seed + 2 + number,
        )  # fmt: skip
        network = train_surrogate(
            given, data.owner, copying, Checkpoint(resume / f"sibling-{number}.pt")
        )
        found.append(run_network(network, given[:100]).numpy())
    return found


def _measure_marked_outputs(
    plain: Tensor, barrier: Callable[[Tensor], Tensor], asked: Tensor, data: PhotographSquares,
    key: Key,
) -> dict[str, Any]:  # fmt: skip
    """Measure the network, the barrier and the reading of marked test images."""
    scheme = DeepWatermarking.from_fields(key.fields)
    with torch.no_grad():
        # Rounded to bytes, as published images are.
        marked = (255 * barrier(asked.float() / 255)).round().to(torch.uint8)
    evidence = scheme.extract([np.asarray(each) for each in marked.numpy()], key)
    return {
        "task_psnr": compare_images(plain, data.test)["psnr"],
        **compare_images(marked, plain),
        "bits": evidence.bits,
        "unit": evidence.unit,
        "matched": evidence.match_count,
        "commitment": key.commitment,
        "test_key": key.test_key,
    }
