"""Copies of checkpoints in which some values are replaced, written completely or not at all."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from countermark._internal.files import (
    create_folder,
    parse_json,
    read_regular,
    replace_file,
    sync_to_disk,
)
from countermark._internal.output_paths import require_free_path
from countermark._internal.progress import show_progress
from countermark.checkpoints import (
    SafetensorsWeights,
    ShardedWeights,
    Weights,
    open_weights,
)
from countermark.checkpoints.dtypes import encode_values
from countermark.errors import ConfigError, SuspectError
from countermark.stamping.solving import Piece

_SMALL = 64 << 20  # bytes: larger files beside a checkpoint may hold weights
# Other formats often hold the same model, and a published unmarked twin would defeat the mark.
_WEIGHT_FILES = {
    ".bin", ".ckpt", ".gguf", ".h5", ".jit", ".mlmodel", ".msgpack", ".npy", ".npz", ".onnx",
    ".onnx_data", ".ot", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tflite",
}  # fmt: skip
# The copy is made to be published, so private keys beside the model must not enter it.
_SECRET_FILES = {".key", ".p12", ".pem", ".pfx"}
_MODULES, _LARGEST_LIST = "modules.json", 1 << 20  # of sentence-transformers; bytes
_PIECE = 8 << 20  # bytes copied at a time


class PieceWriter(Protocol):
    """A function that replaces values in the copy."""

    def __call__(self, piece: Piece) -> None:
        """Write the values `piece.after` in place of `piece.before`."""


def get_shards(weights: Weights, source: Path) -> dict[str, SafetensorsWeights]:
    """Return the safetensors files of an open checkpoint by file name.

    Raises:
        SuspectError: the checkpoint has another format, or was opened by its index file.
    """
    if isinstance(weights, ShardedWeights):
        if not source.is_dir():
            raise SuspectError(f"{source} is the index of several files: give the folder")
        shards = {n: s for n, s in weights.shards.items() if isinstance(s, SafetensorsWeights)}
        if len(shards) == len(weights.shards):
            return shards
    if isinstance(weights, SafetensorsWeights):
        return {Path(weights.name).name: weights}
    raise SuspectError(
        f"{source} is no safetensors checkpoint: expected a .safetensors file or a folder of them; "
        "save it with safetensors.torch.save_file first"
    )


@contextmanager
def copy_checkpoint(
    source: Path, weights: Weights, out: Path
) -> Iterator[tuple[Path, PieceWriter, list[str]]]:
    """Make a copy of a checkpoint that gets the name `out` when the block ends without an error.

    Args:
        source: the file, or the folder, that `weights` was opened from.
        weights: the open checkpoint.
        out: the name of the copy; must not exist yet.

    Yields: the temporary path of the copy, the function that replaces values in it, and the files
        of the folder that were left out because they may hold the unmarked model or a secret.
    """
    shards = get_shards(weights, source)
    if not source.is_dir():
        (name,) = shards
        with replace_file(out) as temporary:
            _copy(Path(weights.name), temporary)
            with _open_writer({name: temporary}, weights) as write:
                yield temporary, write, []
        return
    with create_folder(out) as temporary:
        left_out = _copy_other_files(source, temporary, weights, set(shards))
        for name in shards:
            _copy(source / name, temporary / name)
        with _open_writer({name: temporary / name for name in shards}, weights) as write:
            yield temporary, write, left_out
        # `create_folder` makes the folder private; the copy gets the source's permissions.
        temporary.chmod(source.stat().st_mode & 0o777)


def require_copy_place(source: Path, out: Path) -> None:
    """Raise `ConfigError` if the copy cannot be made at `out`."""
    require_free_path(out)
    # A copy inside its source would be copied into itself.
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{out} lies in {source}, which is copied: choose another place")


def require_key_outside(key: Path, source: Path) -> None:
    """Raise `ConfigError` if the key would lie in the checkpoint, which is to be published."""
    if key.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{key} lies in {source}, which is to be published: choose another place")


def _copy(source: Path, target: Path) -> None:
    """Copy the bytes of a file with a progress bar; `_open_writer` syncs the copy later."""
    size = source.stat().st_size / _PIECE
    what = show_progress(f"copying {source.name}, in {_PIECE >> 20} MiB", math.ceil(size))
    with what as advance, source.open("rb") as given, target.open("wb") as taken:
        while piece := given.read(_PIECE):
            taken.write(piece)
            advance(1)


@contextmanager
def _open_writer(files: dict[str, Path], weights: Weights) -> Iterator[PieceWriter]:
    """Yield a function that writes pieces into the open copies; sync the copies at the end."""
    opened = {name: os.open(path, os.O_RDWR) for name, path in files.items()}
    try:

        def write_piece(piece: Piece) -> None:
            """Encode the piece and write it to the file that holds its tensor."""
            if isinstance(weights, ShardedWeights):
                name, offset, _ = weights.locate_tensor(piece.name)
            elif isinstance(weights, SafetensorsWeights):
                (name,), (offset, _) = opened, weights.locate_tensor(piece.name)
            # Encoded in the tensor's own dtype, so that sizes and offsets of the file stay the
            # same.
            raw = encode_values(piece.after, weights.tensors[piece.name].dtype)
            _write_all(opened[name], raw.tobytes(), offset + piece.start * raw.itemsize)

        yield write_piece
        for descriptor in opened.values():
            os.fsync(descriptor)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    """Write all bytes at an offset; the system may write fewer bytes than asked."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _copy_other_files(source: Path, target: Path, weights: Weights, shards: set[str]) -> list[str]:
    """Copy the other files of a checkpoint's folder; return the files that were left out."""
    left_out: list[Path] = []
    modules = _list_module_folders(source)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        # Hidden folders such as .git and .cache may hold the unmarked weights.
        if any(part.startswith(".") for part in name.parts) or str(name) in shards:
            continue
        # A folder that was left out is left out with all its content.
        if any(name.is_relative_to(each) for each in left_out):
            continue
        is_model = path.is_file() and _is_possible_model(path)
        if is_model and name.parent in modules:
            is_model = not _is_other_module(path, weights)
        if _has_secret(path) or is_model:
            left_out.append(name)
        elif path.is_dir():
            (target / name).mkdir(exist_ok=True, parents=True)
        else:
            (target / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(path, target / name)
            shutil.copymode(path, target / name)
            sync_to_disk(target / name)
    return [str(each) for each in left_out]


def _list_module_folders(source: Path) -> set[Path]:
    """List the folders of the other modules of a sentence-transformers model, from its list."""
    try:
        modules = parse_json(read_regular(source / _MODULES, _LARGEST_LIST))
        folders = {Path(each["path"]) for each in modules}
    except (ValueError, TypeError, KeyError):  # another kind of model, or none that is complete
        return set()
    return folders - {Path()}


def _is_other_module(path: Path, weights: Weights) -> bool:
    """Return true for a weight file that shares no tensor's name and shape with a checkpoint."""
    try:
        with open_weights(path) as other:
            shapes = {name: each.shape for name, each in other.tensors.items()}
            return not any(shapes.get(n) == each.shape for n, each in weights.tensors.items())
    except SuspectError:  # a file that cannot be read may be the model in another format
        return False


def _is_possible_model(path: Path) -> bool:
    """Return true for a file with a suffix of weight files, or of more than 64 MiB."""
    return path.suffix.lower() in _WEIGHT_FILES or path.stat().st_size > _SMALL


def _has_secret(path: Path) -> bool:
    """Return true for a key folder, an unfinished key of `embed`, or a private key."""
    if path.is_dir():
        return path.name.endswith(".resume") or (path / "key.json").is_file()
    return path.suffix.lower() in _SECRET_FILES
