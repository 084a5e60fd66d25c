"""Read the files of torch as a suspect: `torch.save`, `torch.jit.save` and `torch.export.save`.

No pickle in them is loaded: `safe_unpickle` parses it into plain values, so torch is not needed, and
code in an archive is not looked at. A tensor is a layout in a storage, and a storage is a range of
bytes of the file.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from countermark._internal.files import parse_json
from countermark.checkpoints.base import (
    OpenFileWeights,
    TensorInfo,
    hash_unchanged_file,
    make_file_identity,
)
from countermark.checkpoints.dtypes import DTYPES, decode_values
from countermark.checkpoints.pickled_tensors import (
    FoundTensors,
    Quantiser,
    StoredTensor,
    describe_pickle,
    find_tensors,
    is_size_tuple,
    parse_storage_dtype,
)
from countermark.checkpoints.safe_unpickle import PersistentReference, PickledCall, parse_pickle
from countermark.checkpoints.zip_archive import FilePart, StoredArchive
from countermark.errors import SuspectError, make_printable

# Text takes up to four times its bytes of memory when it is decoded.
LARGEST_PICKLE = 32 << 20  # bytes of tensor names and shapes
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8, "C128": 16, "F8_E4M3": 1, "F8_E5M2": 1,
    "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
"""Bytes of a value of each dtype, also of those that cannot be read as numbers."""

# The old format of `torch.save` begins with these two numbers, each a pickle of its own.
_OLD_MAGIC, _OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Numbers of dtypes in an exported program.
_EXPORTED_DTYPES = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 10: "C64",
    11: "C128", 12: "BOOL", 13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2",
    31: "F8_E4M3FNUZ", 32: "F8_E5M2FNUZ", 33: "F8_E8M0", 34: "U32", 35: "U64",
}  # fmt: skip

_CONFIGS = ("_weights_config.json", "_constants_config.json")
_OLD_PROGRAM = "serialized_state_dict.pt"

Locate = Callable[[str], tuple[int, int]]
"""A function from the key of a storage to the position of its first byte and its byte count."""


class TorchWeights(OpenFileWeights):
    """A file of torch: a state dict or anything else that holds tensors, a script, or a program.

    Tensors have the names of the state dict; nested mappings put their path before them. Beside a
    state dict that stands under "state_dict" or "model", other tensors are views. Constants, which
    a frozen script has in place of parameters, are named "constants.0" and so on.

    Raises:
        SuspectError: the file is damaged or ambiguous, or holds no tensors.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path
        self._identity = make_file_identity(os.fstat(self._file.fileno()))
        try:
            found, self._locate = self._find_tensors()
        except ValueError as error:
            self.close()
            raise self._make_refusal(make_printable(str(error), 300)) from None
        self._tensors, self.views = found.tensors, found.others
        self.form = "a program of torch.export" if found.is_program else ""
        self.tensors = {name: _describe_tensor(each) for name, each in self._tensors.items()}

    def _find_tensors(self) -> tuple[FoundTensors, Locate]:
        """Find all tensors of the file, and how to locate their storages.

        Raises:
            ValueError: the file is damaged or ambiguous, or holds no tensors.
        """
        size = self._identity[2]
        if FilePart(self._file, 0, 2).read() != b"PK":
            return find_in_old_file(self._file, size)
        return find_in_archive(self._file, 0, size)

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor and record the digest of its stored bytes.

        Raises:
            SuspectError: its storage cannot be read, or it is of a dtype without real numbers.
        """
        tensor, raw = self._tensors[name], self._read_raw(name)
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        if tensor.dtype not in DTYPES:
            raise SuspectError(
                f"{self.name}: {make_printable(name, 200)} is a {tensor.dtype} tensor, which cannot "
                f"be read yet: expected dense real weights of {', '.join(DTYPES)}"
            )
        values = decode_values(raw, tensor.dtype).reshape(tensor.shape)
        try:
            rule = tensor.quantiser
            return values if rule is None else self._dequantise(values, rule)
        except (ValueError, OverflowError) as error:
            raise self._make_refusal(f"{make_printable(name, 200)}: {error}") from None

    def _dequantise(self, codes: NDArray[Any], rule: Quantiser) -> NDArray[Any]:
        """Return the numbers that the codes of a quantised tensor stand for.

        Raises:
            ValueError, OverflowError: scales or zero points do not fit the codes, or cannot be read.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # `read` refuses infinities
            scale, zero = (
                self._read_numbers(each, codes, rule) for each in (rule.scale, rule.zero)
            )
            found: NDArray[Any] = (codes.astype(np.float32) - zero) * scale
        return found

    def _read_numbers(
        self, value: float | StoredTensor, codes: NDArray[Any], rule: Quantiser
    ) -> NDArray[np.float32]:
        """Read a number for all codes, or a tensor with one for each step along an axis."""
        sizes = [1] * codes.ndim
        if not isinstance(value, StoredTensor):
            return np.full(sizes, value, np.float32)
        if value.dtype not in DTYPES:
            raise ValueError(f"its scales are {value.dtype}")
        sizes[rule.axis] = codes.shape[rule.axis]
        raw = read_stored(self._file, self._locate(value.storage), value)
        return decode_values(raw, value.dtype).astype(np.float32).reshape(sizes)

    def _read_raw(self, name: str) -> bytes:
        """Read the bytes of a tensor; raise `SuspectError` if its storage does not hold them."""
        tensor = self._tensors[name]
        try:
            return read_stored(self._file, self._locate(tensor.storage), tensor)
        except ValueError as error:
            raise self._make_refusal(make_printable(f"{name} {error}", 300)) from None

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, in C order."""
        yield self._read_raw(name)

    def compute_file_digest(self) -> str:
        """Compute the SHA-256 of the whole file, in hexadecimal."""
        return hash_unchanged_file(self._path, self._identity)

    def _make_refusal(self, why: str) -> SuspectError:
        """Make the error that refuses this file, with a reason."""
        return SuspectError(
            f"{self.name} is refused: {why}; expected a state dict written by torch.save, or the "
            "weights as .safetensors"
        )


def _describe_tensor(tensor: StoredTensor) -> TensorInfo:
    """Return shape and dtype of a tensor; codes with a quantiser have no word in safetensors."""
    word = tensor.dtype if tensor.quantiser is None else f"quantised {tensor.dtype.lower()}"
    return TensorInfo(tensor.shape, word)


def read_stored(file: IO[bytes], place: tuple[int, int], tensor: StoredTensor) -> bytes:
    """Read the bytes of a tensor in C order.

    Args:
        file: the open file.
        place: position of the first byte of its storage, and its byte count.
        tensor: its layout in the storage.

    Raises:
        ValueError: the storage does not hold the values.
    """
    (start, size), item = place, ITEM_SIZES[tensor.dtype]
    count = prod(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * step for size, step in steps)
    if count > size // item or (count and last >= size // item):
        raise ValueError(f"claims {count:,} values, more than are there")
    if not count:
        return b""
    raw = FilePart(file, start + tensor.offset * item, (last + 1 - tensor.offset) * item).read()
    if len(raw) != (last + 1 - tensor.offset) * item:
        raise ValueError(f"ends after {len(raw):,} bytes")
    # Only after the checks above is it safe to view the storage with the thief's strides: the last
    # value lies inside, and repeated values (strides of 0) cannot exceed the storage.
    strides = [step * item for step in tensor.strides]
    values = as_strided(np.frombuffer(raw, f"V{item}"), tensor.shape, strides, writeable=False)
    return raw if values.flags.c_contiguous else values.tobytes()


def find_in_archive(
    file: IO[bytes], start: int, size: int, *, is_inner: bool = False
) -> tuple[FoundTensors, Locate]:
    """Find the tensors in a zip archive of torch, and how to locate their storages.

    Args:
        file: the open file.
        start: position of the archive's first byte.
        size: number of the archive's bytes.
        is_inner: whether the archive lies in another.

    Raises:
        ValueError: the archive is of another kind, or damaged, or holds no tensors.
    """
    archive = StoredArchive(file, start, size)
    # A program of torch before 2.8 holds its state dict as an archive of its own.
    inner = [name for name in archive.names if name.endswith(_OLD_PROGRAM)]
    if inner and not is_inner:
        found, locate = find_in_archive(file, *archive.locate(inner[0]), is_inner=True)
        return replace(found, is_program=True), locate
    return _find_in_entries(archive), archive.locate


def _find_in_entries(archive: StoredArchive) -> FoundTensors:
    """Find the tensors in the entries of an archive.

    Raises:
        ValueError: the archive is of another kind, or damaged, or holds no tensors.
    """
    folder = archive.folder
    order = f"{folder}/byteorder"
    if archive.has_entry(order) and archive.read_entry(order, 100) != b"little":
        raise ValueError("its bytes are not in little-endian order")
    configs = [name for name in archive.names if name.endswith(_CONFIGS)]
    if configs:
        return _find_in_program(archive, configs)
    if not archive.has_entry(f"{folder}/data.pkl"):
        raise ValueError("it is a zip archive without the data.pkl of torch.save")
    root = parse_pickle(archive.read_entry(f"{folder}/data.pkl", LARGEST_PICKLE))
    if not archive.has_entry(f"{folder}/constants.pkl"):
        return _require_tensors(_move_storages(find_tensors(root), f"{folder}/data"), root)
    if not isinstance(root, PickledCall):
        raise ValueError("it is a TorchScript archive, and its data.pkl holds no module")
    constants = parse_pickle(archive.read_entry(f"{folder}/constants.pkl", LARGEST_PICKLE))
    parts = {"constants": constants} if isinstance(constants, tuple) else {}
    tensors = _move_storages(find_tensors(parts), f"{folder}/constants").tensors
    tensors |= _move_storages(find_tensors(root), f"{folder}/data").tensors
    return _require_tensors(FoundTensors(tensors), root)


def _move_storages(found: FoundTensors, folder: str) -> FoundTensors:
    """Name the storages of tensors by the entries of the archive's folder that hold them."""

    def move(value: Any) -> Any:
        """Return a tensor with the name of its entry; any other value unchanged."""
        return replace(value, storage=f"{folder}/{value.storage}") if isinstance(
            value, StoredTensor
        ) else value  # fmt: skip

    moved = {}
    for name, tensor in found.tensors.items():
        each = move(tensor)
        if (rule := each.quantiser) is not None:
            each = replace(
                each, quantiser=replace(rule, scale=move(rule.scale), zero=move(rule.zero))
            )
        moved[name] = each
    return replace(found, tensors=moved)


def _require_tensors(found: FoundTensors, root: Any) -> FoundTensors:
    """Return what was found; raise `ValueError` if nothing was."""
    if not found.tensors:
        raise ValueError(f"it holds a {describe_pickle(root)}, without tensors that have names")
    return found


# --- programs of torch.export


def _find_in_program(archive: StoredArchive, configs: list[str]) -> FoundTensors:
    """Find the tensors of an exported program.

    Raises:
        ValueError: a list of tensors is damaged, or there are none.
    """
    found: dict[str, StoredTensor] = {}
    for config in configs:
        try:
            listed = parse_json(archive.read_entry(config, LARGEST_PICKLE))["config"]
            for name, about in listed.items():
                # A subclass of tensor is stored as a pickle of its own.
                if about.get("tensor_meta") is not None and not about["use_pickle"]:
                    folder = config.rpartition("/")[0]
                    found.setdefault(name, _parse_program_tensor(about, folder))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{config} is no list of tensors ({error})") from None
    if not found:
        raise ValueError("it is a program of torch.export without tensors")
    return FoundTensors(found, is_program=True)


def _parse_program_tensor(about: Any, folder: str) -> StoredTensor:
    """Parse the entry of one tensor of an exported program.

    Raises:
        ValueError: the dtype is not known, or sizes are no numbers.
    """
    told = about["tensor_meta"]
    shape = tuple(each["as_int"] for each in told["sizes"])
    strides = tuple(each["as_int"] for each in told["strides"])
    offset = told["storage_offset"]["as_int"]
    fits = is_size_tuple(shape) and is_size_tuple(strides) and is_size_tuple((offset,))
    if not fits or len(shape) != len(strides):
        raise ValueError("a tensor has sizes that are no numbers, or do not fit each other")
    dtype = _EXPORTED_DTYPES.get(told["dtype"])
    if dtype is None:
        raise ValueError("a tensor has a dtype that is not known")
    return StoredTensor(f"{folder}/{about['path_name']}", dtype, offset, shape, strides)


# --- files of torch.save before torch 1.6


def find_in_old_file(file: IO[bytes], size: int) -> tuple[FoundTensors, Locate]:
    """Find the tensors in a file of the format of `torch.save` before torch 1.6.

    Five pickles (a magic number, a version, facts about the machine, the saved object, the keys of
    its storages) stand before the storages, each with its count of values in front.

    Raises:
        ValueError: the file has another format, or is damaged, or holds no tensors.
    """
    stream = io.BytesIO(FilePart(file, 0, min(size, LARGEST_PICKLE)).read())
    if parse_pickle(stream) != _OLD_MAGIC:
        raise ValueError("it is a pickle that torch.save has not written")
    version, machine = parse_pickle(stream), parse_pickle(stream)
    if version != _OLD_PROTOCOL or not isinstance(machine, dict):
        raise ValueError("it has a version that is not known")
    if machine.get("little_endian") is not True:
        raise ValueError("its bytes are not in little-endian order")
    references: list[PersistentReference] = []
    root = parse_pickle(stream, references)
    keys = parse_pickle(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        raise ValueError("it lists no storages")
    storages, items = dict[str, tuple[int, int]](), _list_item_sizes(references)
    at = stream.tell()
    for key in map(str, keys):
        count = int.from_bytes(FilePart(file, at, 8).read(), "little")
        length = count * items.get(key, size)
        if length > size - at - 8:
            raise ValueError(f"its storage {key} claims more bytes than are there")
        storages[key] = at + 8, length
        at += 8 + length

    def locate(key: str) -> tuple[int, int]:
        """Return the place of a storage in the file."""
        if key not in storages:
            raise ValueError(f"has no storage {key}")
        return storages[key]

    return _require_tensors(find_tensors(root), root), locate


def _list_item_sizes(references: list[PersistentReference]) -> dict[str, int]:
    """Return the bytes of a value of each storage that a pickle refers to, by its key."""
    found: dict[str, int] = {}
    for each in references:
        told = each.identity
        if isinstance(told, tuple) and len(told) > 2 and isinstance(told[2], str | int):
            dtype = parse_storage_dtype(told[1])
            if dtype is not None:
                found[str(told[2])] = ITEM_SIZES[dtype]
    return found
