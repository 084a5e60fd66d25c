"""Named tensors, read lazily from safetensors files, torch files and live modules.

A suspect is hostile input. Nothing is unpickled beyond torch's own `weights_only` reader, sizes are
checked before anything is allocated, only the tensors that are asked for are read, and what was
read is digested from the same descriptor. An unreadable suspect is a `SuspectError` of one line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from countermark.errors import SuspectError

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[np.floating[Any]]

MOST_CANDIDATES = 1000
"""Renamed tensors are tried in at most this many ways; each is a test that p is corrected for."""

_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format itself
_LARGEST_PICKLE = 64 << 20  # bytes of tensor names and shapes in a torch file
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype (in the format's own word) of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str


class Weights(ABC):
    """A suspect's tensors by name. A context manager: files are closed when the block ends.

    Attributes:
        name: what the suspect is called in messages and verdicts.
        tensors: every tensor's name, shape and dtype, known without reading any.
        digests: SHA-256 of what has been read so far: the header, and each tensor by name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: Mapping[str, TensorInfo] = {}
        self.digests: dict[str, str] = {}

    @abstractmethod
    def _load(self, name: str) -> NDArray[Any]:
        """The values of one tensor."""

    def read(self, name: str) -> Array:
        """One tensor as float32 (float64 stays as it is), in its own shape.

        Raises:
            SuspectError: the values are not finite real numbers.
        """
        values = self._load(name)
        if not np.isfinite(values).all():
            wrong = int(values.size - np.isfinite(values).sum())
            raise SuspectError(
                f"{self.name}: {name} holds {wrong} values that are not finite: "
                "expected trained weights; nothing can be read from these"
            )
        return values if values.dtype == np.float64 else values.astype(np.float32, copy=False)

    @abstractmethod
    def file_digest(self) -> str | None:
        """SHA-256 of the whole suspect file in hexadecimal; None for a live module."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SafetensorsWeights(Weights):
    """A safetensors file. Only its header and the tensors that are asked for are read.

    Raises:
        SuspectError: truncated, or the header is not what the format allows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._file = path.open("rb")
        try:
            self._places = self._header()
        except BaseException:
            self.close()
            raise
        self.tensors = {name: info for name, (info, _, _) in self._places.items()}

    def _header(self) -> dict[str, tuple[TensorInfo, int, int]]:
        total = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if total < 10 or length > min(_LARGEST_HEADER, total - 8):
            raise self._damaged(f"its header claims {length:,} bytes, the file has {total:,}")
        raw = self._file.read(length)
        self.digests["header"] = hashlib.sha256(raw).hexdigest()
        try:
            header = json.loads(raw, object_pairs_hook=_no_duplicates)
            header.pop("__metadata__", None)
            return {
                name: self._place(name, about, 8 + length, total) for name, about in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its header is not a list of tensors ({error})") from None

    def _place(
        self, name: str, about: dict[str, Any], start: int, total: int
    ) -> tuple[TensorInfo, int, int]:
        shape = tuple(about["shape"])
        begin, end = about["data_offsets"]
        if not all(type(each) is int and each >= 0 for each in (*shape, begin, end)):
            raise ValueError(f"{name}: a size that is no number")
        dtype = str(about["dtype"])
        if not begin <= end <= total - start:
            raise ValueError(f"{name}: its bytes lie outside the file")
        if dtype in _DTYPES and prod(shape) * np.dtype(_DTYPES[dtype]).itemsize != end - begin:
            raise ValueError(f"{name}: its bytes do not fit its shape {list(shape)}")
        return TensorInfo(shape, dtype), start + begin, end - begin

    def _load(self, name: str) -> NDArray[Any]:
        info, offset, size = self._places[name]
        if info.dtype not in _DTYPES:
            raise SuspectError(
                f"{self.name}: {name} has dtype {info.dtype}, which cannot be read yet: "
                f"expected one of {', '.join(_DTYPES)}; convert the file to one of them"
            )
        self._file.seek(offset)
        raw = self._file.read(size)
        if len(raw) != size:
            raise self._damaged(f"{name} ends after {len(raw):,} of {size:,} bytes")
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        values = np.frombuffer(raw, dtype=_DTYPES[info.dtype])
        if info.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(info.shape)  # the tensor's own shape

    def file_digest(self) -> str:
        """SHA-256 of the whole file, in hexadecimal."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _damaged(self, why: str) -> SuspectError:
        return SuspectError(
            f"{self.name} is damaged or no safetensors file: {why}; "
            "expected a complete .safetensors file, obtain the suspect again"
        )


class TorchWeights(Weights):
    """A file written by `torch.save`: a state dict, alone or under "state_dict" or "model".

    Read through `weights_only=True` and memory-mapped, after the zip directory has been checked:
    nothing compressed, no pickle beyond 64 MiB, no tensor larger than its own storage.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._check_directory()
        self.state = self._open_state()
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self.state.items()
        }

    def _check_directory(self) -> None:
        try:
            with zipfile.ZipFile(self._path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise self._refuse(f"its zip directory cannot be read ({error})") from None
        size = self._path.stat().st_size
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                raise self._refuse(f"{entry.filename} is compressed, which torch.save never does")
            if entry.filename.endswith(".pkl") and entry.file_size > _LARGEST_PICKLE:
                raise self._refuse(f"{entry.filename} has {entry.file_size:,} bytes")

    def _open_state(self) -> dict[str, Any]:
        try:
            import torch
        except ImportError:
            raise SuspectError(
                f"{self.name} is a torch file, and torch is not installed: "
                "install it, or give the suspect as .safetensors"
            ) from None
        try:
            loaded = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises half a dozen kinds on damaged or hostile files
            first = str(error).strip().partition("\n")[0][:120]
            raise self._refuse(f"torch refuses it ({first})") from None
        for wrapper in ("state_dict", "model"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
                loaded = loaded[wrapper]
        if not isinstance(loaded, Mapping):
            raise self._refuse(f"it holds a {type(loaded).__name__}")
        state = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
        for name, tensor in state.items():
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise self._refuse(f"{name} claims {tensor.numel():,} values, more than are there")
        return state

    def _load(self, name: str) -> NDArray[Any]:
        values = _to_numpy(self.name, name, self.state[name])
        self.digests[name] = hashlib.sha256(values.tobytes()).hexdigest()
        return values

    def file_digest(self) -> str:
        """SHA-256 of the whole file, in hexadecimal."""
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Let go of the file."""
        self.state = {}

    def _refuse(self, why: str) -> SuspectError:
        return SuspectError(
            f"{self.name} is refused: {why}; expected a .safetensors file, "
            "or a state dict written by torch.save in torch 1.6 or later"
        )


class ModuleWeights(Weights):
    """A live module: its parameters and buffers, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(type(module).__name__)
        self._state = module.state_dict(keep_vars=True)
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }

    def _load(self, name: str) -> NDArray[Any]:
        values = _to_numpy(self.name, name, self._state[name])
        self.digests[name] = hashlib.sha256(values.tobytes()).hexdigest()
        return values

    def file_digest(self) -> None:
        """A live module is no file."""

    def close(self) -> None:
        """Nothing was opened."""


def open_weights(suspect: str | Path | nn.Module | Weights) -> Weights:
    """Open a suspect by what it is: a file by its first bytes, or a live module.

    Raises:
        SuspectError: there is no such file, or it is of no known kind.
    """
    if isinstance(suspect, Weights):
        return suspect
    if not isinstance(suspect, str | Path):
        return ModuleWeights(suspect)
    path = Path(suspect)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise SuspectError(
            f"{path} cannot be read ({error.strerror}): expected a .safetensors or torch file"
        ) from None
    if start[:4] == b"PK\x03\x04":
        return TorchWeights(path)
    if start[8:9] == b"{":
        return SafetensorsWeights(path)
    raise SuspectError(
        f"{path} is neither safetensors nor a zip-format torch file (old pickles are never "
        "opened): re-save it with safetensors.torch.save_file or torch.save"
    )


def save_weights(state: Mapping[str, Any], path: Path) -> None:
    """Write torch tensors by name as a safetensors file, whole or not at all.

    Tensors that share memory are written each in full, so that names stay what they were.
    """
    from safetensors.torch import save_file

    from countermark.files import replacing

    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(path) as temporary:
        temporary.touch()  # with the permissions that this user gives to files
        save_file(apart, temporary)


def load_state(path: Path) -> dict[str, Any]:
    """All tensors of a weight file as torch tensors in their own dtypes, opened as a suspect is.

    Raises:
        SuspectError: as `open_weights`.
    """
    with open_weights(path) as weights:
        if isinstance(weights, TorchWeights):
            return {name: tensor.clone() for name, tensor in weights.state.items()}
    from safetensors.torch import load_file

    return dict(load_file(path))


def assignments(
    weights: Weights, wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, str]]:
    """Every way in which the wanted tensors can be found in a suspect; each one is a test.

    A tensor of the wanted name and shape is taken; a missing one is sought among all others of its
    shape. Yields maps from the wanted name to the suspect's name; none when a shape is missing.
    """
    taken = {
        name for name, shape in wanted.items()
        if name in weights.tensors and weights.tensors[name].shape == shape
    }  # fmt: skip
    choices = [
        [name] if name in taken
        else [n for n, info in weights.tensors.items() if info.shape == shape and n not in taken]
        for name, shape in wanted.items()
    ]  # fmt: skip
    for found in itertools.product(*choices):
        if len(set(found)) == len(found):
            yield dict(zip(wanted, found, strict=True))


def _to_numpy(suspect: str, name: str, tensor: Any) -> NDArray[Any]:
    if tensor.is_complex() or tensor.is_quantized or tensor.is_sparse:
        raise SuspectError(f"{suspect}: {name} is a {tensor.dtype} tensor: expected real weights")
    wide = tensor.detach().cpu()
    wide = wide if str(wide.dtype) == "torch.float64" else wide.float()
    values: NDArray[Any] = wide.contiguous().numpy()
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found
