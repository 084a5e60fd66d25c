"""Read what tensors that are stored as codes consist of: names, shapes, bytes and configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from countermark._internal.files import parse_json
from countermark.checkpoints.base import Weights
from countermark.checkpoints.coded_tensor import Codes, unpack_codes
from countermark.checkpoints.dtypes import DTYPES, decode_values, get_dtype_word

_LARGEST_DOCUMENT = 1 << 16  # bytes of a JSON document that is stored as a tensor
_LARGEST_SIZE = 1 << 31  # of an axis, a block or a group that a document states


def is_size(value: object) -> TypeGuard[int]:
    """Return true if a value out of JSON is the size of an axis, a block or a group."""
    # `type(...) is int`, because JSON's true is an instance of int in Python.
    return type(value) is int and 1 <= value <= _LARGEST_SIZE


@dataclass(frozen=True)
class CodeSource:
    """Open weights, and what their configuration says about codes.

    Attributes:
        weights: open weights.
        config: the part of `config.json` about quantisation; empty if there is none.
    """

    weights: Weights
    config: Mapping[str, Any]

    def get_word(self, name: str) -> str:
        """Return the dtype of a tensor as safetensors spells it; empty if there is no tensor."""
        info = self.weights.tensors.get(name)
        return get_dtype_word(info.dtype) if info else ""

    def get_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; () if there is no tensor."""
        info = self.weights.tensors.get(name)
        return info.shape if info else ()

    def has(self, name: str) -> bool:
        """Return true if the weights hold a tensor of this name."""
        return name in self.weights.tensors

    def get_size(self, *names: str) -> int:
        """Return a size out of the configuration, below these names; 0 if there is none."""
        found: Any = self.config
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if is_size(found) else 0

    def get_block(self) -> tuple[int, int] | None:
        """Return height and width of blocks that share a scale, if the configuration says them."""
        sizes = self.config.get("weight_block_size")
        if isinstance(sizes, list) and len(sizes) == 2 and all(map(is_size, sizes)):
            return sizes[0], sizes[1]
        return None

    def read_rows(self, name: str, first: int, last: int) -> NDArray[np.uint8]:
        """Read the bytes (n, width) of the rows of a stored tensor, whose last axis is a row."""
        shape = self.get_shape(name)
        size = shape[-1] * np.dtype(DTYPES[self.get_word(name)]).itemsize
        raw = self.weights.read_bytes(name, first * size, (last - first) * size)
        return np.frombuffer(raw, np.uint8).reshape(-1, size)

    def make_code_reader(self, name: str, bits: int, width: int) -> Callable[[int, int], Codes]:
        """Make the function that reads the codes (n, width) of some rows of a stored tensor."""
        return lambda first, last: unpack_codes(self.read_rows(name, first, last), bits, width)

    def read_matrix(self, name: str) -> Codes:
        """Read all values of a stored tensor as a matrix of its rows; integers stay integers."""
        raw = self.read_rows(name, 0, prod(self.get_shape(name)[:-1]))
        return decode_values(raw.tobytes(), self.get_word(name)).reshape(len(raw), -1)

    def read_numbers(self, name: str) -> NDArray[np.float64]:
        """Read a tensor of scales, zero points or biases."""
        return self.weights.read(name).astype(np.float64)

    def read_powers(self, name: str) -> NDArray[np.float64]:
        """Read a tensor of scales that are powers of two, stored as exponents."""
        found = self.read_numbers(name)
        return np.exp2(found - 127) if self.get_word(name) == "U8" else found

    def read_group_order(self, name: str) -> NDArray[np.int64] | None:
        """Read which group each column belongs to; None if the groups lie in order."""
        if not self.has(name):
            return None
        order = self.read_numbers(name).reshape(-1).astype(np.int64)
        # compressed-tensors writes -1 where columns were not reordered.
        return None if (order < 0).any() else order

    def read_document(self, name: str) -> Mapping[str, Any]:
        """Parse the JSON object in the bytes of a small tensor; {} if there is no such object."""
        if self.get_word(name) != "U8" or prod(self.get_shape(name)) > _LARGEST_DOCUMENT:
            return {}
        try:
            found = parse_json(self.weights.read_bytes(name, 0, prod(self.get_shape(name))))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}
