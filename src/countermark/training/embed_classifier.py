"""`countermark embed`: train a host with a mark from start to end, through any interruption.

During training, `OUT.resume/` (0700) holds the order, the secret and the last checkpoint. After an
interruption the same command continues from there. On the CPU its result equals that of an
uninterrupted run, because the secret is drawn once. The folder is removed when model and key are
both written, or when the order fails in a way that every repetition would fail.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark._internal import files
from countermark._internal.output_paths import require_free_path, require_writable_place
from countermark.checkpoints import load_state, save_weights
from countermark.embedding import Embedding
from countermark.errors import ConfigError, CountermarkError
from countermark.keys.key import SECRET_BYTES, Key, KeyMaterial
from countermark.keys.storage import load_header, refuse_existing, refuse_nested
from countermark.schemes.base import Scheme
from countermark.training.build_embedding import make_embedding, make_scheme
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Checkpoint, Course, accuracy, count_batches, fit, seed_torch
from countermark.training.models import Value, build, recipe
from countermark.training.siblings import TrainedSiblings, train_siblings

UNMARKED = "none"
# Files of the resume folder. `_WRITING` is empty: it exists once model and key may be half written.
_ORDER, _MATERIAL, _WRITING = "order.json", "material", "writing"


@dataclass(frozen=True)
class Order:
    """An order to train one host; an equal order continues an interrupted run.

    Attributes:
        scheme, fields: the mark, or "none" for an unmarked host.
        model, model_arguments, data: the host, and the data set that it learns.
        owner: name of the owner of the mark.
        epochs, seed, precision, device: settings of the training.
        out, key: the weight file and the key folder to write; no key without a mark.
        start: file of weights to begin with (fine-tune to embed).
        teacher: file of weights of the same model, whose answers replace the labels (distil).
        siblings: number of unmarked relatives of the host that are trained first, if the scheme
            compares with siblings.
        outputs: folder for the unmarked test images that a network of images makes.
        encrypted: whether the key is encrypted with a passphrase, which is not part of the order.
        test_key: number that the secret is derived from, for tests; such a key proves nothing.
    """

    model: str
    data: str
    out: str
    scheme: str = UNMARKED
    fields: Mapping[str, Any] = field(default_factory=dict)
    model_arguments: Mapping[str, Value] = field(default_factory=dict)
    owner: str = ""
    epochs: int = 10
    seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    key: str | None = None
    start: str | None = None
    teacher: str | None = None
    siblings: int = 8
    outputs: str | None = None
    encrypted: bool = False
    test_key: int | None = None


def embed(order: Order, passphrase: str | None = None) -> dict[str, Any]:
    """Train a host as ordered, and write the model and its key.

    Args:
        order: the whole order.
        passphrase: encrypts the key.

    Returns: the paths of model and key, and the figures: test accuracy (0 to 1), bits, matched.

    Raises:
        CountermarkError: a name or field is wrong, the key or model exists, or the mark is not in
            the model after training; neither model nor key is written then.
    """
    resume = Path(order.out + ".resume")
    check_output_places(order, resume)
    if order.outputs:
        raise ConfigError("--outputs is for networks that make images: leave it out")
    data = load_data(order.data)
    model, course = _build_host(order, data)
    material = load_or_make_material(order, resume)
    # Made once without siblings, so that a scheme that does not fit is refused before anything
    # is written and before siblings are trained.
    mark = _make_order_embedding(order, model, data, material, TrainedSiblings())
    save_resume_state(order, resume, material)
    checkpoint = Checkpoint(resume / "checkpoint.pt")
    siblings = _train_order_siblings(order, data, course, resume)
    if siblings.shown or siblings.held_out:
        mark = _make_order_embedding(order, model, data, material, siblings)
    try:
        with mark or nullcontext():
            fit(model, data, recipe(order.model), course, mark=mark, checkpoint=checkpoint)
    except CountermarkError:  # every repetition would fail in the same way
        remove_resume_folder(resume)
        raise
    figures = _write_outputs(order, model, mark, passphrase, resume)
    return {
        "model": order.out,
        "key": order.key if mark else None,
        "scheme": order.scheme,
        "accuracy": accuracy(model, data),
        **figures,
        "siblings": len(siblings.shown + siblings.held_out),
        "sibling_epochs": siblings.epochs,
        "sibling_seconds": siblings.seconds,
        "epochs": order.epochs,
        "seed": order.seed,
        "device": str(course.resolve_device()),
        "torch": torch.__version__,
    }


def check_output_places(order: Order, resume: Path) -> None:
    """Check that no file would be overwritten, except files of this very order.

    A run of the same order may have been killed between writing the model and the key.

    Raises:
        ConfigError: an output exists or cannot be written, the key has no place, or the resume
            folder belongs to another order.
    """
    # Killed after the last file of the folder was removed: nothing is left to continue.
    if resume.is_dir() and not any(resume.iterdir()):
        resume.rmdir()
    if resume.exists():
        kept = _read_saved_order(resume)
        differing = [k for k, v in json.loads(_encode_order(order)).items() if kept.get(k) != v]
        if differing:
            raise ConfigError(
                f"{resume} belongs to an interrupted run with other arguments "
                f"({', '.join(differing)}): repeat that command, or remove the folder"
            )
        if not (resume / _MATERIAL).exists():
            remove_resume_folder(
                resume
            )  # that run had finished, and was killed while it removed the folder
        elif (resume / _WRITING).exists():
            return  # the existing model or key may come from that run
    require_free_path(order.out)
    if order.scheme != UNMARKED and order.key is None:
        raise ConfigError("a mark needs a place for its key: give --key DIR")
    if order.scheme != UNMARKED and order.key is not None:
        refuse_existing(Path(order.key))
        refuse_nested(Path(order.key), Path(order.out))
        require_writable_place(order.key)
    require_writable_place(order.out)


def save_resume_state(order: Order, resume: Path, material: KeyMaterial) -> None:
    """Write order and secret to the resume folder, unless the folder exists."""
    if not resume.exists():
        kept = {_ORDER: _encode_order(order), _MATERIAL: material.secret + material.nonce}
        files.write_folder(resume, kept)


def record_writing(resume: Path) -> None:
    """Record that files at the output paths may from now on come from this run."""
    files.write_bytes(resume / _WRITING, b"")


def _read_saved_order(resume: Path) -> dict[str, Any]:
    """Read the order of an interrupted run."""
    try:
        return dict(json.loads((resume / _ORDER).read_bytes()))
    except (OSError, ValueError, TypeError):
        raise ConfigError(
            f"{resume} exists and belongs to no interrupted run: move it away, or change --out"
        ) from None


def remove_resume_folder(resume: Path) -> None:
    """Remove the resume folder: the secret first, the order last."""
    # A folder with an order and no secret shows `check_output_places` that the run was killed here.
    for each in sorted(resume.iterdir(), key=lambda p: (p.name != _MATERIAL, p.name == _ORDER)):
        each.unlink()
    resume.rmdir()


def _build_host(order: Order, data: Dataset) -> tuple[nn.Module, Course]:
    """Build the host before training, and the settings of its training."""
    seed_torch(order.seed, "init")
    model = build(order.model, order.model_arguments)
    check_fit(order.model, model, data)
    teacher = None
    if order.start:
        load_into(model, Path(order.start))
    if order.teacher:
        teacher = build(order.model, order.model_arguments)
        load_into(teacher, Path(order.teacher))
        teacher.eval()
    course = Course(order.epochs, order.seed, _check_precision(order), order.device, teacher)
    _check_device(course)
    if teacher is not None:
        teacher.to(course.resolve_device())
    return model, course


def _check_precision(order: Order) -> Any:
    """Return the precision of an order; raise ConfigError for an unknown one."""
    if order.precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision is {order.precision!r}: expected fp32 or bf16")
    return order.precision


def _check_device(course: Course) -> None:
    """Raise ConfigError if torch cannot use the device."""
    # torch refuses an unknown device by RuntimeError, and one it was built without by
    # AssertionError. Allocating an empty tensor is the cheapest way to find out.
    try:
        torch.empty(0, device=course.resolve_device())
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"device {course.device!r}: {said}; expected auto, cpu, cuda, …"
        ) from None


def check_fit(name: str, model: nn.Module, data: Dataset) -> None:
    """Run one image through the model to check that model and data fit.

    Raises:
        ConfigError: the model does not take the images, or has too few classes.
    """
    shape = tuple(data.train_images.shape[1:])
    model.eval()
    try:
        with torch.no_grad():
            scores = model(data.normalised(data.train_images[:1]))
    except Exception as error:  # a module:factory is foreign code and may raise anything
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"model {name} does not take images of shape {shape} ({said}): "
            "choose another model or data set, or set --model-arg"
        ) from None
    if not isinstance(scores, torch.Tensor):
        found = type(scores).__name__
        raise ConfigError(f"model {name} answers with a {found}: expected a tensor (N, classes)")
    if scores.dim() != 2 or scores.shape[1] < data.classes:
        raise ConfigError(
            f"model {name} answers with shape {tuple(scores.shape)}, {data.name} has "
            f"{data.classes} classes: give --model-arg classes={data.classes}"
        )


def load_or_make_material(order: Order, resume: Path) -> KeyMaterial:
    """Return the secret of an interrupted run of this order, or generate one."""
    if order.test_key is not None:
        return KeyMaterial.from_test_seed(order.test_key)
    if resume.exists():
        kept = (resume / _MATERIAL).read_bytes()
        return KeyMaterial(kept[:SECRET_BYTES], kept[SECRET_BYTES:])
    return KeyMaterial.generate()


def _train_order_siblings(
    order: Order, data: Dataset, course: Course, resume: Path
) -> TrainedSiblings:
    """Train unmarked siblings of the host in the resume folder, if the scheme needs them."""
    if order.scheme == UNMARKED:
        return TrainedSiblings()
    if not _make_order_scheme(order, data).needs_siblings:
        return TrainedSiblings()
    return train_siblings(
        lambda: _build_host(order, data)[0], data, recipe(order.model), course,
        count=order.siblings, folder=resume,
    )  # fmt: skip


def _make_order_embedding(
    order: Order, model: nn.Module, data: Dataset, material: KeyMaterial, siblings: TrainedSiblings
) -> Embedding | None:
    """Make the embedding of an order; None for an unmarked host."""
    if order.scheme == UNMARKED:
        return None
    scheme = _make_order_scheme(order, data)
    return make_embedding(
        scheme, model, data, owner=order.owner, material=material, siblings=siblings
    )


def _make_order_scheme(order: Order, data: Dataset) -> Scheme:
    """Make the scheme of an order, with a schedule for its number of batches."""
    batches = order.epochs * count_batches(data, recipe(order.model))
    return make_scheme(order.scheme, order.fields, data, batches)


def _write_outputs(
    order: Order, model: nn.Module, mark: Embedding | None, passphrase: str | None, resume: Path
) -> dict[str, Any]:
    """Write the model, then the key, then remove the resume folder; return the figures.

    A run that is killed at any point in between can be repeated without losing the secret.
    """
    figures: dict[str, Any] = {}
    key = None
    if mark:
        try:
            key, evidence = mark.key, mark.read()
        except CountermarkError:  # the mark is not in the model, or training diverged
            remove_resume_folder(resume)
            raise
        figures = {
            "bits": evidence.bits if evidence else None,
            "unit": evidence.unit if evidence else None,
            "matched": evidence.match_count if evidence else None,
            "commitment": key.commitment,
            "test_key": key.test_key,
        }
    record_writing(resume)
    save_weights(model.state_dict(), Path(order.out))
    if key and order.key and not is_key_saved(Path(order.key), key):
        key.with_model(order.model, order.model_arguments).save(order.key, passphrase)
    remove_resume_folder(resume)
    return figures


def is_key_saved(folder: Path, key: Key) -> bool:
    """Return true if an earlier run of this order has already written the key."""
    return folder.exists() and key.commitment == load_header(folder).commitment


def load_into(model: nn.Module, path: Path) -> None:
    """Load a weight file into a model, by name.

    Raises:
        SuspectError: the file cannot be read.
        ConfigError: a tensor is missing or has another shape.
    """
    # Only the model's own tensors are required: extra tensors in the file are ignored.
    state = load_state(path)
    for name, tensor in model.state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            found = list(state[name].shape) if name in state else "no such tensor"
            raise ConfigError(
                f"{path} does not fit the model: {name} needs shape {list(tensor.shape)}, "
                f"found {found}; give the --model and --model-arg it was made with"
            )
    model.load_state_dict({name: state[name] for name in model.state_dict()})


def load_host(name: str, arguments: Mapping[str, Any], path: Path, data: Dataset) -> nn.Module:
    """Build a model, check that it takes the images of a data set, and load a weight file.

    Raises:
        SuspectError, ConfigError: as in `load_into` and `check_fit`.
    """
    model = build(name, dict(arguments))
    check_fit(name, model, data)
    load_into(model, path)
    return model


def _encode_order(order: Order) -> bytes:
    """Encode an order as JSON."""
    return json.dumps(asdict(order), indent=1, default=dict).encode()
