"""Read named tensors lazily from weight files of many formats and from live modules.

A suspect is hostile input. The package unpickles nothing: pickles are parsed into plain values. It
checks every size before it allocates memory, and reads only the tensors that a caller requests. The
digests of tensors are computed from the same file descriptor that the values are read from. A
suspect that cannot be read raises a `SuspectError` with a message of one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from countermark._internal.files import replace_file
from countermark.checkpoints.base import IN_PART, Array, TensorInfo, Weights
from countermark.checkpoints.cached import CachedWeights
from countermark.checkpoints.composed import compose_weights
from countermark.checkpoints.digest import ModelDigest, compute_model_digest
from countermark.checkpoints.distributed import DistributedWeights
from countermark.checkpoints.dtypes import TORCH_DTYPES
from countermark.checkpoints.format_names import (
    find_format,
    is_json,
    make_format_refusal,
    refuse_other_archives,
)
from countermark.checkpoints.gguf_file import GgufWeights
from countermark.checkpoints.gguf_header import GGUF_MAGIC
from countermark.checkpoints.layouts import derive_tensors, renumber_blocks
from countermark.checkpoints.model_folders import find_in_store
from countermark.checkpoints.module import ModuleWeights
from countermark.checkpoints.name_matching import (
    MOST_CANDIDATES,
    find_assignments,
    find_prefixed_names,
    find_wrapped_names,
)
from countermark.checkpoints.onnx_file import OnnxWeights
from countermark.checkpoints.patched import PatchedWeights, StoredWeights
from countermark.checkpoints.quantised import dequantise_weights, find_coded_tensors
from countermark.checkpoints.safetensors_file import SafetensorsWeights
from countermark.checkpoints.sharded import INDEXES, METADATA, ShardedWeights, find_checkpoint
from countermark.checkpoints.torch_file import TorchWeights
from countermark.checkpoints.wrapped import WrappedWeights
from countermark.errors import SuspectError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "IN_PART",
    "MOST_CANDIDATES",
    "Array",
    "CachedWeights",
    "DistributedWeights",
    "GgufWeights",
    "ModelDigest",
    "ModuleWeights",
    "OnnxWeights",
    "PatchedWeights",
    "SafetensorsWeights",
    "ShardedWeights",
    "StoredWeights",
    "Suspect",
    "TensorInfo",
    "TorchWeights",
    "Weights",
    "WrappedWeights",
    "compose_weights",
    "compute_model_digest",
    "dequantise_weights",
    "derive_tensors",
    "find_assignments",
    "find_coded_tensors",
    "find_prefixed_names",
    "find_wrapped_names",
    "load_state",
    "open_suspect",
    "open_weights",
    "renumber_blocks",
    "save_weights",
]  # fmt: skip

# In protobuf: field 1 (ir_version) as a variable-length integer.
_ONNX = b"\x08"
_PICKLE = b"\x80"  # the opcode that names the protocol


Suspect: TypeAlias = "str | Path | nn.Module | Weights"
"""A file, a folder of shards, a live module, or weights that are open already."""


def open_weights(suspect: Suspect) -> Weights:
    """Open a suspect: a file by its first bytes, a folder of shards or blobs, or a live module.

    Weights that are open already are returned unchanged.

    Raises:
        SuspectError: the file does not exist, or its format is not read.
    """
    if isinstance(suspect, Weights):
        return suspect
    if not isinstance(suspect, str | Path):
        if not hasattr(suspect, "state_dict"):
            raise SuspectError(
                f"a suspect is a {type(suspect).__name__}: expected a path or a torch module; "
                "load a state dict into its model, or save it to a file first"
            )
        return ModuleWeights(suspect)
    path = _find_weight_file(Path(suspect))
    if path.name.endswith(INDEXES):
        return ShardedWeights(path)
    return DistributedWeights(path) if path.name == METADATA else _open_file(path)


def _open_file(path: Path) -> Weights:
    """Open one weight file by its first bytes; raise `SuspectError` if its format is not read."""
    # The first bytes decide, because a thief may name a file as they like. ONNX alone is known by
    # its suffix as well, because protobuf allows fields in any order.
    start = _read_beginning(path)
    if start[:4] == GGUF_MAGIC:
        return GgufWeights(path)
    # A safetensors file begins with the length of its header (8 bytes), then the JSON header.
    if start[8:9] == b"{" and not is_json(start):
        return SafetensorsWeights(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == _PICKLE:
        refuse_other_archives(path)
        return TorchWeights(path)
    if (start[:1] == _ONNX or path.suffix == ".onnx") and find_format(path) is None:
        return OnnxWeights(path)
    raise make_format_refusal(path)


def _find_weight_file(path: Path) -> Path:
    """Return the weight file or index that a path means: itself, or one in a folder or store.

    Raises:
        SuspectError: the folder holds no checkpoint, or several.
    """
    # A small JSON file may be the manifest of a model in a store of blobs.
    if path.is_dir() or (path.is_file() and is_json(_read_beginning(path))):
        path = find_in_store(path) or path
    return find_checkpoint(path) if path.is_dir() else path


def open_suspect(suspect: Suspect) -> Weights:
    """Open a suspect with views of the weights that it stores as codes or as several tensors.

    Raises:
        SuspectError: as in `open_weights` and `dequantise_weights`.
    """
    return compose_weights(dequantise_weights(open_weights(suspect)))


def _read_beginning(path: Path) -> bytes:
    """Read the first nine bytes of a regular file.

    Raises:
        SuspectError: the path is no regular file, or cannot be read.
    """
    # Opening a named pipe would wait for a writer, perhaps forever.
    if path.exists() and not path.is_file():
        raise SuspectError(f"{path} is no regular file: expected a weight file")
    try:
        with path.open("rb") as file:
            return file.read(9)
    except OSError as error:
        raise SuspectError(
            f"{path} cannot be read ({error.strerror}): expected a .safetensors, torch, "
            "TorchScript, ONNX or GGUF file"
        ) from None


def save_weights(state: Mapping[str, Any], path: Path) -> None:
    """Write torch tensors by name as a safetensors file, completely or not at all.

    Tensors that share memory are each written in full, so that every name is kept.
    """
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory, such as tied embeddings.
    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replace_file(path) as temporary:
        temporary.touch()
        # Newer versions of safetensors replace the file by one of mode 0600, so the permissions
        # that this user normally gives to files are read first and restored afterwards.
        permissions = temporary.stat().st_mode
        save_file(apart, temporary)
        temporary.chmod(permissions)


def load_state(path: Path) -> dict[str, Any]:
    """Load all tensors of a weight file as torch tensors in their own dtypes.

    The file is opened by `open_weights`. Views (second forms of a stored tensor) are left out.

    Raises:
        SuspectError: as in `open_weights`, or a safetensors file cannot be loaded completely.
    """
    with open_weights(path) as weights:
        if isinstance(weights, TorchWeights | DistributedWeights | GgufWeights | OnnxWeights):
            stored = [name for name in weights.tensors if name not in weights.views]
            return {name: _load_tensor(weights, name) for name in stored}
        parts = list(weights.shards) if isinstance(weights, ShardedWeights) else []
        path = Path(weights.name)
    if parts:
        return {n: each for part in parts for n, each in load_state(path / part).items()}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    # safetensors checks more of a whole file than is checked when single tensors are read.
    except SafetensorError as error:
        raise SuspectError(
            f"{path} is refused as a whole ({error}): expected a complete .safetensors file"
        ) from None


def _load_tensor(weights: Weights, name: str) -> Any:
    """Load one tensor as a torch tensor, in its own dtype where torch has it."""
    import torch

    info = weights.tensors[name]
    dtype = next((each for each, word in TORCH_DTYPES.items() if word == info.dtype), None)
    # Initializers of ONNX and codes of torch with a scale are loaded as the numbers that are read.
    if dtype is None or isinstance(weights, OnnxWeights):
        return torch.from_numpy(weights.read(name).copy())
    raw = bytearray(b"".join(weights.read_pieces(name)))
    if not raw:
        return torch.empty(info.shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(raw, dtype=getattr(torch, dtype)).reshape(info.shape)
