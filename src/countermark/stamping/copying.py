"""Copies of checkpoints in which some values are replaced: there whole or not at all."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from countermark.errors import ConfigError, SuspectError
from countermark.files import creating, replacing, sync
from countermark.places import require_free
from countermark.progress import progress
from countermark.stamping.solving import Piece
from countermark.weights import SafetensorsWeights, ShardedWeights, Weights
from countermark.weights.dtypes import encoded

_SMALL = 64 << 20  # bytes: a larger file beside a checkpoint is no configuration
_WEIGHT_FILES = {
    ".bin", ".ckpt", ".gguf", ".h5", ".jit", ".mlmodel", ".msgpack", ".npy", ".npz", ".onnx",
    ".onnx_data", ".ot", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tflite",
}  # fmt: skip
_SECRET_FILES = {".key", ".p12", ".pem", ".pfx"}
_PIECE = 8 << 20  # bytes


class Writer(Protocol):
    """Replaces values in the copy."""

    def __call__(self, piece: Piece) -> None:
        """Write the values after, where those before are."""


def shards_of(weights: Weights, source: Path) -> dict[str, SafetensorsWeights]:
    """The safetensors files of an open checkpoint by name.

    Raises:
        SuspectError: it is of another format, or was opened by its index.
    """
    if isinstance(weights, ShardedWeights):
        if not source.is_dir():
            raise SuspectError(f"{source} is the index of several files: give the folder")
        return dict(weights.shards)
    if isinstance(weights, SafetensorsWeights):
        return {Path(weights.name).name: weights}
    raise SuspectError(
        f"{source} is no safetensors checkpoint: expected a .safetensors file or a folder of them; "
        "save it with safetensors.torch.save_file first"
    )


@contextmanager
def copied(source: Path, weights: Weights, out: Path) -> Iterator[tuple[Path, Writer, list[str]]]:
    """A copy of a checkpoint that gets the name `out` when the block ends well.

    Args:
        source: the file, or the folder, that `weights` was opened from.
        weights: the same, open.
        out: what must not exist yet.

    Yields: where the copy is meanwhile, what replaces values in it, and what of the folder was left
        out because it may hold the model without the mark, or a secret.
    """
    shards = shards_of(weights, source)
    if not source.is_dir():
        (name,) = shards
        with replacing(out) as temporary:
            _copy(Path(weights.name), temporary)
            with _writer({name: temporary}, weights) as write:
                yield temporary, write, []
        return
    with creating(out) as temporary:
        left_out = _copy_beside(source, temporary, set(shards))
        for name in shards:
            _copy(source / name, temporary / name)
        with _writer({name: temporary / name for name in shards}, weights) as write:
            yield temporary, write, left_out
        temporary.chmod(source.stat().st_mode & 0o777)


def require_room(source: Path, out: Path) -> None:
    """Raise `ConfigError` where the copy may not be made."""
    require_free(out)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{out} lies in {source}, which is copied: choose another place")


def require_apart(key: Path, source: Path) -> None:
    """Raise `ConfigError` where a key would lie in a checkpoint, which is what is given away."""
    if key.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{key} lies in {source}, which is to be published: choose another place")


def _copy(source: Path, target: Path) -> None:
    """The bytes of one file, synced when the values are written."""
    size = source.stat().st_size / _PIECE
    what = progress(f"copying {source.name}, in {_PIECE >> 20} MiB", math.ceil(size))
    with what as advance, source.open("rb") as given, target.open("wb") as taken:
        while piece := given.read(_PIECE):
            taken.write(piece)
            advance(1)


@contextmanager
def _writer(files: dict[str, Path], weights: Weights) -> Iterator[Writer]:
    """Writes into open copies; they are synced at the end."""
    opened = {name: os.open(path, os.O_RDWR) for name, path in files.items()}
    try:

        def write(piece: Piece) -> None:
            if isinstance(weights, ShardedWeights):
                name, offset, _ = weights.place(piece.name)
            elif isinstance(weights, SafetensorsWeights):
                (name,), (offset, _) = opened, weights.place(piece.name)
            raw = encoded(piece.after, weights.tensors[piece.name].dtype)
            _write_all(opened[name], raw.tobytes(), offset + piece.start * raw.itemsize)

        yield write
        for descriptor in opened.values():
            os.fsync(descriptor)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _copy_beside(source: Path, target: Path, shards: set[str]) -> list[str]:
    """Copy what belongs to a checkpoint beside its weights; returns what was left out."""
    left_out: list[Path] = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if any(part.startswith(".") for part in name.parts) or str(name) in shards:
            continue
        if any(name.is_relative_to(each) for each in left_out):
            continue
        if _keeps_secret(path) or (path.is_file() and _may_be_model(path)):
            left_out.append(name)
        elif path.is_dir():
            (target / name).mkdir(exist_ok=True, parents=True)
        else:
            (target / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(path, target / name)
            shutil.copymode(path, target / name)
            sync(target / name)
    return [str(each) for each in left_out]


def _may_be_model(path: Path) -> bool:
    return path.suffix.lower() in _WEIGHT_FILES or path.stat().st_size > _SMALL


def _keeps_secret(path: Path) -> bool:
    """Whether it is a key, what an interrupted `embed` left, or a private key."""
    if path.is_dir():
        return path.name.endswith(".resume") or (path / "key.json").is_file()
    return path.suffix.lower() in _SECRET_FILES
