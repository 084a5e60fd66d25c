"""Named tensors, read lazily from safetensors, torch, TorchScript and ONNX files and live modules.

A suspect is hostile input. Nothing is unpickled beyond torch's own `weights_only` reader, sizes are
checked before anything is allocated, only the tensors that are asked for are read, and what was
read is digested from the same descriptor. An unreadable suspect is a `SuspectError` of one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from countermark.errors import SuspectError
from countermark.files import replacing
from countermark.weights.base import IN_PART, Array, TensorInfo, Weights
from countermark.weights.digest import ModelDigest, model_digest
from countermark.weights.finding import MOST_CANDIDATES, assignments, prefixed
from countermark.weights.module import ModuleWeights
from countermark.weights.onnx_file import OnnxWeights
from countermark.weights.quantised import as_numbers
from countermark.weights.remembered import Remembered
from countermark.weights.restored import Restored, Stored
from countermark.weights.safetensors_file import SafetensorsWeights
from countermark.weights.script_file import TorchScriptWeights, holds_script
from countermark.weights.sharded import INDEX, ShardedWeights, in_folder
from countermark.weights.torch_file import TorchWeights
from countermark.weights.wrapped import WrappedWeights

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "IN_PART", "MOST_CANDIDATES", "Array", "ModelDigest", "ModuleWeights", "OnnxWeights",
    "Remembered", "Restored", "SafetensorsWeights", "ShardedWeights", "Stored", "Suspect",
    "TensorInfo", "TorchScriptWeights", "TorchWeights", "Weights", "WrappedWeights",
    "as_numbers", "assignments", "load_state", "model_digest", "open_weights", "prefixed",
    "save_weights",
]  # fmt: skip

_ONNX = b"\x08"  # the first field of a model is the version of its form, a number


Suspect: TypeAlias = "str | Path | nn.Module | Weights"
"""What can be opened: a file, a folder of shards, a live module, or what is open already."""


def open_weights(suspect: Suspect) -> Weights:
    """Open a suspect by what it is: a file by its first bytes, a folder of shards, a live module.

    Raises:
        SuspectError: there is no such file, or it is of no known kind.
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
    path = Path(suspect)
    if path.is_dir():
        path = in_folder(path)
    if path.name.endswith(INDEX):
        return ShardedWeights(path)
    start = _beginning(path)
    if start[:4] == b"PK\x03\x04":
        return TorchScriptWeights(path) if holds_script(path) else TorchWeights(path)
    if start[8:9] == b"{":
        return SafetensorsWeights(path)
    if start[:1] == _ONNX or path.suffix == ".onnx":
        return OnnxWeights(path)
    raise SuspectError(
        f"{path} is neither safetensors nor a zip-format torch file, nor ONNX (old pickles are "
        "never opened): re-save it with safetensors.torch.save_file or torch.save"
    )


def _beginning(path: Path) -> bytes:
    """The first bytes of a regular file: a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise SuspectError(f"{path} is no regular file: expected a weight file")
    try:
        with path.open("rb") as file:
            return file.read(9)
    except OSError as error:
        raise SuspectError(
            f"{path} cannot be read ({error.strerror}): expected a .safetensors, torch, "
            "TorchScript or ONNX file"
        ) from None


def save_weights(state: Mapping[str, Any], path: Path) -> None:
    """Write torch tensors by name as a safetensors file, whole or not at all.

    Tensors that share memory are written each in full, so that names stay what they were.
    """
    from safetensors.torch import save_file

    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(path) as temporary:
        temporary.touch()
        permissions = temporary.stat().st_mode  # that this user gives to files
        save_file(apart, temporary)  # newer versions replace the file by one of mode 0600
        temporary.chmod(permissions)


def load_state(path: Path) -> dict[str, Any]:
    """All tensors of a weight file as torch tensors in their own dtypes, opened as a suspect is.

    Raises:
        SuspectError: as `open_weights`.
    """
    with open_weights(path) as weights:
        if isinstance(weights, TorchWeights):
            return {name: weights.tensor(name).clone() for name in weights.tensors}
        if isinstance(weights, OnnxWeights | TorchScriptWeights):
            import torch

            stored = [name for name in weights.tensors if name not in weights.views]
            return {name: torch.from_numpy(weights.read(name).copy()) for name in stored}
        parts = list(weights.shards) if isinstance(weights, ShardedWeights) else []
        path = Path(weights.name)
    if parts:
        return {n: each for part in parts for n, each in load_state(path / part).items()}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:  # it asks for more than reading single tensors does
        raise SuspectError(
            f"{path} is refused as a whole ({error}): expected a complete .safetensors file"
        ) from None
