"""Read a file of `torch.save` as a suspect, checking its zip directory before torch reads it.

Two zip readers can find two different archives in one file. So nothing may stand behind, inside or
beside the one directory at the end of the file, where `torch.save` writes it: then the archive that
is checked here is the archive that torch reads.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from countermark.checkpoints.base import (
    TensorInfo,
    Weights,
    hash_unchanged_file,
    make_file_identity,
)
from countermark.checkpoints.module import convert_to_numpy, copy_raw_bytes
from countermark.errors import SuspectError

LARGEST_PICKLE = 64 << 20  # bytes of tensor names and shapes
_END, _LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_PACKED, _PARTS = "._packed_params._packed_params", ("weight", "bias")
ZIP_ERRORS = (
    zipfile.BadZipFile, struct.error, OSError, ValueError, RuntimeError, EOFError, OverflowError,
)  # fmt: skip
"""Errors that `zipfile` raises on damaged archives, encrypted entries and unknown versions."""

_UNSAID = (1 << 32) - 1  # placeholder for a number that only the 64-bit record holds


class TorchWeights(Weights):
    """A file written by `torch.save`: a state dict, alone or under "state_dict" or "model".

    The file is loaded with `weights_only=True` and memory-mapped, after the zip directory has been
    checked (see `check_directory`). No tensor may be larger than its own storage.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._identity = path, make_file_identity(path.stat())
        try:
            check_directory(path)
        except ValueError as error:
            raise self._make_refusal(str(error)) from None
        self._state = self._open_state()
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }

    def _open_state(self) -> dict[str, Any]:
        """Load the state dict and return its tensors by name.

        Raises:
            SuspectError: torch is not installed or refuses the file, or the file holds no state
                dict.
        """
        try:
            import torch
        except ImportError:
            raise SuspectError(
                f"{self.name} is a torch file, and torch is not installed: "
                "install it, or give the suspect as .safetensors"
            ) from None
        try:
            loaded = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many classes on damaged or hostile files
            first = str(error).strip().partition("\n")[0][:120]
            raise self._make_refusal(f"torch refuses it ({first})") from None
        # Training scripts often save the state dict under one of these keys, beside the optimiser.
        for wrapper in ("state_dict", "model"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
                loaded = loaded[wrapper]
        if not isinstance(loaded, Mapping):
            raise self._make_refusal(f"it holds a {type(loaded).__name__}")
        return {
            name: each
            for name, each in _unpack_state(loaded)
            if isinstance(each, torch.Tensor) and not each.is_nested  # has no shape
        }

    def get_tensor(self, name: str) -> Any:
        """Return one torch tensor.

        Raises:
            SuspectError: the tensor is not dense, or claims more values than its storage holds.
        """
        tensor = self._state[name]
        if tensor.is_meta or str(tensor.layout) != "torch.strided":
            raise self._make_refusal(f"{name} is no dense tensor")
        # A stride of 0 lets a tiny storage claim a tensor that would fill the memory when copied.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise self._make_refusal(
                f"{name} claims {tensor.numel():,} values, more than are there"
            )
        return tensor

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor as float64 or float32 and record its digest."""
        values = convert_to_numpy(self.name, name, self.get_tensor(name))
        self.digests[name] = hashlib.sha256(values.tobytes()).hexdigest()
        return values

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, as `torch.save` wrote them."""
        yield copy_raw_bytes(self.name, name, self.get_tensor(name))

    def compute_file_digest(self) -> str:
        """Compute the SHA-256 of the whole file, in hexadecimal."""
        return hash_unchanged_file(self._path, self._identity)

    def close(self) -> None:
        """Drop the tensors, which releases the memory-mapped file."""
        self._state = {}

    def _make_refusal(self, why: str) -> SuspectError:
        """Make the error that refuses this file, with a reason."""
        return SuspectError(
            f"{self.name} is refused: {why}; expected a .safetensors file, "
            "or a state dict written by torch.save in torch 1.6 or later"
        )


def _unpack_state(loaded: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield state dict values by name, splitting the (weight, bias) of quantised layers."""
    for name, each in loaded.items():
        layer = str(name).removesuffix(_PACKED)
        # torch keeps the weight and the bias of a quantised linear layer as one tuple.
        if layer != name and isinstance(each, tuple) and len(each) == 2:
            yield from ((f"{layer}.{last}", part) for last, part in zip(_PARTS, each, strict=True))
        else:
            yield str(name), each


def check_directory(path: Path) -> None:
    """Refuse an archive that `torch.save` cannot have written.

    Raises:
        ValueError: the directory is damaged or ambiguous, an entry is compressed or claims more
            bytes than the file has, the pickle is beyond 64 MiB, or the file holds TorchScript.
    """
    try:
        require_directory_at_end(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except ZIP_ERRORS as error:
        raise ValueError(f"its zip directory cannot be read ({error})") from None
    size = path.stat().st_size
    for entry in entries:
        name = entry.filename.lower()  # torch ignores the case of names
        # Compressed entries could expand far beyond the size of the file.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
        if name.endswith(".pkl") and entry.file_size > LARGEST_PICKLE:
            raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes")
        if name.endswith("constants.pkl"):
            raise ValueError("it is a TorchScript archive, which holds code")


def require_directory_at_end(path: Path) -> None:
    """Raise `ValueError` unless the file ends with one zip directory and its end record.

    A 64-bit end record, which `torch.save` writes as well, must agree with the 32-bit record.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        # 98 bytes: a 64-bit end record (56), its locator (20) and the 32-bit end record (22).
        file.seek(max(0, size - 98))
        tail = file.read().rjust(98, b"\0")
    signature, _, _, _, _, length, offset, comment = struct.unpack("<4s4H2LH", tail[-22:])
    ends = size - 22
    if tail[-42:-38] == _LOCATOR:  # torch.save writes the 64-bit end record as well
        ends = size - 98
        (at,) = struct.unpack("<Q", tail[-34:-26])
        wide = struct.unpack("<2Q", tail[40:56])
        # The 32-bit record may hold all ones in place of a number that needs 64 bits.
        same = all(a in (b, _UNSAID) for a, b in zip((length, offset), wide, strict=True))
        if at != ends or tail[:4] != _END64 or not same:
            raise ValueError("its two end records do not agree")
        length, offset = wide
    if signature != _END or comment or length + offset != ends:
        raise ValueError("it does not end with one zip directory")
