"""Values of one tensor, epoch by epoch, for Figures 1 and 5 of Wang et al. 2020."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.keys.key import Key
from countermark.schemes.weights import ConvergedScheme

BIN = 0.1
"""Width of a histogram bin (Wang et al. 2020, Relationship between MANU and AUTO)."""

CONVERGED_STD = ConvergedScheme.convergence_std
WINDOW = ConvergedScheme.convergence_epochs
"""A weight has converged when its last five epoch values deviate by less (footnote 1)."""

_EARLY = ConvergedScheme.start_epoch  # epoch at which the paper marks its MLP
_SHOWN = 12  # number of weights whose trajectory is stored


class TensorWatch:
    """Recorder of the values of one tensor after each epoch."""

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._epochs: list[Tensor] = []  # (M,) each

    def end_epoch(self, model: nn.Module) -> None:
        """Record the values of the tensor."""
        # A copy on the CPU: training goes on to change the tensor in place.
        self._epochs.append(
            model.state_dict()[self._layer].detach().float().cpu().flatten().clone()
        )

    def get_state(self) -> list[Tensor]:
        """Return the recorded values for a checkpoint, (M,) for each epoch."""
        return list(self._epochs)

    def restore(self, state: list[Tensor]) -> None:
        """Replace the recorded values by those of a checkpoint."""
        self._epochs = list(state)

    def summarise_epochs(self, key: Key | None) -> dict[str, Any]:
        """Summarise the recorded values as JSON values, rounded to four digits.

        Args:
            key: a key whose trained gate is summarised too; None without one.

        Returns: `histogram`, the counts of the last values in bins of width .1, the first of which
            is number `first` (bin i begins at i/10); `trajectories`, a few weights by epoch;
            `converged`, the share of converged weights by epoch, from the fifth on; and for a
            trained gate `gate`, its magnitudes, with the deviation of each weight over the last
            five epochs (`late`) and over epochs 2 to 6 (`early`).
        """
        seen = torch.stack(self._epochs).double().numpy()  # (E, M)
        # Evenly spread over the tensor; results hold a few trajectories, not all weights.
        shown = np.linspace(0, seen.shape[1] - 1, _SHOWN).astype(int)
        figures: dict[str, Any] = {
            "histogram": _count_bins(seen[-1]),
            "trajectories": [_round_values(each) for each in seen[:, shown].T],
            "converged": [
                float((_compute_deviation(seen, last) < CONVERGED_STD).mean())
                for last in range(WINDOW, len(seen) + 1)
            ],
        }
        # A gate among the frozen tensors was not trained with the host (MANU).
        if key is not None and "reader.gate" in key.learnt and not key.frozen:
            figures["gate"] = _round_values(np.abs(key.learnt["reader.gate"]))
            figures["late"] = _round_values(_compute_deviation(seen, len(seen)))
            figures["early"] = _round_values(_compute_deviation(seen, min(_EARLY, len(seen))))
        return figures


def _compute_deviation(seen: NDArray[np.float64], last: int) -> NDArray[np.float64]:
    """Compute sample standard deviations (M,) of weights over a window of epochs.

    Args:
        seen: the values (E, M).
        last: number of the last epoch of the window.
    """
    window = seen[max(0, last - WINDOW) : last]
    deviation: NDArray[np.float64] = window.std(axis=0, ddof=1 if len(window) > 1 else 0)
    return deviation


def _count_bins(values: NDArray[np.float64]) -> dict[str, Any]:
    """Count the values in bins of width .1."""
    bins = np.floor(values / BIN).astype(int)
    first = int(bins.min())
    return {"first": first, "counts": np.bincount(bins - first).tolist()}


def _round_values(values: NDArray[Any]) -> list[float]:
    """Round values to four significant digits."""
    return [float(f"{value:.4g}") for value in values]
