"""Compute bounded values of a live tensor as in `bounded_readings`, but with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from countermark.schemes.bounded_readings import BOUND, LEAST_ENTRIES, compute_bounded_spread

# One round is enough, because the units are computed again at each training step.
_ROUNDS = 1


def bound_values(part: Tensor, shape: tuple[int, ...], start: int = 0) -> Tensor:
    """Divide consecutive values of a tensor by their units and clamp them; units get no gradient.

    Args:
        part: (n,) the values, in C order.
        shape: of the whole tensor.
        start: position of the first value in the tensor.

    Returns: (n,) float32.
    """
    values = part.float()
    row = 1
    for size in shape[1:]:
        row *= size
    # Too few values for a unit of each column: use one unit for all values.
    if len(shape) < 2 or len(part) < LEAST_ENTRIES * row:
        unit = compute_bounded_spread(values.detach().cpu().numpy()) or 1.0
        return (values / unit).clamp(-BOUND, BOUND)
    # The units are constants of this step: the mark shall move values, not scales.
    with torch.no_grad():
        units = _compute_units(values.detach(), shape, start % row)
    return (values / units).clamp(-BOUND, BOUND)


def _compute_units(values: Tensor, shape: tuple[int, ...], offset: int) -> Tensor:
    """Compute the unit (n,) of each value: the unit of its row times the unit of its column."""
    width, inner = shape[1], values.new_empty(shape[2:]).numel()
    count = -(-(offset + len(values)) // (width * inner))
    whole = offset == 0 and len(values) == count * width * inner
    energy = values.square()
    # `there` counts the values in each cell where the part covers rows only partly.
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
        by_row = _compute_root_mean(energy @ by_column.square().reciprocal(), rows)
        by_column = _compute_root_mean(by_row.square().reciprocal() @ energy, columns)
    units = (by_row[:, None] * by_column).repeat_interleave(inner, dim=1).reshape(-1)
    return units if whole else units[offset : offset + len(values)]


def _compute_root_mean(sums: Tensor, entries: Tensor) -> Tensor:
    """Return roots of sums over counts; short or zero rows get the root of the overall mean."""
    usable = (entries >= LEAST_ENTRIES) & (sums > 0)
    over_all = (sums.sum() / entries.sum()).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(usable, sums / entries.clamp_min(1.0), over_all).sqrt()
