"""Define the interface that every kind of suspect implements: named tensors, read on demand."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.errors import SuspectError

Array = NDArray[np.floating[Any]]
IN_PART = ", in part"
"""Suffix of the name of a digest that covers only the part of a tensor that was read."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype (in the format's own spelling) of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str


Identity: TypeAlias = tuple[int, int, int, int]


def make_file_identity(found: os.stat_result) -> Identity:
    """Return device, inode, size and modification time, which tell a file from a replacement."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def hash_unchanged_file(path: Path, identity: Identity) -> str:
    """Compute the SHA-256 of a whole file, in hexadecimal.

    Args:
        path: the file.
        identity: the file's identity at the time it was opened.

    Raises:
        SuspectError: the file at this path is no longer the file that was opened.
    """
    with path.open("rb") as file:
        # The identity is compared after hashing, on the same descriptor, so that neither a replaced
        # path nor a write during the hashing goes unnoticed.
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if make_file_identity(os.fstat(file.fileno())) != identity:
            raise SuspectError(f"{path} was changed while it was read: read it again")
    return digest


class Weights(ABC):
    """The tensors of a suspect by name, as a context manager that closes files at its end.

    Attributes:
        name: the suspect's name in messages and verdicts.
        tensors: every tensor's name, shape and dtype, known without reading any values.
        views: names of tensors that are another form of stored tensors: transposed, or the numbers
            that quantised codes stand for.
        digests: SHA-256 of everything that has been read so far: each tensor by name, and the
            header of a safetensors file as "__metadata__", a name that the format gives to no
            tensor.
        notes: sentences about the file that belong into every verdict on it.
        form: the name of a form in which tensors may be folded into others, so that a missing
            tensor says nothing about the model; empty for all other forms.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: Mapping[str, TensorInfo] = {}
        self.views: frozenset[str] = frozenset()
        self.digests: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self.form = ""

    @abstractmethod
    def _load(self, name: str) -> NDArray[Any]:
        """Load the values of one tensor in its own shape, without any check for finite numbers."""

    @abstractmethod
    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor in pieces, in its own dtype, C order, little-endian."""

    def read(self, name: str) -> Array:
        """Read one tensor as float32 (float64 stays float64), in its own shape.

        Raises:
            SuspectError: the values are not finite real numbers.
        """
        return self._check_finite(name, self._load(name))

    def read_part(self, name: str, start: int, count: int) -> Array:
        """Read `count` values (count,) of one tensor, in C order from `start` on.

        The values are converted and checked as in `read`. Where a format allows it, no other bytes
        of the tensor are read, and their digest is recorded as "NAME, in part".
        """
        # The name of the digest tells no position: where a mark lies can be a key's secret.
        return self.read(name).reshape(-1)[start : start + count]

    def read_bytes(self, name: str, start: int, count: int) -> bytes:
        """Read `count` bytes of one tensor as `read_pieces` yields them, from byte `start` on.

        Where a format allows it, only these bytes are read, as in `read_part`.
        """
        raw = b"".join(self.read_pieces(name))
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        return raw[start : start + count]

    def read_parts(self, name: str, starts: Sequence[int], count: int) -> list[Array]:
        """Read `count` values (count,) of one tensor from each start on; see `read_part`."""
        # Formats that read a part by reading all read the tensor once for all parts.
        values = self.read(name).reshape(-1)
        return [values[start : start + count] for start in starts]

    def _check_finite(self, name: str, values: NDArray[Any]) -> Array:
        """Return values as float32 or float64; raise `SuspectError` unless all are finite."""
        if not np.isfinite(values).all():
            wrong = int(values.size - np.isfinite(values).sum())
            raise SuspectError(
                f"{self.name}: {name} holds {wrong} values that are not finite: "
                "expected trained weights; nothing can be read from these"
            )
        # float16 and bfloat16 fit into float32 without loss, so only float64 needs to stay wider.
        return values if values.dtype == np.float64 else values.astype(np.float32, copy=False)

    def describe_source(self, name: str) -> str:
        """Name the stored tensors that a tensor is made from: its own name, if it is stored."""
        return name

    @abstractmethod
    def compute_file_digest(self) -> str | None:
        """Compute the SHA-256 of the whole suspect file in hexadecimal; None for a live module."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OpenFileWeights(Weights):
    """The tensors of one file, which stays open and from which they are read on demand.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._file = path.open("rb")

    def compute_file_digest(self) -> str:
        """Compute the SHA-256 of the whole file, in hexadecimal."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
