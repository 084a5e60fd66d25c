"""Uchida et al. 2017: a message in the weights, read by a secret matrix. The reading half.

Section 3.2 of the paper: w̄ is the layer's weight averaged over its output filters, the embedding
parameter X is a T×M matrix, and bit t is [X·w̄]_t > 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints import Array
from countermark.errors import ConfigError
from countermark.keys.key import REFERENCE, Key
from countermark.keys.messages import Bits
from countermark.keys.streams import KeyStream
from countermark.results.reading import Reading
from countermark.schemes.base import Paper
from countermark.schemes.bounded_readings import compute_line_scales
from countermark.schemes.key_limits import Factor
from countermark.schemes.weights import MASK, ConvergedScheme

_MARGINS: dict[str | None, float] = {"bounded": 0.8, "plain": 1.0}
_BLOCK = 1 << 18  # entries of X that are expanded at a time while reading; they fit into a cache


@dataclass(frozen=True)
class Uchida(ConvergedScheme):
    """A linear mark: T bits read from a layer by a secret T×M matrix.

    Attributes:
        key_type: rows of X. "sign": ±1 (default). As published: "random" N(0, 1); "direct" one +1
            a row; "diff" one +1 and one −1 a row, no column used twice.
        read: "tensor" reads every weight; "filter_mean" the mean over output filters, as published.
        select: "all" weights, or only those "converged" at `start_epoch` (Wang et al. 2020, PART).
        regularizer: "hinge" with `margin` (default) moves the weights less; "bce" as published.
        strength: λ, the weight of the regularizer, which is summed over bits.
        margin: the margin that the hinge demands of each bit, in standard deviations of [X·w]_t.
            A plain reading takes those of weights of the usual initial size. None is 0.8, or 1 for
            plain weights. Use 0.1 where T comes near the capacity.
        reading: "bounded" values, which a few units cannot outweigh (`schemes.bounded_readings`);
            or "plain" weights, as published and as keys of earlier versions are read. None is
            bounded, or plain where another field is as published.
    """

    name: ClassVar[str] = "uchida"
    linear: ClassVar[bool] = True
    earlier_fields: ClassVar[Mapping[str, Any]] = {"reading": "plain"}
    paper: ClassVar[Paper] = Paper(
        authors="Y. Uchida, Y. Nagai, S. Sakazawa, S. Satoh",
        title="Embedding Watermarks into Deep Neural Networks",
        venue="ICMR",
        year=2017,
        doi="10.1145/3078971.3078974",
    )

    key_type: Literal["sign", "random", "direct", "diff"] = field(default="sign", kw_only=True)
    read: Literal["tensor", "filter_mean"] = field(default="tensor", kw_only=True)
    select: Literal["all", "converged"] = field(default="all", kw_only=True)
    regularizer: Literal["bce", "hinge"] = field(default="hinge", kw_only=True)
    strength: Factor = field(default=0.01, kw_only=True)
    margin: Factor | None = field(default=None, kw_only=True)
    reading: Literal["bounded", "plain"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over_capacity and self.key_type in ("direct", "diff"):
            raise ConfigError(
                f"{self.key_type} rows use no column twice, so they cannot go over capacity: "
                "use key_type sign or random"
            )
        # Both fields depend on others. They are resolved here, so that a key stores definite
        # values.
        if self.reading is None:
            object.__setattr__(self, "reading", "plain" if self._is_published() else "bounded")
        if self.margin is None:
            object.__setattr__(self, "margin", _MARGINS[self.reading])
        if self.reading == "bounded" and self.read == "filter_mean":
            raise ConfigError(
                f"{self.name}: the mean over filters is read as published: set reading=plain, or "
                "read=tensor"
            )
        if self.select == "converged":
            self.check_start()

    def _is_published(self) -> bool:
        """Return true if a field that changes the reading or its training is as published."""
        default = (self.key_type, self.read, self.regularizer) == ("sign", "tensor", "hinge")
        return not default

    def generate_row_blocks(self, key: Key) -> Iterator[NDArray[Any]]:
        """Generate X from top to bottom in blocks of rows (≤T, M): int8 for ±1 and 0, else float64.

        The columns correspond to the values of `read_vector`. X is expanded from (secret, C0, "rows").
        """
        width = self.count_all_read_values(key)
        height = max(1, _BLOCK // width)
        if self.key_type in ("direct", "diff"):
            yield from self._generate_sparse_rows(key, width, height)
            return
        # X may have billions of entries; only one block of rows is in memory at a time.
        streams = [
            (key.make_stream("rows", name), m) for name, m in self._count_columns(key).items()
        ]
        for start in range(0, self.bits, height):
            rows = min(height, self.bits - start)
            yield np.concatenate(
                [self._expand_dense_rows(stream, rows, m) for stream, m in streams], axis=1
            )

    def read_vector(self, weights: Mapping[str, Array], key: Key) -> Array:
        """Return the vector w (M,): the values that are read of all tensors, in C order, joined.

        Raises:
            ConfigError: a tensor has another shape than in the key.
        """
        parts = []
        for name, shape in key.tensors.items():
            if weights[name].shape != shape:
                raise ConfigError(f"{name} has shape {weights[name].shape}, the key reads {shape}")
            flat = self._read_values(weights[name])
            mask = self.get_mask(key, name)
            parts.append(
                # A stored mask may have any number type; a value carries the mark where the mask is
                # not 0.
                flat.reshape(-1) if mask is None else flat.reshape(-1)[mask != 0]
            )  # (M_l,)
        return np.concatenate(parts)  # (M,)

    def _read_values(self, tensor: Array) -> NDArray[np.float64]:
        """Return the values that are read of a tensor, bounded, plain, or averaged over filters."""
        if self.reading == "bounded":
            part = tensor.reshape(-1)
            return compute_line_scales(part, tensor.shape).read(part, 0, len(part))
        values: NDArray[np.float64] = tensor.astype(np.float64)
        return values.mean(axis=0) if self.read == "filter_mean" else values

    def compute_products(self, weights: Mapping[str, Array], key: Key) -> NDArray[np.float64]:
        """Return the readings X·w (T,)."""
        w = self.read_vector(weights, key)
        return np.concatenate([block @ w for block in self.generate_row_blocks(key)])

    def read_bits(self, weights: Mapping[str, Array], key: Key) -> Bits:
        """Return the bits (T,): 1 where y > 0, that is sigmoid(y) > ½."""
        return (self.compute_products(weights, key) > 0).astype(np.uint8)

    def extract(self, weights: Mapping[str, Array], key: Key) -> Reading:
        """Read T bits: y = X·w, bit = y > 0, that is sigmoid(y) > ½."""
        y = self.compute_products(weights, key)
        read = (y > 0).astype(np.uint8)
        return Reading(read, key.message, payload=key.check_payload(read), scores=y)

    @property
    def training_class(self) -> str:
        """The class that trains the mark, as module:class."""
        return "countermark.schemes.uchida.training:UchidaTraining"

    def capacity(self, tensors: Mapping[str, tuple[int, ...]], selected: int | None) -> int:
        """Return 2 bits a weight that is read (Cover 1965), M for direct, M/2 for diff rows."""
        width = sum(self.count_read_values(shape) for shape in tensors.values())
        width = width if selected is None else selected
        return {"direct": width, "diff": width // 2}.get(self.key_type, 2 * width)

    def count_selected_values(self, key: Key) -> int | None:
        """Return M where a mask selects weights, else None."""
        # The frozen tensors are masks, except for a reference model that the key may also hold.
        selects = any(name != REFERENCE for name in key.frozen)
        return self.count_all_read_values(key) if selects else None

    def count_read_values(self, shape: tuple[int, ...]) -> int:
        """Return how many values are read of a tensor of this shape.

        Raises:
            ConfigError: the mean over filters is read, and the tensor is a vector.
        """
        if self.read == "filter_mean" and len(shape) < 2:
            raise ConfigError(
                f"a tensor of shape {shape} has no filters to average: use read='tensor'"
            )
        return prod(shape[1:]) if self.read == "filter_mean" else prod(shape)

    def _count_columns(self, key: Key) -> dict[str, int]:
        """Return how many columns of X belong to each tensor.

        Raises:
            ConfigError: a mask of the key does not fit its tensor.
        """
        columns = {}
        for name, shape in key.tensors.items():
            size = self.count_read_values(shape)
            mask = self.get_mask(key, name)
            if mask is not None and mask.shape != (size,):
                raise ConfigError(
                    f"the key's mask of {name} has shape {mask.shape}, "
                    f"shape {shape} read as {self.read} has {size} values"
                )
            columns[name] = size if mask is None else int(np.count_nonzero(mask))
        return columns

    def get_mask(self, key: Key, name: str) -> NDArray[Any] | None:
        """Return the mask over the values that are read of a tensor; None if all carry the mark."""
        return key.frozen.get(f"{MASK}.{name}")

    def count_all_read_values(self, key: Key) -> int:
        """Return M, the number of values that are read."""
        return sum(self._count_columns(key).values())

    def _expand_dense_rows(self, stream: KeyStream, rows: int, width: int) -> NDArray[Any]:
        """Return the next rows of X for one tensor (rows, M_l): normal numbers, or ±1."""
        if self.key_type == "random":
            return stream.draw_normal_rows(rows, width)
        return 2 * stream.take_bit_rows(rows, width).astype(np.int8) - 1  # (rows, M_l)

    def _generate_sparse_rows(
        self, key: Key, width: int, height: int
    ) -> Iterator[NDArray[np.int8]]:
        """Generate blocks of rows: direct has one +1 in each row, diff also one −1."""
        # A permutation uses no column twice. `capacity` keeps the T (or 2T) places within its
        # length.
        order = key.make_stream("rows").draw_permutation(width)
        plus, minus = order[: self.bits], order[self.bits : 2 * self.bits]
        for start in range(0, self.bits, height):
            at = np.arange(min(height, self.bits - start))
            rows = np.zeros((len(at), width), dtype=np.int8)
            rows[at, plus[start + at]] = 1
            if self.key_type == "diff":
                rows[at, minus[start + at]] = -1
            yield rows
