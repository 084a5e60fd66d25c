"""Read the tensors of a TorchScript archive as a suspect, without looking at its code.

`safe_unpickle` parses the pickles of the archive without running them, so torch is not needed. The zip
directory is checked in the same way as the directory of a file from `torch.save`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from countermark.checkpoints.base import (
    TensorInfo,
    Weights,
    hash_unchanged_file,
    make_file_identity,
)
from countermark.checkpoints.dtypes import DTYPES, decode_values
from countermark.checkpoints.safe_unpickle import (
    PersistentReference,
    PickledCall,
    PickledName,
    parse_pickle,
)
from countermark.checkpoints.torch_file import LARGEST_PICKLE, ZIP_ERRORS, require_directory_at_end
from countermark.errors import SuspectError, make_printable

# An object of a pickle may be referred to many times, so a small file can describe a tree of
# exponential size. These bounds end the walk through the tree.
_MOST_TENSORS, _MOST_PARTS, _DEEPEST = 100_000, 1 << 20, 64
_MOST_LETTERS = 1 << 27  # letters of all names together; a name is as long as its path
_REBUILD = "torch._utils._rebuild_tensor_v2"
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class _ScriptTensor:
    """The location of a tensor: the archive entry of its storage, and its layout in there."""

    entry: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_torchscript_archive(path: Path) -> bool:
    """Return true if a zip file is an archive as `torch.jit.save` writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except ZIP_ERRORS:
        return False


class TorchScriptWeights(Weights):
    """A file written by `torch.jit.save`, with tensors named as in a state dict.

    Constants, which a frozen module has in place of parameters, are named "constants.0" and so on.

    Raises:
        SuspectError: the archive or a pickle in it is damaged or ambiguous, or holds no tensors.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._identity = path, make_file_identity(path.stat())
        try:
            require_directory_at_end(path)
            self._archive = zipfile.ZipFile(path)
        except ZIP_ERRORS as error:
            raise self._make_refusal(f"its zip directory cannot be read ({error})") from None
        try:
            self._tensors = dict(self._find_tensors())
            if not self._tensors:
                raise ValueError("it holds no tensors")
        except ValueError as error:
            self.close()
            raise self._make_refusal(make_printable(str(error), 200)) from None
        self.tensors = {n: TensorInfo(each.shape, each.dtype) for n, each in self._tensors.items()}

    def _find_tensors(self) -> Iterator[tuple[str, _ScriptTensor]]:
        """Yield every tensor of the archive with its name: attributes of modules, then constants.

        Raises:
            ValueError: the archive is ambiguous, or a pickle cannot be parsed.
        """
        if not (entries := self._archive.infolist()):
            raise ValueError("it is empty")
        # torch compares entry names without regard to case.
        names = [entry.filename.lower() for entry in entries]
        if len(set(names)) != len(names):
            raise ValueError("two of its entries have one name")
        folder = entries[0].filename.partition("/")[0]
        order = f"{folder}/byteorder"
        if order in self._archive.namelist() and self._read_small_entry(order) != b"little":
            raise ValueError("its bytes are not in little-endian order")
        # Storages are read as little-endian below, so an archive of another order is refused above.
        root = parse_pickle(self._read_small_entry(f"{folder}/data.pkl"))
        if not isinstance(root, PickledCall):
            raise ValueError("its data.pkl holds no module")
        constants = parse_pickle(self._read_small_entry(f"{folder}/constants.pkl"))
        parts = dict(enumerate(constants)) if isinstance(constants, tuple) else {}
        yield from _walk_modules(root.state, "", f"{folder}/data")
        yield from _walk_modules(parts, "constants.", f"{folder}/constants")

    def _read_small_entry(self, name: str) -> bytes:
        """Read an archive entry that is small enough to be a pickle."""
        return self._read_stored_entry(name, LARGEST_PICKLE)

    def _read_stored_entry(self, name: str, most: int) -> bytes:
        """Read the bytes of an uncompressed archive entry.

        Args:
            name: of the entry.
            most: largest allowed size in bytes.

        Raises:
            ValueError: there is no such entry, or it is larger, compressed, encrypted or damaged.
        """
        try:
            entry = self._archive.getinfo(name)
        except KeyError:
            raise ValueError(f"it has no entry {name}") from None
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
            raise ValueError(f"{name} is compressed, or has {entry.file_size:,} bytes")
        try:
            return self._archive.read(entry)
        except ZIP_ERRORS as error:
            raise ValueError(f"its entry {name} cannot be read ({error})") from None

    def _read_values(self, name: str) -> NDArray[Any]:
        """Read the values of a tensor in its own shape and stored dtype, bfloat16 as uint16.

        Raises:
            SuspectError: the storage cannot be read, or is smaller than the tensor claims.
        """
        tensor, total = self._tensors[name], self._path.stat().st_size
        try:
            stored = np.frombuffer(
                self._read_stored_entry(tensor.entry, total), DTYPES[tensor.dtype]
            )
        except ValueError as error:
            why = make_printable(f"{name} cannot be read ({error})", 300)
            raise self._make_refusal(why) from None
        steps = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((size - 1) * step for size, step in steps)
        count: int = prod(tensor.shape)
        if count > len(stored) or (count and last >= len(stored)):
            raise self._make_refusal(
                f"{make_printable(name, 200)} claims more values than are there"
            )
        # Only after both checks above is it safe to view the storage with the thief's strides: the
        # last value lies inside, and repeated values (strides of 0) cannot exceed the storage.
        strides = [step * stored.itemsize for step in tensor.strides]
        return as_strided(stored[tensor.offset :], tensor.shape, strides, writeable=False).copy()

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor and record the digest of its stored bytes."""
        raw = self._read_values(name)
        self.digests[name] = hashlib.sha256(raw.tobytes()).hexdigest()
        return decode_values(raw.tobytes(), self._tensors[name].dtype).reshape(raw.shape)

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, in C order."""
        yield self._read_values(name).tobytes()

    def compute_file_digest(self) -> str:
        """Compute the SHA-256 of the whole file, in hexadecimal."""
        return hash_unchanged_file(self._path, self._identity)

    def close(self) -> None:
        """Close the archive."""
        self._archive.close()

    def _make_refusal(self, why: str) -> SuspectError:
        """Make the error that refuses this file, with a reason."""
        return SuspectError(
            f"{self.name} is refused: {why}; expected a TorchScript archive as torch.jit.save "
            "writes it, or the weights as .safetensors"
        )


def _walk_modules(parts: Any, prefix: str, folder: str) -> Iterator[tuple[str, _ScriptTensor]]:
    """Yield every tensor among the attributes of a module and its submodules, by its path.

    Args:
        parts: attributes by name.
        prefix: of the names.
        folder: of the archive, in which the storages lie.

    Raises:
        ValueError: there are too many attributes, or they are nested too deeply.
    """
    left, steps, found, letters = [(prefix, parts, 0)], 0, 0, 0
    while left:
        prefix, parts, depth = left.pop()
        for name, part in parts.items():
            steps += 1
            letters += len(prefix) + len(str(name))
            if (
                steps > _MOST_PARTS
                or depth > _DEEPEST
                or found >= _MOST_TENSORS
                or (letters > _MOST_LETTERS)
            ):
                raise ValueError("its modules are too many, or nested too deeply")
            if (tensor := _parse_tensor(part, folder)) is not None:
                found += 1
                yield f"{prefix}{name}", tensor
            elif isinstance(part, PickledCall) and part.state:
                left.append((f"{prefix}{name}.", part.state, depth + 1))


def _parse_tensor(part: Any, folder: str) -> _ScriptTensor | None:
    """Parse a dense tensor of real numbers; return None for any other value.

    Raises:
        ValueError: the sizes of the tensor are no numbers, or do not fit each other.
    """
    # torch saves a tensor as a call of `_rebuild_tensor_v2(storage, offset, shape, strides, ...)`
    # with the storage as a persistent id ("storage", type, key, device, count).
    if not isinstance(part, PickledCall) or part.by != PickledName(_REBUILD) or len(part.given) < 4:
        return None
    storage, offset, shape, strides = part.given[:4]
    identity = storage.identity if isinstance(storage, PersistentReference) else None
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        return None
    kind, key = identity[1:3]
    word = (
        kind.name.removeprefix("torch.").removesuffix("Storage") if _is_pickled_name(kind) else ""
    )
    if word not in _STORAGES or not isinstance(key, str):
        return None
    if not _is_size_tuple(shape) or not _is_size_tuple(strides) or not _is_size_tuple((offset,)):
        raise ValueError("a tensor has sizes that are no numbers")
    if len(shape) != len(strides) or len(shape) > 32:
        raise ValueError("a tensor has sizes that do not fit each other")
    return _ScriptTensor(f"{folder}/{key}", _STORAGES[word], offset, shape, strides)


def _is_pickled_name(value: Any) -> bool:
    """Return true if a value is the name of a class or function."""
    return isinstance(value, PickledName)


def _is_size_tuple(values: Any) -> bool:
    """Return true if a value is a tuple of sizes: integers from 0 to below 2^62."""
    # Python integers have no limit: the bound keeps products of a size and a stride small.
    return isinstance(values, tuple) and all(
        type(each) is int and 0 <= each < 1 << 62 for each in values
    )
