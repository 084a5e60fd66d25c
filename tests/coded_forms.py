"""A weight in every form of codes that published checkpoints have, encoded by the forms' formulas.

Nothing here shares code with the readers: bits are packed by `np.packbits`, and the 16 numbers of
4-bit floats are written out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLOATS4 = np.concatenate([_E2M1, -_E2M1])
_E2M3 = np.concatenate([np.arange(16) / 8, np.arange(8, 16) / 4, np.arange(8, 16) / 2])
FLOATS6 = np.concatenate([_E2M3, -_E2M3])
# The numbers of NF4 as QLoRA prints them, to four digits; a file brings its own.
NF4 = np.array(
    [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
     0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
)  # fmt: skip
FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
FP4 = np.concatenate([FP4, -FP4])


@dataclass(frozen=True)
class Coded:
    """A weight in one form.

    Attributes:
        state: the stored tensors by name.
        numbers: what the codes stand for.
        config: what `config.json` says, if the form needs it.
    """

    state: dict[str, Tensor]
    numbers: Matrix
    config: Mapping[str, Any] = field(default_factory=dict)


def pack_bits(codes: NDArray[Any], bits: int, word: int = 1) -> NDArray[np.uint8]:
    """Rows of codes as bytes, the lowest bits first, filled up to whole words of so many bytes."""
    each = (codes.astype(np.uint8)[..., None] >> np.arange(bits)) & 1
    rows = np.packbits(each.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    short = -rows.shape[-1] % word
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, short)])


def as_words(codes: NDArray[Any], bits: int, dtype: str = "<i4") -> Tensor:
    """Codes packed into 32-bit words along the last axis."""
    return torch.from_numpy(np.ascontiguousarray(pack_bits(codes, bits, 4)).view(dtype))


def in_groups(weight: Matrix, group: int) -> Matrix:
    return weight.reshape(*weight.shape[:-1], -1, group)


def affine(
    weight: Matrix, group: int, bits: int, *, symmetric: bool = False
) -> tuple[NDArray[np.int64], Matrix, NDArray[np.int64], Matrix]:
    """Codes from 0, scales and zero points of groups, and the numbers."""
    each, most = in_groups(weight, group), (1 << bits) - 1
    low, high = np.minimum(each.min(-1), 0), np.maximum(each.max(-1), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale = ((high - low) / most).astype(np.float16).astype(np.float64)
    zero = np.clip(np.rint(-low / scale), 0, most).astype(np.int64)
    if symmetric:
        zero = np.full_like(zero, 1 << (bits - 1))
    codes = np.clip(np.rint(each / scale[..., None]) + zero[..., None], 0, most).astype(np.int64)
    numbers = (codes - zero[..., None]) * scale[..., None]
    return codes.reshape(weight.shape), scale, zero, numbers.reshape(weight.shape)


def nearest(values: Matrix, table: Matrix) -> NDArray[np.int64]:
    return np.abs(values[..., None] - table).argmin(axis=-1)


def half(values: Matrix) -> Tensor:
    return torch.from_numpy(values.astype(np.float16))


def single(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def numbers_of(tensor: Tensor) -> Matrix:
    return tensor.double().numpy()


def small_floats(
    weight: Matrix, run: int, table: Matrix, scale_to: Callable[[Matrix], tuple[Tensor, Matrix]]
) -> tuple[NDArray[np.int64], Tensor, Matrix]:
    """Codes of small floats, their scales as stored, and the numbers."""
    each = in_groups(weight, run)
    stored, scale = scale_to(np.abs(each).max(-1) / table.max())
    codes = nearest(each / scale[..., None], table)
    return (
        codes.reshape(weight.shape),
        stored,
        (table[codes] * scale[..., None]).reshape(weight.shape),
    )


def powers(scale: Matrix) -> tuple[Tensor, Matrix]:
    """Scales rounded up to powers of two, stored as exponents."""
    exponent = np.ceil(np.log2(scale))
    return torch.from_numpy((exponent + 127).astype(np.uint8)), 2.0**exponent


def float8(values: Matrix) -> tuple[Tensor, Matrix]:
    """Values as 8-bit floats."""
    stored = torch.from_numpy(values).to(torch.float8_e4m3fn)
    return stored, numbers_of(stored)


# --- 8-bit floats


def fp8_bare(weight: Matrix, name: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Coded:
    stored = torch.from_numpy(weight).to(dtype)
    return Coded({name: stored}, numbers_of(stored))


def fp8_scaled(
    weight: Matrix, name: str, scale: Matrix, whole: Matrix, suffix: str = "_scale", **config: Any
) -> Coded:
    """8-bit floats with scales; `whole` is the scale of each value."""
    scale, whole = (each.astype(np.float32).astype(np.float64) for each in (scale, whole))
    stored, numbers = float8(weight / whole)
    return Coded({name: stored, f"{name}{suffix}": single(scale)}, numbers * whole, config)


def fp8_tensor(weight: Matrix, name: str) -> Coded:
    scale = np.abs(weight).max().reshape(1) / 448
    return fp8_scaled(weight, name, scale, np.broadcast_to(scale, weight.shape))


def fp8_rows(weight: Matrix, name: str) -> Coded:
    scale = np.abs(weight).max(1, keepdims=True) / 448
    return fp8_scaled(weight, name, scale, np.broadcast_to(scale, weight.shape))


def fp8_blocks(weight: Matrix, name: str, block: int = 128, **config: Any) -> Coded:
    """A scale for each square of the weight; the last squares may be incomplete."""
    places = [np.arange(size) // block for size in weight.shape]
    scale = np.zeros([place[-1] + 1 for place in places])
    np.maximum.at(scale, tuple(np.meshgrid(*places, indexing="ij")), np.abs(weight) / 448)
    whole = scale[np.ix_(*places)]
    return fp8_scaled(weight, name, scale, whole, "_scale_inv", **config)


def fp8_blocks_stated(weight: Matrix, name: str) -> Coded:
    about = {"quant_method": "fp8", "weight_block_size": [32, 48]}
    places = [np.arange(size) // block for size, block in zip(weight.shape, (32, 48), strict=True)]
    scale = np.random.default_rng(1).uniform(1e-4, 3e-4, [place[-1] + 1 for place in places])
    return fp8_scaled(
        weight, name, scale, scale[np.ix_(*places)], "_scale_inv", quantization_config=about
    )


def mxfp8(weight: Matrix, name: str) -> Coded:
    each = in_groups(weight, 32)
    stored, scale = powers(np.abs(each).max(-1) / 448)
    codes, numbers = float8(each / scale[..., None])
    state = {name: codes.reshape(weight.shape), f"{name}_scale": stored}
    return Coded(state, (numbers * scale[..., None]).reshape(weight.shape))


# --- compressed-tensors and ModelOpt


def ct_packed(weight: Matrix, name: str, bits: int, group: int, *, symmetric: bool) -> Coded:
    codes, scale, zero, numbers = affine(weight, group, bits, symmetric=symmetric)
    state = {
        f"{name}_packed": as_words(codes, bits), f"{name}_scale": half(scale),
        f"{name}_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    if not symmetric:  # packed along the rows
        state[f"{name}_zero_point"] = as_words(zero.T, bits).T.contiguous()
    return Coded(state, numbers)


def ct_bytes(weight: Matrix, name: str) -> Coded:
    codes, scale, zero, numbers = affine(weight, weight.shape[1], 8)
    state = {
        name: torch.from_numpy((codes - 128).astype(np.int8)), f"{name}_scale": half(scale),
        f"{name}_zero_point": torch.from_numpy((zero - 128).astype(np.int8)),
    }  # fmt: skip
    return Coded(state, numbers)


def ct_reordered(weight: Matrix, name: str) -> Coded:
    """Groups whose columns do not lie side by side."""
    order = np.random.default_rng(2).permutation(weight.shape[1])
    codes, scale, zero, numbers = affine(weight[:, order], 32, 4)
    back = np.argsort(order)
    state = {
        f"{name}_packed": as_words(codes[:, back], 4), f"{name}_scale": half(scale),
        f"{name}_shape": torch.tensor(weight.shape),
        f"{name}_zero_point": as_words(zero.T, 4).T.contiguous(),
        f"{name}_g_idx": torch.from_numpy((back // 32).astype(np.int32)),
    }  # fmt: skip
    return Coded(state, numbers[:, back])


def nvfp4(weight: Matrix, name: str, *, modelopt: bool) -> Coded:
    whole = float(np.float32(np.abs(weight).max() / (448 * 6)))
    codes, scale, numbers = small_floats(weight / whole, 16, FLOATS4, float8)
    packed = torch.from_numpy(pack_bits(codes, 4))
    if modelopt:
        state = {name: packed, f"{name}_scale": scale, f"{name}_scale_2": torch.tensor(whole)}
    else:
        inverse = float(np.float32(1 / whole))
        whole = 1 / inverse
        state = {f"{name}_packed": packed, f"{name}_scale": scale,
                 f"{name}_global_scale": torch.tensor([inverse])}  # fmt: skip
    return Coded(state, numbers * whole)


def mx_packed(weight: Matrix, name: str, bits: int, table: Matrix) -> Coded:
    codes, scale, numbers = small_floats(weight, 32, table, powers)
    packed = torch.from_numpy(pack_bits(codes, bits))
    return Coded({f"{name}_packed": packed, f"{name}_scale": scale}, numbers)


def deepseek_fp4(weight: Matrix, name: str) -> Coded:
    """As `mx_packed`, under the names and dtypes of DeepSeek's own code."""
    coded = mx_packed(weight, name, 4, FLOATS4)
    packed, scale = coded.state.values()
    state = {
        name: packed.view(torch.int8),
        f"{name.removesuffix('.weight')}.scale": scale.view(torch.float8_e8m0fnu),
    }
    return Coded(state, coded.numbers)


# --- GPTQ and AWQ: the weight transposed


def gptq(
    weight: Matrix, name: str, bits: int = 4, *, version: int = 1, reordered: bool = False
) -> Coded:
    layer, width = name.removesuffix(".weight"), weight.shape[1]
    order = np.arange(width)
    if reordered:
        order = np.random.default_rng(3).permutation(width)
    codes, scale, zero, numbers = affine(weight[:, order], 32, bits)
    zero = np.maximum(zero, 1)  # 0 has no code in version 1
    numbers = ((in_groups(codes, 32) - zero[..., None]) * scale[..., None]).reshape(weight.shape)
    back = np.argsort(order)
    state = {
        f"{layer}.qweight": as_words(codes[:, back], bits).T.contiguous(),
        f"{layer}.qzeros": as_words((zero - (version == 1)).T, bits),
        f"{layer}.scales": half(scale.T.copy()),
        f"{layer}.g_idx": torch.from_numpy((back // 32).astype(np.int32)),
    }
    about = {"bits": bits, "group_size": 32, "quant_method": "gptq"}
    if version == 2:
        about["checkpoint_format"] = "gptq_v2"
    return Coded(state, numbers[:, back], {"quantization_config": about})


def awq(weight: Matrix, name: str) -> Coded:
    layer = name.removesuffix(".weight")
    codes, scale, zero, numbers = affine(weight, 32, 4)

    def interleaved(columns: NDArray[Any]) -> Tensor:
        eights = columns.reshape(len(columns), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return as_words(eights.reshape(columns.shape), 4)

    state = {
        f"{layer}.qweight": interleaved(codes.T), f"{layer}.qzeros": interleaved(zero.T),
        f"{layer}.scales": half(scale.T.copy()),
    }  # fmt: skip
    return Coded(state, numbers)


# --- bitsandbytes


def bitsandbytes(weight: Matrix, name: str, table: Matrix, *, nested: bool) -> Coded:
    kind = "nf4" if table is NF4 else "fp4"
    table = table.astype(np.float32).astype(np.float64)
    runs = weight.reshape(-1, 64)
    absmax = np.abs(runs).max(1).astype(np.float32).astype(np.float64)
    about: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16",
                             "shape": list(weight.shape)}  # fmt: skip
    state = {f"{name}.absmax": single(absmax), f"{name}.quant_map": single(table)}
    if nested:
        offset, steps = float(absmax.mean()), np.linspace(-1, 1, 256).astype(np.float32)
        blocks = np.arange(len(absmax)) // 256
        outer = np.zeros(blocks[-1] + 1)
        np.maximum.at(outer, blocks, np.abs(absmax - offset))
        outer = outer.astype(np.float32).astype(np.float64)
        chosen = nearest((absmax - offset) / outer[blocks], steps.astype(np.float64))
        absmax = steps[chosen] * outer[blocks] + offset
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        state |= {
            f"{name}.absmax": torch.from_numpy(chosen.astype(np.uint8)),
            f"{name}.nested_absmax": single(outer), f"{name}.nested_quant_map": single(steps),
        }  # fmt: skip
    codes = nearest(runs / absmax[:, None], table).reshape(-1, 2)
    state[name] = torch.from_numpy((codes[:, :1] << 4 | codes[:, 1:]).astype(np.uint8))
    document = np.frombuffer(json.dumps(about).encode(), np.uint8).copy()
    state[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(document)
    numbers = table[codes.reshape(runs.shape)] * absmax[:, None]
    return Coded(state, numbers.reshape(weight.shape))


# --- MLX, torchao, gpt-oss


def mlx(weight: Matrix, name: str, bits: int, group: int) -> Coded:
    layer, each = name.removesuffix(".weight"), in_groups(weight, group)
    low, most = each.min(-1), (1 << bits) - 1
    scale = ((each.max(-1) - low) / most).astype(np.float16).astype(np.float64)
    bias = low.astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint((each - bias[..., None]) / scale[..., None]), 0, most)
    state = {
        name: as_words(codes.reshape(weight.shape), bits, "<u4"),
        f"{layer}.scales": half(scale), f"{layer}.biases": half(bias),
    }  # fmt: skip
    numbers = codes * scale[..., None] + bias[..., None]
    config = {"quantization": {"group_size": group, "bits": bits}}
    return Coded(state, numbers.reshape(weight.shape), config)


def mlx_floats(weight: Matrix, name: str, run: int) -> Coded:
    codes, scale, numbers = small_floats(weight, run, FLOATS4, powers if run == 32 else float8)
    state = {name: as_words(codes, 4, "<u4"),
             f"{name.removesuffix('.weight')}.scales": scale.view(torch.uint8)}  # fmt: skip
    return Coded(state, numbers)


def torchao_int4(weight: Matrix, name: str) -> Coded:
    layer, each = name.removesuffix(".weight"), in_groups(weight, 32)
    low = each.min(-1)
    scale = ((each.max(-1) - low) / 15).astype(np.float16).astype(np.float64)
    middle = (low + 8 * scale).astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint((each - middle[..., None]) / scale[..., None]), -8, 7)
    packed = pack_bits((codes.astype(np.int64) & 15).reshape(weight.shape), 4)
    state = {
        f"{layer}._weight_qdata": torch.from_numpy(packed.view(np.int8)),
        f"{layer}._weight_scale": half(scale.T.copy()),
        f"{layer}._weight_zero_point": half(middle.T.copy()),
    }
    numbers = codes * scale[..., None] + middle[..., None]
    return Coded(state, numbers.reshape(weight.shape))


def torchao_bytes(weight: Matrix, name: str) -> Coded:
    layer, scale = name.removesuffix(".weight"), np.abs(weight).max(1, keepdims=True) / 127
    scale = scale.astype(np.float32).astype(np.float64)
    codes = np.rint(weight / scale)
    state = {f"{layer}._weight_qdata": torch.from_numpy(codes.astype(np.int8)),
             f"{layer}._weight_scale": single(scale)}  # fmt: skip
    return Coded(state, codes * scale)


def expert_blocks(weights: Matrix, name: str) -> Coded:
    """Experts (n, in, out) as gpt-oss stores them: each transposed, in runs of 32."""
    turned = np.ascontiguousarray(weights.swapaxes(1, 2))
    codes, scale, numbers = small_floats(turned, 32, FLOATS4, powers)
    blocks = pack_bits(in_groups(codes.astype(np.float64), 32).astype(np.int64), 4)
    state = {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": scale}
    return Coded(state, numbers.swapaxes(1, 2))


FORMS: Mapping[str, Callable[[Matrix, str], Coded]] = {
    "fp8 e4m3": fp8_bare,
    "fp8 e5m2": lambda w, n: fp8_bare(w, n, torch.float8_e5m2),
    "fp8 by tensor": fp8_tensor,
    "fp8 by row": fp8_rows,
    "fp8 by block": fp8_blocks,
    "fp8 by stated block": fp8_blocks_stated,
    "mxfp8": mxfp8,
    "compressed int8, zeros": ct_bytes,
    "compressed int8 packed, zeros": lambda w, n: ct_packed(w, n, 8, w.shape[1], symmetric=False),
    "compressed int4": lambda w, n: ct_packed(w, n, 4, 32, symmetric=True),
    "compressed int4, zeros": lambda w, n: ct_packed(w, n, 4, 32, symmetric=False),
    "compressed int4, reordered": ct_reordered,
    "compressed int3, zeros": lambda w, n: ct_packed(w, n, 3, 32, symmetric=False),
    "compressed nvfp4": lambda w, n: nvfp4(w, n, modelopt=False),
    "modelopt nvfp4": lambda w, n: nvfp4(w, n, modelopt=True),
    "compressed mxfp4": lambda w, n: mx_packed(w, n, 4, FLOATS4),
    "compressed mxfp6": lambda w, n: mx_packed(w, n, 6, FLOATS6),
    "deepseek fp4": deepseek_fp4,
    "gptq 4": gptq,
    "gptq 4, version 2": lambda w, n: gptq(w, n, version=2),
    "gptq 4, reordered": lambda w, n: gptq(w, n, reordered=True),
    "gptq 3": lambda w, n: gptq(w, n, 3),
    "gptq 8": lambda w, n: gptq(w, n, 8),
    "awq": awq,
    "bitsandbytes nf4": lambda w, n: bitsandbytes(w, n, NF4, nested=False),
    "bitsandbytes nf4, nested": lambda w, n: bitsandbytes(w, n, NF4, nested=True),
    "bitsandbytes fp4": lambda w, n: bitsandbytes(w, n, FP4, nested=False),
    "mlx 4": lambda w, n: mlx(w, n, 4, 64),
    "mlx 3": lambda w, n: mlx(w, n, 3, 32),
    "mlx 6": lambda w, n: mlx(w, n, 6, 128),
    "mlx 2": lambda w, n: mlx(w, n, 2, 32),
    "mlx mxfp4": lambda w, n: mlx_floats(w, n, 32),
    "mlx nvfp4": lambda w, n: mlx_floats(w, n, 16),
    "torchao int8": torchao_bytes,
    "torchao int4": torchao_int4,
}
