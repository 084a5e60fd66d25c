"""Know the 4-bit codes of bitsandbytes. See `coded_formats`.

NAME                                        bytes of two codes each, as a tensor of any dtype
NAME.quant_map                              the numbers (16,) that the codes stand for
NAME.absmax                                 a scale for each run of codes, or a code of it
NAME.nested_absmax, NAME.nested_quant_map   scales and numbers (256,) of the codes of scales
NAME.quant_state.bitsandbytes__nf4          a JSON document: shape, sizes of runs, an offset
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from countermark.checkpoints.code_source import CodeSource, is_size
from countermark.checkpoints.coded_tensor import CodedTensor, Codes, Found, Grids, RunGrid
from countermark.checkpoints.dtypes import DTYPES

_MOST_AXES = 8


@dataclass(frozen=True)
class _State:
    """The content of the JSON document.

    Attributes:
        shape: of the weight.
        run: how many codes share a scale.
        outer_run: how many scales share a scale of their own, where scales are codes.
        offset: is added to scales that are codes.
    """

    shape: tuple[int, ...]
    run: int
    outer_run: int
    offset: float

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> _State | None:
        """Return the state, or None if a value is missing or is no size."""
        shape, run, outer_run = (said.get(n) for n in ("shape", "blocksize", "nested_blocksize"))
        if not isinstance(shape, list) or not 1 <= len(shape) <= _MOST_AXES:
            return None
        if not all(map(is_size, shape)) or not is_size(run):
            return None
        offset = said.get("nested_offset", 0.0)
        if not isinstance(offset, float):
            return None
        return cls(tuple(shape), run, outer_run if is_size(outer_run) else 1, offset)


def find_bitsandbytes(source: CodeSource, name: str) -> Found:
    """Find 4-bit codes with a table of 16 numbers and a scale for each run of codes."""
    absmax, table, outer, outer_table = (
        f"{name}.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    )
    documents = (f"{name}.quant_state.bitsandbytes__{form}" for form in ("nf4", "fp4"))
    document = next(filter(source.has, documents), "")
    if source.get_word(name) not in DTYPES or not document:
        return None
    if (state := _State.from_json(source.read_document(document))) is None:
        return None
    # The codes are bytes, whatever dtype holds them.
    stored = prod(source.get_shape(name)) * np.dtype(DTYPES[source.get_word(name)]).itemsize
    count, width = prod(state.shape), state.shape[-1]
    runs = -(-count // state.run)
    if -(-count // 2) != stored or source.get_shape(table) != (16,):
        return None
    is_nested = source.get_word(absmax) == "U8"
    sizes = {absmax: runs}
    if is_nested:
        sizes |= {outer: -(-runs // state.outer_run), outer_table: 256}
    if any(source.get_shape(each) != (size,) for each, size in sizes.items()):
        return None

    def read_codes(first: int, last: int) -> Codes:
        begin, end = first * width // 2, -(-last * width // 2)
        raw = np.frombuffer(source.weights.read_bytes(name, begin, end - begin), np.uint8)
        # The upper four bits of a byte hold the first code.
        codes = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)
        codes = codes[first * width - 2 * begin :][: (last - first) * width]
        return source.weights.read(table)[codes].reshape(-1, width)

    def read_grids() -> Grids:
        scales = source.read_numbers(absmax)
        if is_nested:
            factors = source.read_numbers(outer)[np.arange(runs) // state.outer_run]
            scales = source.read_numbers(outer_table)[scales.astype(np.int64)] * factors
            scales = scales + state.offset
        return Grids(RunGrid(scales, state.run, width))

    parts = (*filter(source.has, (name, *sizes, table, document)),)
    return name, CodedTensor(state.shape, parts, read_codes, read_grids)
