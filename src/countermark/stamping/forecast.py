"""Forecast of bit errors after changes of the weights, from the weights' own distribution.

Let g be a change of single values, x the values in units of their spread, and z = y/√n the reading
of a bit that was given the margin c. For random signs, which the attacker does not know, the
reading after g is a normal variable of

    mean ρ·c,  variance v − κ² + (κ − ρ)²,  v = E g(x)², κ = E x·g(x), ρ = E g′(x)

where ρ is the share of a small shift that passes g, computed as a difference quotient over the
shift itself. A bit is wrong with probability Q(mean / deviation). Noise of r spreads gives Q(c/r).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
"""Values of one tensor in units of their spread, (rows, width) along the tensor's last axis."""

_LEAST_STEP = 1e-3  # spreads: least step of a difference quotient
# Strengths of the usual changes: spreads of noise, shares of pruned weights, bits of rounding.
NOISE = (0.5, 1.0, 3.0)
PRUNED = (0.5, 0.9, 0.99)
ROUNDED = (8, 4)


@dataclass(frozen=True)
class Moments:
    """The moments v, κ and ρ of a change of values, as the module's docstring defines them."""

    v: float
    kappa: float
    rho: float

    def compute_error_rate(self, margin: float) -> float:
        """Return the expected share of wrong bits among bits with this margin, 0 to ½."""
        variance = max(0.0, self.v - self.kappa**2) + (self.kappa - self.rho) ** 2
        # Without variance every bit is right, unless the change removes the mark completely.
        if variance == 0.0:
            return 0.0 if self.rho > 0 else 0.5
        return 0.5 * math.erfc(self.rho * margin / math.sqrt(2 * variance))


def forecast_error_rates(
    sample: Iterable[Rows], *, margin: float, served: float
) -> dict[str, float]:
    """Return the expected bit error rate, 0 to ½, after each of the usual changes, by its name.

    Args:
        sample: some values of each tensor that carries the mark.
        margin: c, the margin of each bit.
        served: n, the number of values that serve a bit.
    """
    # A bit's margin of c·√n is shared by its n values: each moves by c/√n spreads.
    tensors, step = list(sample), max(_LEAST_STEP, margin / math.sqrt(served))
    rates = {
        f"noise of {r:g} std": Moments(1 + r * r, 1.0, 1.0).compute_error_rate(margin)
        for r in NOISE
    }
    for name, change in _list_changes().items():
        rates[name] = _compute_moments(tensors, change, step).compute_error_rate(margin)
    return rates


Change = Callable[[Rows], Callable[[Rows], Rows]]
"""A function of a tensor's values; it returns the change of values that fits the tensor."""


def _list_changes() -> Mapping[str, Change]:
    """Return the usual changes by name."""
    pruned = {f"pruning {100 * share:g} %": _make_pruning(share) for share in PRUNED}
    return pruned | {f"int{bits}": _make_rounding(bits) for bits in ROUNDED}


def _make_pruning(share: float) -> Change:
    """Return the change that sets the smallest magnitudes of a tensor to zero."""

    def fit_pruning(rows: Rows) -> Callable[[Rows], Rows]:
        """Fix the threshold from the unchanged values of the tensor."""
        least = np.quantile(np.abs(rows), share)
        return lambda values: np.where(np.abs(values) > least, values, 0.0)

    return fit_pruning


def _make_rounding(bits: int) -> Change:
    """Return the change that rounds symmetrically, with one scale for each row."""

    def fit_rounding(rows: Rows) -> Callable[[Rows], Rows]:
        """Fix each row's step from the unchanged values of the tensor."""
        levels = 2 ** (bits - 1) - 1
        step = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / levels, 1e-12)
        return lambda values: np.round(values / step) * step

    return fit_rounding


def _compute_moments(tensors: list[Rows], change: Change, step: float) -> Moments:
    """Return the moments of a change over all values of a sample."""
    v = kappa = rho = 0.0
    total = max(1, sum(rows.size for rows in tensors))
    for rows in tensors:
        # g is fixed before the shift: an attacker computes threshold or scale once for the tensor.
        g = change(rows)
        changed = g(rows)
        v += float((changed**2).sum())
        kappa += float((changed * rows).sum())
        rho += float((g(rows + step) - g(rows - step)).sum()) / (2 * step)
    return Moments(v / total, kappa / total, rho / total)
