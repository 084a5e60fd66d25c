"""What every kind of suspect offers: tensors by name, read when they are asked for."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from countermark.errors import SuspectError

Array = NDArray[np.floating[Any]]
IN_PART = ", in part"
"""Ends the name of a tensor among the digests, where not all of it was read."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype (in the format's own word) of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str


Identity: TypeAlias = tuple[int, int, int, int]


def identity_of(found: os.stat_result) -> Identity:
    """What tells a file from another that takes its place."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def digest_of(path: Path, identity: Identity) -> str:
    """SHA-256 of a whole file, in hexadecimal.

    Raises:
        SuspectError: it is not the one that was opened any more.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if identity_of(os.fstat(file.fileno())) != identity:
            raise SuspectError(f"{path} was changed while it was read: read it again")
    return digest


class Weights(ABC):
    """A suspect's tensors by name. A context manager: files are closed when the block ends.

    Attributes:
        name: what the suspect is called in messages and verdicts.
        tensors: every tensor's name, shape and dtype, known without reading any.
        views: those that are another form of others: transposed, or numbers that codes stand for.
        digests: SHA-256 of what has been read so far: each tensor by name, and the header of a
            safetensors file as "__metadata__", a name that the format gives to no tensor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: Mapping[str, TensorInfo] = {}
        self.views: frozenset[str] = frozenset()
        self.digests: dict[str, str] = {}

    @abstractmethod
    def _load(self, name: str) -> NDArray[Any]:
        """The values of one tensor."""

    @abstractmethod
    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor in its own dtype, C order, little-endian; a piece at a time."""

    def read(self, name: str) -> Array:
        """One tensor as float32 (float64 stays as it is), in its own shape.

        Raises:
            SuspectError: the values are not finite real numbers.
        """
        return self._checked(name, self._load(name))

    def read_part(self, name: str, start: int, count: int) -> Array:
        """`count` values (count,) of one tensor, in C order from `start` on, as `read` gives them.

        Where a format allows it, nothing else of the tensor is read, and its digest is that of
        these bytes, as "NAME, in part": where they lie can be a key's secret.
        """
        return self.read(name).reshape(-1)[start : start + count]

    def _checked(self, name: str, values: NDArray[Any]) -> Array:
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
