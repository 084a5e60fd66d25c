"""What a change of the weights will cost bits, forecast from the weights' own distribution.

Let g be a change of single values, x the values in units of their spread, and z = y/√n the reading
of a bit that was given the margin c. For signs that nobody knows it is, after g, a normal number of

    mean ρ·c,  variance v − κ² + (κ − ρ)²,  v = E g(x)², κ = E x·g(x), ρ = E g′(x)

where ρ, the share of a small shift that g lets pass, is a difference quotient over the shift
itself. A bit is wrong with probability Q(mean / deviation). Noise of r spreads gives Q(c/r).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
"""Values of one tensor in units of their spread, (rows, width) as the tensor has its last axis."""

_LEAST_STEP = 1e-3  # spreads, of a difference quotient
NOISE = (0.5, 1.0, 3.0)
PRUNED = (0.5, 0.9, 0.99)
ROUNDED = (8, 4)


@dataclass(frozen=True)
class Moments:
    """v, κ and ρ of a change of values."""

    v: float
    kappa: float
    rho: float

    def error_rate(self, margin: float) -> float:
        """The expected share of wrong bits, of bits that were given this margin."""
        variance = max(0.0, self.v - self.kappa**2) + (self.kappa - self.rho) ** 2
        if variance == 0.0:
            return 0.0 if self.rho > 0 else 0.5
        return 0.5 * math.erfc(self.rho * margin / math.sqrt(2 * variance))


def forecast(sample: Iterable[Rows], *, margin: float, served: float) -> dict[str, float]:
    """The expected share of wrong bits after each of the usual changes.

    Args:
        sample: some values of each tensor that carries the mark.
        margin: c.
        served: n, how many values serve a bit.

    Returns: what was done to the expected bit error rate, 0 to ½.
    """
    tensors, step = list(sample), max(_LEAST_STEP, margin / math.sqrt(served))
    rates = {f"noise of {r:g} std": Moments(1 + r * r, 1.0, 1.0).error_rate(margin) for r in NOISE}
    for name, change in _changes().items():
        rates[name] = _moments(tensors, change, step).error_rate(margin)
    return rates


Change = Callable[[Rows], Callable[[Rows], Rows]]
"""From the values of a tensor to what is done to values like them."""


def _changes() -> Mapping[str, Change]:
    pruned = {f"pruning {100 * share:g} %": _prune(share) for share in PRUNED}
    return pruned | {f"int{bits}": _round(bits) for bits in ROUNDED}


def _prune(share: float) -> Change:
    """The smallest magnitudes of a tensor become 0."""

    def of(rows: Rows) -> Callable[[Rows], Rows]:
        least = np.quantile(np.abs(rows), share)
        return lambda values: np.where(np.abs(values) > least, values, 0.0)

    return of


def _round(bits: int) -> Change:
    """Symmetric rounding, one scale for each row."""

    def of(rows: Rows) -> Callable[[Rows], Rows]:
        levels = 2 ** (bits - 1) - 1
        step = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / levels, 1e-12)
        return lambda values: np.round(values / step) * step

    return of


def _moments(tensors: list[Rows], change: Change, step: float) -> Moments:
    """Over all values of a sample."""
    v = kappa = rho = 0.0
    total = max(1, sum(rows.size for rows in tensors))
    for rows in tensors:
        g = change(rows)
        changed = g(rows)
        v += float((changed**2).sum())
        kappa += float((changed * rows).sum())
        rho += float((g(rows + step) - g(rows - step)).sum()) / (2 * step)
    return Moments(v / total, kappa / total, rho / total)
