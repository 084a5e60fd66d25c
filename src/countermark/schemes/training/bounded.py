"""Bounded values of a live tensor, as `schemes.bounded` reads them. The training half."""

from __future__ import annotations

import torch
from torch import Tensor

from countermark.schemes.bounded import BOUND, LEAST_ENTRIES, bounded_spread

_ROUNDS = 1  # finding the units again at each step makes more than one needless


def bound_values(part: Tensor, shape: tuple[int, ...], start: int = 0) -> Tensor:
    """Bound consecutive values of a tensor; their units are not pulled at.

    Args:
        part: (n,) the values, in C order.
        shape: of the whole tensor.
        start: place of the first of them.

    Returns: (n,) float32.
    """
    values = part.float()
    row = 1
    for size in shape[1:]:
        row *= size
    if len(shape) < 2 or len(part) < LEAST_ENTRIES * row:
        unit = bounded_spread(values.detach().cpu().numpy()) or 1.0
        return (values / unit).clamp(-BOUND, BOUND)
    with torch.no_grad():
        units = _units(values.detach(), shape, start % row)
    return (values / units).clamp(-BOUND, BOUND)


def _units(values: Tensor, shape: tuple[int, ...], offset: int) -> Tensor:
    """The unit (n,) of each value: that of its row times that of its column."""
    width, inner = shape[1], values.new_empty(shape[2:]).numel()
    count = -(-(offset + len(values)) // (width * inner))
    whole = offset == 0 and len(values) == count * width * inner
    energy = values.square()
    there: Tensor | None = None
    if not whole:
        padding = (offset, count * width * inner - offset - len(values))
        there = torch.nn.functional.pad(torch.ones_like(values), padding)
        there = there.view(count, width, inner).sum(dim=2)  # (k, d)
        energy = torch.nn.functional.pad(energy, padding)
    energy = energy.view(count, width, inner).sum(dim=2)  # (k, d)
    rows, columns = (values.new_full((each,), inner) for each in (count, width))
    rows, columns = rows * width, columns * count
    if there is not None:
        rows, columns = there.sum(dim=1), there.sum(dim=0)
    by_column = torch.ones_like(columns)
    for _ in range(_ROUNDS):
        by_row = _root_mean(energy @ by_column.square().reciprocal(), rows)
        by_column = _root_mean(by_row.square().reciprocal() @ energy, columns)
    units = (by_row[:, None] * by_column).repeat_interleave(inner, dim=1).reshape(-1)
    return units if whole else units[offset : offset + len(values)]


def _root_mean(sums: Tensor, entries: Tensor) -> Tensor:
    usable = (entries >= LEAST_ENTRIES) & (sums > 0)
    over_all = (sums.sum() / entries.sum()).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(usable, sums / entries.clamp_min(1.0), over_all).sqrt()
