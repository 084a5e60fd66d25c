"""Read a checkpoint of several files under an index, as Hugging Face writes it.

The files are safetensors files, or in older checkpoints files of `torch.save`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from countermark._internal.files import parse_json, read_regular
from countermark.checkpoints.base import IN_PART, Array, Weights
from countermark.checkpoints.format_names import find_format
from countermark.checkpoints.safetensors_file import SafetensorsWeights
from countermark.checkpoints.torch_file import TorchWeights
from countermark.errors import SuspectError, make_printable

INDEXES = (".safetensors.index.json", ".bin.index.json")
METADATA = ".metadata"
"""Name of the file that lists the tensors of a torch.distributed checkpoint."""

# What a folder may hold, the form that is preferred first.
_CHECKPOINTS = (
    f"*{INDEXES[0]}", "*.safetensors", f"*{INDEXES[1]}", "*model.bin", METADATA, "*.gguf", "*.onnx",
)  # fmt: skip
_LARGEST_INDEX, _MOST_SHARDS = 100_000_000, 4096
# A plain file name: the index is hostile input, and a path could lead to any file of the machine.
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.(safetensors|bin)")


class ShardedWeights(Weights):
    """All tensors of a sharded checkpoint by name. Opening it reads only the header of each file.

    A tensor that the index does not name is found under the name that it has in its file.

    Attributes:
        shards: the open files by name.

    Raises:
        SuspectError: the index is invalid or names files outside its folder, or a file is missing
            or damaged.
    """

    def __init__(self, index: Path) -> None:
        super().__init__(str(index.parent))
        named, digest = _read_weight_map(index)
        self.shards: dict[str, Weights] = {}
        # The stack closes the files that are open already if a later one is damaged.
        with ExitStack() as opened:
            for file in sorted(set(named.values())):
                self.shards[file] = opened.enter_context(_open_shard(index.parent / file, index))
            self._open = opened.pop_all()
        self._home = {
            name: file for name, file in named.items() if name in self.shards[file].tensors
        }
        for file, shard in self.shards.items():
            for name in shard.tensors:
                self._home.setdefault(name, file)
        self.tensors = {n: self.shards[file].tensors[n] for n, file in self._home.items()}
        self.views = frozenset(n for n, file in self._home.items() if n in self.shards[file].views)
        self.notes = tuple(_compare_index(index.name, named, self._home))
        self.digests[index.name] = digest
        self.digests |= {
            f"{file} {name}": digest
            for file, shard in self.shards.items()
            for name, digest in shard.digests.items()
        }

    def locate_tensor(self, name: str) -> tuple[str, int, int]:
        """Return the file that holds a tensor, its first byte there, and its byte count.

        Raises:
            SuspectError: the files are no safetensors files.
        """
        file = self._home[name]
        shard = self.shards[file]
        if not isinstance(shard, SafetensorsWeights):
            raise SuspectError(f"{shard.name} is a torch file: expected a .safetensors file")
        return file, *shard.locate_tensor(name)

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor from the file that holds it."""
        shard = self.shards[self._home[name]]
        values = shard._load(name)
        self.digests[name] = shard.digests[name]
        return values

    def read_part(self, name: str, start: int, count: int) -> Array:
        """Read only these bytes of the file that holds the tensor."""
        values = self.shards[self._home[name]].read_part(name, start, count)
        self._take_digests(name)
        return values

    def read_bytes(self, name: str, start: int, count: int) -> bytes:
        """Read only these bytes of the file that holds the tensor."""
        raw = self.shards[self._home[name]].read_bytes(name, start, count)
        self._take_digests(name)
        return raw

    def _take_digests(self, name: str) -> None:
        """Take over the digests of a tensor, or of a part of it, from the file that holds it."""
        found, names = self.shards[self._home[name]].digests, (name, f"{name}{IN_PART}")
        self.digests |= {each: found[each] for each in names if each in found}

    def read_parts(self, name: str, starts: Sequence[int], count: int) -> list[Array]:
        """Read only the bytes of these parts."""
        return [self.read_part(name, start, count) for start in starts]

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Return the bytes of one tensor, piece by piece, as its file stores them."""
        return self.shards[self._home[name]].read_pieces(name)

    def compute_file_digest(self) -> str:
        """Compute the SHA-256 of the output of `sha256sum` for all files, in hexadecimal."""
        # The shards are sorted by name, as the shell lists them, so anyone can check with
        # sha256sum.
        lines = "".join(
            f"{each.compute_file_digest()}  {file}\n" for file, each in self.shards.items()
        )
        return hashlib.sha256(lines.encode()).hexdigest()

    def close(self) -> None:
        """Close all files."""
        self._open.close()


def find_checkpoint(folder: Path) -> Path:
    """Find the checkpoint in a folder: an index of shards, or one file.

    Raises:
        SuspectError: the folder holds no checkpoint or several, or it is a key: a secret is never
            read as a model.
    """
    if (folder / "key.json").exists():
        raise SuspectError(
            f"{folder} cannot be read as a model, it is a key: expected a checkpoint"
        )
    for pattern in _CHECKPOINTS:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise SuspectError(
                f"{folder} holds {len(found)} of {pattern}: expected one checkpoint; name the file"
            )
    if (other := find_format(folder)) is not None:
        raise SuspectError(f"{folder} is {other}")
    raise SuspectError(
        f"{folder} holds no checkpoint: expected a .safetensors file or pytorch_model.bin, several "
        f"with their {INDEXES[0].removeprefix('.')}, or the {METADATA} of torch.distributed"
    )


def _compare_index(index: str, named: Mapping[str, str], home: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each way in which an index and its files name different tensors."""
    for more, what in (
        (named.keys() - home.keys(), "names tensors that its files do not hold"),
        (home.keys() - named.keys(), "does not name tensors that its files hold"),
    ):
        if more:
            first = make_printable(min(more), 200)
            yield f"{index} {what}: {len(more)}, of which the first is {first}"


def _read_weight_map(index: Path) -> tuple[Mapping[str, str], str]:
    """Read the map from tensor to file, and compute the SHA-256 of the index.

    Raises:
        SuspectError: the index is invalid, or names a file that is not beside it.
    """
    try:
        content = read_regular(index, _LARGEST_INDEX)
        found = parse_json(content)["weight_map"]
        if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
            raise ValueError("weight_map is no map from tensors to files")
    except (ValueError, TypeError, KeyError) as error:
        raise _make_index_refusal(index, str(error)) from None
    files = set(found.values())
    if strange := sorted(file for file in files if not _PLAIN.fullmatch(file)):
        raise _make_index_refusal(index, f"{strange[0]!r} is no name of a file beside it")
    # Each file stays open, and a process may open only so many.
    if not 1 <= len(files) <= _MOST_SHARDS:
        raise _make_index_refusal(index, f"it names {len(files)} files")
    return found, hashlib.sha256(content).hexdigest()


def _open_shard(path: Path, index: Path) -> Weights:
    """Open one file of the checkpoint; raise `SuspectError` if it cannot be read."""
    try:
        # Opening a named pipe would wait for a writer, perhaps forever.
        if path.exists() and not path.is_file():
            raise OSError(0, "no regular file")
        return (TorchWeights if path.suffix == ".bin" else SafetensorsWeights)(path)
    except OSError as error:
        raise SuspectError(
            f"{path} cannot be read ({error.strerror}), and {index.name} names it: expected every "
            "file of the checkpoint; obtain it again"
        ) from None


def _make_index_refusal(index: Path, why: str) -> SuspectError:
    """Make the error that refuses an index, with a reason."""
    return SuspectError(
        f"{index} is no index of a checkpoint ({make_printable(why, 300)}): expected the weight_map "
        "that came with its files"
    )
