"""Read a folder that torch.distributed.checkpoint has written, from its `.metadata` and its files.

`.metadata` is a pickle: shape and dtype of each tensor, and the chunks that it was cut into. A chunk
is a file of `torch.save` with one tensor, at a position of a `.distcp` file. No pickle is loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from countermark._internal.files import read_regular
from countermark.checkpoints.base import TensorInfo, Weights
from countermark.checkpoints.dtypes import DTYPES, decode_values
from countermark.checkpoints.pickled_tensors import (
    TORCH_DTYPES,
    StoredTensor,
    describe_pickle,
    is_optimizer_key,
    is_size_tuple,
    parse_tensor,
)
from countermark.checkpoints.safe_unpickle import PickledCall, PickledName, parse_pickle
from countermark.checkpoints.torch_file import ITEM_SIZES, LARGEST_PICKLE, read_stored
from countermark.checkpoints.zip_archive import StoredArchive
from countermark.errors import SuspectError, make_printable

_MOST_FILES = 4096  # each stays open, and a process may open only so many
_MOST_CHUNKS = 1 << 20
# A plain file name: the metadata is hostile input, and a path could lead to any file of the machine.
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.distcp")


@dataclass(frozen=True)
class TensorChunk:
    """A block of a tensor, and where it lies.

    Attributes:
        offsets, sizes: position and shape of the block in the tensor.
        file: name of the file.
        start, length: first byte in the file, and byte count.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class DistributedWeights(Weights):
    """A checkpoint of torch.distributed. Opening it reads only the metadata.

    Raises:
        SuspectError: the metadata is damaged or names files outside its folder, or a file is
            missing.
    """

    def __init__(self, metadata: Path) -> None:
        super().__init__(str(metadata.parent))
        self._folder = metadata.parent
        try:
            content = read_regular(metadata, LARGEST_PICKLE)
            found = dict(_parse_metadata(parse_pickle(content)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._make_refusal(f"its {metadata.name} is damaged ({error})") from None
        self.digests[metadata.name] = hashlib.sha256(content).hexdigest()
        self.tensors = {name: info for name, (info, _) in found.items()}
        self._chunks = {name: chunks for name, (_, chunks) in found.items()}
        self._files: dict[str, IO[bytes]] = {}
        with ExitStack() as opened:
            for file in sorted({each.file for chunks in self._chunks.values() for each in chunks}):
                self._files[file] = opened.enter_context(self._open_file(file))
            self._open = opened.pop_all()
        self._size = sum(os.fstat(each.fileno()).st_size for each in self._files.values())

    def _open_file(self, file: str) -> IO[bytes]:
        """Open a file of the folder; raise `SuspectError` if it cannot be read."""
        path = self._folder / file
        if not _PLAIN.fullmatch(file):
            raise self._make_refusal(f"{file!r} is no name of a file in it")
        if len(self._files) >= _MOST_FILES:
            raise self._make_refusal(f"it has more than {_MOST_FILES:,} files")
        # Opening a named pipe would wait for a writer, perhaps forever.
        if not path.is_file():
            raise self._make_refusal(f"its {file} is missing; obtain it again")
        try:
            return path.open("rb")
        except OSError as error:
            raise self._make_refusal(f"its {file} cannot be read ({error.strerror})") from None

    def _read_raw(self, name: str) -> NDArray[Any]:
        """Read the bytes of a tensor, each value as bytes of its size, in the tensor's own shape.

        Raises:
            SuspectError: a chunk cannot be read, or is another one than the metadata says.
        """
        info = self.tensors[name]
        # Chunks may claim the same bytes of a file, and so any amount of memory.
        if prod(info.shape) * ITEM_SIZES[info.dtype] > self._size:
            raise self._make_refusal(
                f"{name} claims {prod(info.shape):,} values, more than are there"
            )
        values = np.zeros(info.shape, f"V{ITEM_SIZES[info.dtype]}")
        for each in self._chunks[name]:
            block = tuple(slice(a, a + n) for a, n in zip(each.offsets, each.sizes, strict=True))
            try:
                raw, tensor = _read_lone_tensor(self._files[each.file], each.start, each.length)
                if (tensor.shape, tensor.dtype) != (each.sizes, info.dtype):
                    raise ValueError(f"{each.file} holds a chunk of {list(tensor.shape)} in place")
            except ValueError as error:
                raise self._make_refusal(f"{name} cannot be read ({error})") from None
            values[block] = np.frombuffer(raw, values.dtype).reshape(each.sizes)
        return values

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor, put together from its chunks, and record the digest of its bytes."""
        info, raw = self.tensors[name], self._read_raw(name).tobytes()
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        if info.dtype not in DTYPES:
            raise SuspectError(
                f"{self.name}: {make_printable(name, 200)} is a {info.dtype} tensor, which cannot "
                f"be read yet: expected dense real weights of {', '.join(DTYPES)}"
            )
        return decode_values(raw, info.dtype).reshape(info.shape)

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, in C order."""
        yield self._read_raw(name).tobytes()

    def compute_file_digest(self) -> str:
        """Compute the SHA-256 of the output of `sha256sum *.distcp`, in hexadecimal."""
        lines = []
        for name, file in self._files.items():
            file.seek(0)
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")  # type: ignore[arg-type]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def close(self) -> None:
        """Close all files."""
        self._open.close()

    def _make_refusal(self, why: str) -> SuspectError:
        """Make the error that refuses this folder, with a reason."""
        return SuspectError(
            f"{self.name} is refused: {make_printable(why, 300)}; expected a folder that "
            "torch.distributed.checkpoint has written, whole"
        )


def _read_lone_tensor(file: IO[bytes], start: int, size: int) -> tuple[bytes, StoredTensor]:
    """Read the one tensor that a file of `torch.save` in a part of an open file holds.

    Returns: its bytes in C order, and its layout.

    Raises:
        ValueError: the part is damaged, or holds something else than a tensor.
    """
    archive = StoredArchive(file, start, size)
    root = parse_pickle(archive.read_entry(f"{archive.folder}/data.pkl", LARGEST_PICKLE))
    if (tensor := parse_tensor(root)) is None or tensor.quantiser is not None:
        raise ValueError(f"it holds a {describe_pickle(root)} in place of a tensor")
    place = archive.locate(f"{archive.folder}/data/{tensor.storage}")
    return read_stored(file, place, tensor), tensor


def _parse_metadata(root: Any) -> Iterator[tuple[str, tuple[TensorInfo, list[TensorChunk]]]]:
    """Yield every tensor of parsed metadata with its chunks; states of optimizers are left out.

    Raises:
        ValueError: a tensor and its chunks do not fit each other.
        TypeError, KeyError, AttributeError: the metadata has another form.
    """
    stored: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, place in root.state["storage_data"].items():
        if isinstance(index, PickledCall) and isinstance(index.state, dict):
            name, offset = index.state.get("fqn"), _parse_size(index.state.get("offset"))
            # Hashing or printing anything else may take forever: tuples may be nested without end.
            if isinstance(name, str) and isinstance(place.state["relative_path"], str):
                stored[name, offset or ()] = place.state
    paths, count = root.state.get("planner_data"), 0
    for name, about in root.state["state_dict_metadata"].items():
        path = paths.get(name) if isinstance(paths, dict) else None
        # All parts of the path but the last are keys of mappings.
        above = path[:-1] if isinstance(path, tuple) and path else name.split(".")[:1]
        chunks = about.state.get("chunks") if isinstance(about.state, dict) else None
        if chunks is None or any(map(is_optimizer_key, above)):
            continue
        count += len(chunks)
        if count > _MOST_CHUNKS:
            raise ValueError("its tensors have too many chunks")
        info = _parse_info(name, about.state)
        yield name, (info, _parse_chunks(name, info, chunks, stored))


def _parse_info(name: str, about: dict[str, Any]) -> TensorInfo:
    """Parse shape and dtype of a tensor.

    Raises:
        ValueError: the shape holds no numbers, or the dtype is not known.
    """
    shape, properties = _parse_size(about["size"]), about["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    word = TORCH_DTYPES.get(dtype.name.removeprefix("torch."))
    if shape is None or word is None:
        raise ValueError(f"{name} has a shape or a dtype that is not known")
    name.encode()  # half a surrogate pair is no text
    return TensorInfo(shape, word)


def _parse_chunks(name: str, info: TensorInfo, chunks: list[Any], stored: Any) -> list[TensorChunk]:
    """Parse the chunks of a tensor.

    Raises:
        ValueError: the chunks do not fill the tensor, or claim more values than they have bytes.
    """
    found = []
    for each in chunks:
        offsets, sizes = _parse_size(each.state["offsets"]), _parse_size(each.state["sizes"])
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(info.shape):
            raise ValueError(f"{name} has a chunk without sizes")
        if any(a + n > whole for a, n, whole in zip(offsets, sizes, info.shape, strict=True)):
            raise ValueError(f"{name} has a chunk outside")
        place = stored[name, offsets]
        start, length = place["offset"], place["length"]
        if not is_size_tuple((start, length)) or place.get("transform_descriptors"):
            raise ValueError(f"{name} has a chunk that is compressed or has no place")
        if prod(sizes) * ITEM_SIZES[info.dtype] > length:
            raise ValueError(f"{name} claims {prod(sizes):,} values, more than are there")
        found.append(TensorChunk(offsets, sizes, place["relative_path"], start, length))
    if sum(prod(each.sizes) for each in found) != prod(info.shape):
        raise ValueError(f"the chunks of {name} do not fill it")
    return found


def _parse_size(value: Any) -> tuple[int, ...] | None:
    """Parse a `torch.Size`; return None for any other value."""
    if not isinstance(value, PickledCall) or value.by != PickledName("torch.Size"):
        return None
    return value.given[0] if len(value.given) == 1 and is_size_tuple(value.given[0]) else None
