"""GGUF files for the tests: tensors under llama.cpp's names, as numbers or in blocks of any type.

The package `gguf` writes the files and encodes the simple types. It cannot encode the others, so
they are encoded here, value by value nearest to what their formulas give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Values = NDArray[np.float32]
_TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def rename(name: str) -> str:
    """The name that llama.cpp gives to a tensor of a Llama."""
    block, part, last = re.fullmatch(
        r"(?:model\.)?(?:layers\.(\d+)\.)?([a-z_.]+)\.(\w+)", name
    ).groups()  # type: ignore[union-attr]
    return (f"blk.{block}." if block else "") + f"{_NAMES[part]}.{last}"


def pair_rows(weight: Values, heads: int) -> Values:
    """Rows as llama.cpp stores those of a Llama's queries and keys."""
    apart = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return apart.swapaxes(1, 2).reshape(weight.shape)


def join(codes: NDArray[Any], bits: int, group: int) -> NDArray[np.uint8]:
    """Bytes that hold codes: the first `group` codes in the lowest bits, the next in the next."""
    apart = codes.astype(np.uint8).reshape(len(codes), -1, 8 // bits, group)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(apart << shifts, axis=2).reshape(len(codes), -1)


def halves(values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The bytes of one float16 number a block, and the number."""
    small = values.astype("<f2").reshape(-1, 1)
    return small.view(np.uint8), small.astype(np.float64)


def with_minima(x: Values, group: int, most: int, steps: int) -> tuple[Any, ...]:
    """Scales and minima in so many steps, and codes up to `most`, of groups of values."""
    g = x.reshape(len(x), -1, group).astype(np.float64)
    low = np.maximum(-g.min(axis=2), 0)
    scale = (g.max(axis=2) + low) / most
    d, dn = halves(scale.max(axis=1) / steps)
    m, mn = halves(low.max(axis=1) / steps)
    s, n = (scale / dn).round().clip(0, steps), (low / mn).round().clip(0, steps)
    wide, shift = (dn * s)[:, :, None], (mn * n)[:, :, None]
    codes = ((g + shift) / wide).round().clip(0, most)
    return d, m, s.astype(np.uint8), n.astype(np.uint8), codes.reshape(len(x), -1).astype(np.uint8)


def symmetric(x: Values, group: int, half: int, steps: int) -> tuple[Any, ...]:
    """Scales in so many steps, and codes from -half to half - 1, of groups of values."""
    g = x.reshape(len(x), -1, group).astype(np.float64)
    scale = abs(g).max(axis=2) / half
    d, dn = halves(scale.max(axis=1) / steps)
    s = (scale / dn).round().clip(1, steps)
    codes = (g / (dn * s)[:, :, None]).round().clip(-half, half - 1)
    return d, s.astype(np.uint8), (codes + half).reshape(len(x), -1).astype(np.uint8)


def q2_k(x: Values) -> list[Any]:
    d, m, s, n, codes = with_minima(x, 16, 3, 15)
    return [s | n << 4, join(codes, 2, 32), d, m]


def q3_k(x: Values) -> list[Any]:
    d, s, codes = symmetric(x, 16, 4, 31)
    s = s + 32
    return [
        join(codes >> 2, 1, 32), join(codes & 3, 2, 32), join(s & 15, 4, 8), join(s >> 4, 2, 4), d,
    ]  # fmt: skip


def six_bits(s: NDArray[np.uint8], n: NDArray[np.uint8]) -> NDArray[np.uint8]:
    first, second = s[:, :4] | (s[:, 4:] >> 4) << 6, n[:, :4] | (n[:, 4:] >> 4) << 6
    return np.concatenate([first, second, (s[:, 4:] & 15) | (n[:, 4:] & 15) << 4], axis=1)


def q4_k(x: Values) -> list[Any]:
    d, m, s, n, codes = with_minima(x, 32, 15, 63)
    return [d, m, six_bits(s, n), join(codes, 4, 32)]


def q5_k(x: Values) -> list[Any]:
    d, m, s, n, codes = with_minima(x, 32, 31, 63)
    return [d, m, six_bits(s, n), join(codes >> 4, 1, 32), join(codes & 15, 4, 32)]


def q6_k(x: Values) -> list[Any]:
    d, s, codes = symmetric(x, 16, 32, 127)
    return [join(codes & 15, 4, 64), join(codes >> 4, 2, 32), s, d]


def nearest(scaled: NDArray[Any]) -> NDArray[np.uint8]:
    return abs(scaled[..., None] - _TABLE).argmin(axis=-1).astype(np.uint8)


def iq4_nl(x: Values) -> list[Any]:
    d, dn = halves(abs(x).max(axis=1) / 127)
    return [d, join(nearest(x / dn), 4, 16)]


def iq4_xs(x: Values) -> list[Any]:
    d, s, _ = symmetric(x, 32, 127, 31)
    dn = d.view("<f2").astype(np.float64)
    codes = nearest(x.reshape(len(x), 8, 32) / (dn * s)[:, :, None]).reshape(len(x), -1)
    s = s + 32
    return [d, join(s >> 4, 2, 1), join(s & 15, 4, 1), join(codes, 4, 16)]


_ENCODERS: Mapping[str, tuple[int, Callable[[Values], list[Any]]]] = {
    "Q2_K": (256, q2_k), "Q3_K": (256, q3_k), "Q4_K": (256, q4_k), "Q5_K": (256, q5_k),
    "Q6_K": (256, q6_k), "IQ4_NL": (32, iq4_nl), "IQ4_XS": (256, iq4_xs),
}  # fmt: skip
FORMS = [
    "F32", "F16", "BF16", "F64", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K",
    "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip
_PLAIN = {"F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def encode(values: Values, form: str) -> NDArray[np.uint8]:
    """The bytes of values in a type, row by row."""
    if form in _PLAIN:
        return values.astype(_PLAIN[form]).view(np.uint8)
    if form not in _ENCODERS:
        return gguf.quants.quantize(values.astype(np.float32), Type[form]).view(np.uint8)
    block, encoder = _ENCODERS[form]
    raw = np.concatenate(encoder(values.reshape(-1, block)), axis=1)
    return raw.reshape(*values.shape[:-1], -1)


def write_gguf(
    path: Path, tensors: Mapping[str, Values], *, form: str = "F32", arch: str = "llama",
    numbers: Mapping[str, int] | None = None,
) -> Path:  # fmt: skip
    """Write tensors of the file's own names; vectors, and rows that no block fits, are F32."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (numbers or {}).items():
        writer.add_uint32(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    for name, values in tensors.items():
        fits = values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[Type[form]][0] == 0
        kind = form if fits else "F32"
        writer.add_tensor(name, encode(values, kind), raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama(
    path: Path, tensors: Mapping[str, Values], *, form: str, heads: int, pairs: int
) -> Path:
    """Write a Llama as llama.cpp's converter does, with so many heads of queries and of keys."""
    counts = {"attn_q": heads, "attn_k": pairs}
    stored = {}
    for name, values in tensors.items():
        own = rename(name)
        part = own.split(".")[-2]
        stored[own] = pair_rows(values, counts[part]) if part in counts else values
    numbers = {"llama.attention.head_count": heads, "llama.attention.head_count_kv": pairs}
    return write_gguf(path, stored, form=form, numbers=numbers)
