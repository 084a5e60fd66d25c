"""Wang et al. 2020: a weight has converged when its last epoch values hardly differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from countermark.errors import ConfigError
from countermark.schemes.weights import MASK, ConvergedScheme
from countermark.schemes.weights_training import Freezer


class ConvergenceDetector(Freezer):
    """A freezer that selects converged weights after some epochs (Wang et al. 2020, footnote 1).

    The scheme gives the number of epoch values to compare, the bound on their sample standard
    deviation, and the epoch after which the masks are fixed.
    """

    def __init__(self, scheme: ConvergedScheme) -> None:
        self._std, self._window = scheme.convergence_std, scheme.convergence_epochs
        self._start_epoch = scheme.start_epoch
        self._seen = 0
        self._history: list[list[Tensor]] = []

    def end_epoch(self, tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]] | None:
        """Record the tensors' values; at `start_epoch` return a flat 0/1 mask for each tensor.

        Raises:
            ConfigError: no weight has converged.
        """
        # Copies on the CPU: the host changes its weights in place.
        values = [tensor.detach().float().cpu().clone() for tensor in tensors.values()]
        self._history = [*self._history[1 - self._window :], values]
        self._seen += 1
        if self._seen < self._start_epoch:
            return None
        masks = {
            f"{MASK}.{name}": (torch.stack(past).std(dim=0) < self._std).numpy()
            for name, past in zip(tensors, zip(*self._history, strict=True), strict=True)
        }
        # An empty mask would leave no weight to carry the mark.
        if not any(mask.any() for mask in masks.values()):
            total = sum(mask.size for mask in masks.values())
            raise ConfigError(
                f"0 of {total} weights have converged after {self._seen} epochs (standard "
                f"deviation of the last {self._window} below {self._std}): start later, or raise "
                "convergence_std"
            )
        return {name: mask.astype("uint8").reshape(-1) for name, mask in masks.items()}  # (M_l,)

    def export_state(self) -> list[list[Tensor]]:
        """Return the number of epochs seen, and the values of the last epochs."""
        return [[torch.tensor(self._seen)], *self._history]

    def restore(self, state: list[list[Tensor]]) -> None:
        """Continue from a saved state."""
        self._seen, self._history = int(state[0][0]), state[1:]
