"""Read weights that are stored as integer codes as the numbers that the codes stand for.

    NAME (int8), NAME_scale, NAME_zero_point          compressed-tensors, integers
    NAME_packed (int32), NAME_scale, NAME_shape       compressed-tensors, packed 8 or 4 bits each
    LAYER.weight (int8), LAYER.SCB                    bitsandbytes, 8 bits
    NAME._data (int8), NAME._scale                    quanto

A scale is for the whole tensor, or for each row, or for each block of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints.base import Array, TensorInfo, Weights
from countermark.checkpoints.wrapped import WrappedWeights
from countermark.errors import SuspectError, make_printable

_CODES = {"I8", "int8"}
_WORDS = {"I32", "int32"}
_BITSANDBYTES = 127.0  # SCB holds the largest magnitude of a row, which has this code


@dataclass(frozen=True)
class _CodedTensor:
    """Names of the tensors that hold codes, scales and zero points, and the weight's shape.

    Attributes:
        bits: bits of a code that is packed into 32-bit words; 0 if each code has its own element.
        divisor: the number by which the scales are divided.
    """

    shape: tuple[int, ...]
    codes: str
    scale: str
    zero: str | None = None
    bits: int = 0
    divisor: float = 1.0


def dequantise_weights(weights: Weights) -> Weights:
    """Add a view with numbers for every tensor of open weights that is stored as codes.

    Returns: `weights` itself if nothing is stored as codes; closing either closes the file.

    Raises:
        SuspectError: a tensor that tells how codes are packed cannot be read; the file is closed
            in this case.
    """
    try:
        found = dict(_find_coded_tensors(weights))
    except SuspectError:
        weights.close()
        raise
    return DequantisedWeights(weights, found) if found else weights


class DequantisedWeights(WrappedWeights):
    """Open weights with a view for each tensor that is stored as codes; closing it closes them.

    Args:
        weights: open weights.
        codes: the tensors that are stored as codes, by the name of the weight that they stand for.
    """

    def __init__(self, weights: Weights, codes: dict[str, _CodedTensor]) -> None:
        super().__init__(weights)
        self._codes = codes
        self.tensors = dict(weights.tensors) | {
            name: TensorInfo(each.shape, "float32") for name, each in codes.items()
        }
        self.views = weights.views | codes.keys()

    def read_part(self, name: str, start: int, count: int) -> Array:
        """Read a part of one tensor; of a tensor stored as codes, all codes are read."""
        if name in self._codes:
            return super().read_part(name, start, count)
        return self._weights.read_part(name, start, count)

    def read_parts(self, name: str, starts: Sequence[int], count: int) -> list[Array]:
        """Read parts of one tensor as the wrapped weights do, unless its codes are read."""
        if name in self._codes:
            return super().read_parts(name, starts, count)
        return self._weights.read_parts(name, starts, count)

    def _load(self, name: str) -> NDArray[Any]:
        """Load one tensor; a tensor stored as codes becomes (codes - zero point) * scale.

        Raises:
            SuspectError: scales or zero points do not fit the codes.
        """
        if (codes := self._codes.get(name)) is None:
            return self._weights.read(name)
        if codes.bits:
            values = self._unpack_codes(codes)
        else:
            values = self._weights.read(codes.codes).astype(np.float64)
        scale = self._weights.read(codes.scale) / codes.divisor
        zero = self._weights.read(codes.zero) if codes.zero else np.zeros(1)
        rows = values.reshape(len(values), -1)  # (rows, width)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # `read` refuses infinities
                found = (rows - _spread_over_rows(zero, rows)) * _spread_over_rows(scale, rows)
                numbers: Array = found.reshape(codes.shape).astype(np.float32)
        except ValueError as error:
            said = make_printable(f"{name} cannot be read ({error})", 300)
            raise SuspectError(
                f"{self.name}: {said}: expected codes with one scale, or one for each row or block"
            ) from None
        return numbers

    def _unpack_codes(self, codes: _CodedTensor) -> NDArray[np.float64]:
        """Unpack the codes (rows, width) from words (rows, n) and subtract their middle value."""
        # `read` would return float32, which does not hold all 32 bits of a word.
        raw = b"".join(self._weights.read_pieces(codes.codes))
        self.digests[codes.codes] = hashlib.sha256(raw).hexdigest()
        rows, width = codes.shape
        # The lowest bits of a word hold the first code. int64 keeps the shift below free of a sign.
        words = np.frombuffer(raw, "<u4").astype(np.int64).reshape(rows, -1, 1)
        each = (words >> np.arange(0, 32, codes.bits)) & ((1 << codes.bits) - 1)
        found = each.reshape(rows, -1)[:, :width].astype(np.float64)
        # Codes are stored with an offset of half their range, as unsigned numbers.
        return found - (1 << (codes.bits - 1))

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor: as stored, or the float32 numbers of codes."""
        if name in self._codes:
            yield self._load(name).tobytes()
        else:
            yield from super().read_pieces(name)


def _find_coded_tensors(weights: Weights) -> Iterator[tuple[str, _CodedTensor]]:
    """Yield the tensors that are stored as codes, by the name of the weight that they stand for."""
    tensors = weights.tensors
    for name, info in tensors.items():
        base = name.removesuffix("._data")
        layer = name.removesuffix(".weight")
        if info.dtype in _CODES and info.shape:
            if base != name and f"{base}._scale" in tensors:
                yield base, _CodedTensor(info.shape, name, f"{base}._scale")
            elif layer != name and f"{layer}.SCB" in tensors:
                yield name, _CodedTensor(info.shape, name, f"{layer}.SCB", divisor=_BITSANDBYTES)
            elif f"{name}_scale" in tensors:
                zero = f"{name}_zero_point" if f"{name}_zero_point" in tensors else None
                yield name, _CodedTensor(info.shape, name, f"{name}_scale", zero)
        if info.dtype in _WORDS and name.endswith("_packed"):
            yield from _find_packed_codes(weights, name, info)


def _find_packed_codes(
    weights: Weights, name: str, info: TensorInfo
) -> Iterator[tuple[str, _CodedTensor]]:
    """Yield a tensor of 8-bit or 4-bit codes that are packed into 32-bit words.

    Nothing is yielded for another packing, or for codes with zero points.
    """
    base = name.removesuffix("_packed")
    about = weights.tensors.get(f"{base}_shape")
    if about is None or about.shape != (2,) or f"{base}_scale" not in weights.tensors:
        return
    # Packed codes with zero points (asymmetric quantisation) are not supported.
    if f"{base}_zero_point" in weights.tensors or len(info.shape) != 2:
        return
    rows, width = (int(each) for each in weights.read(f"{base}_shape"))
    # No tensor says how many bits a code has: it follows from the widths before and after packing.
    for bits in (8, 4):
        if (rows, -(-width * bits // 32)) == info.shape and width > 0:
            yield base, _CodedTensor((rows, width), name, f"{base}_scale", bits=bits)
            return


def _spread_over_rows(each: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Broadcast one number, one number a row, or one number a block to rows (rows, width).

    Raises:
        ValueError: the count of numbers fits neither the rows nor their blocks.
    """
    count, width = rows.shape
    if each.size == 1:
        return each.reshape(1, 1)
    blocks, rest = divmod(each.size, count)
    # The tensors are the thief's, so counts that do not divide are an error here, not a broadcast.
    if rest or not blocks or width % blocks:
        raise ValueError(f"{each.size} numbers for {count} rows of {width}")
    return np.repeat(each.reshape(count, blocks), width // blocks, axis=1)
