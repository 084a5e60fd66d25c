"""Weights as codes, stored as the usual libraries store them."""

from __future__ import annotations

import torch
from torch import Tensor


def stepped(weight: Tensor, most: int, block: int) -> tuple[Tensor, Tensor]:
    """Codes of the shape of a weight, and a scale for each block of a row."""
    blocks = weight.reshape(len(weight), -1, block)
    scale = blocks.abs().amax(dim=2, keepdim=True) / most
    return (blocks / scale).round().reshape(weight.shape), scale[:, :, 0]


def packed(codes: Tensor, bits: int) -> Tensor:
    """Words of 32 bits that hold codes, the lowest bits first, as compressed-tensors packs them."""
    count, (rows, width) = 32 // bits, codes.shape
    whole = torch.zeros(rows, -(-width // count) * count, dtype=torch.int64)
    whole[:, :width] = codes.long() + (1 << (bits - 1))
    words = whole.reshape(rows, -1, count) << (torch.arange(count) * bits)
    total = words.sum(dim=2)
    return torch.where(total < 1 << 31, total, total - (1 << 32)).int()


def forms(
    weight: Tensor, name: str = "a.weight", *, block: int = 8
) -> dict[str, dict[str, Tensor]]:
    """The same weight, stored as different libraries store it; each is named by its code.

    Codes of 4 bits share a scale in each `block` values of a row.
    """
    rows, width = weight.shape
    by_row, scale = stepped(weight, 127, width)
    by_block, scales = stepped(weight, 7, block)
    layer = name.removesuffix(".weight")
    shape = torch.tensor(weight.shape)
    return {
        "8 by row": {name: by_row.char(), f"{name}_scale": scale},
        "8 with zero": {
            name: (by_row - 1).char(), f"{name}_scale": scale,
            f"{name}_zero_point": -torch.ones(rows, 1),
        },
        "8 packed": {f"{name}_packed": packed(by_row, 8), f"{name}_scale": scale,
                     f"{name}_shape": shape},
        "4 packed": {f"{name}_packed": packed(by_block, 4), f"{name}_scale": scales,
                     f"{name}_shape": shape},
        "8 bitsandbytes": {name: by_row.char(), f"{layer}.SCB": scale[:, 0] * 127},
        "8 quanto": {f"{name}._data": by_row.char(), f"{name}._scale": scale},
    }  # fmt: skip
