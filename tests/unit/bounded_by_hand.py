"""Bounded values written anew, value by value, from the page on formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def bounded_by_hand(
    part: NDArray[Any], shape: Sequence[int], start: int = 0
) -> NDArray[np.float64]:
    """Three rounds of rows and columns, each of mean square 1, then cut off at 3."""
    row = math.prod(shape[1:])
    inner = math.prod(shape[2:])
    values = [float(each) for each in part]
    if len(shape) < 2 or len(values) < 4 * row:
        unit = root_mean(values)
        while (narrower := root_mean([max(-2 * unit, min(2 * unit, v)) for v in values])) < (
            unit * (1 - 1e-6)
        ):
            unit = narrower
        return np.array([max(-3.0, min(3.0, v / (unit or 1.0))) for v in values])
    places = [divmod(start + at, row) for at in range(len(values))]
    cells = [(i, rest // inner) for i, rest in places]
    rows = {i: 1.0 for i, _ in cells}
    columns = {j: 1.0 for _, j in cells}
    for _ in range(3):
        for lines, which, others in ((rows, 0, columns), (columns, 1, rows)):
            divided = [v / others[c[1 - which]] for v, c in zip(values, cells, strict=True)]
            over_all = root_mean(divided) or 1.0
            for line in lines:
                found = [v for v, c in zip(divided, cells, strict=True) if c[which] == line]
                lines[line] = (root_mean(found) or over_all) if len(found) >= 4 else over_all
    scaled = [v / (rows[i] * columns[j]) for v, (i, j) in zip(values, cells, strict=True)]
    return np.array([max(-3.0, min(3.0, v)) for v in scaled])


def root_mean(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values)) if values else 0.0
