"""The training half of a stamp: a hinge loss that keeps every bit at its margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from countermark.checkpoints import Array
from countermark.errors import CapacityError
from countermark.keys.key import Key
from countermark.schemes.bounded_training import bound_values
from countermark.schemes.stamp.scheme import CarrierStream, Stamp
from countermark.schemes.weights import WeightScheme
from countermark.schemes.weights_training import WeightTraining

MOST_VALUES = 1 << 26
"""Values whose bits and signs are kept in memory while training, 5 bytes each."""


class StampTraining(WeightTraining):
    """The loss λ·Σ_t max(0, margin − a_t·z_t), z_t = y_t / √n_t, for one key."""

    def __init__(
        self, scheme: WeightScheme, key: Key, unmarked: Sequence[Mapping[str, Array]] = ()
    ) -> None:
        super().__init__(scheme, key, unmarked)
        self._stamp = stamp = cast(Stamp, scheme)
        self._places = stamp.draw_places(key.tensors, key.material)
        count = sum(map(len, self._places.values()))
        if count > MOST_VALUES:
            raise CapacityError(
                f"{count:,} values are too many to train a mark into (at most {MOST_VALUES:,}): "
                "name fewer layers, or set values"
            )
        bits, signs = CarrierStream(key).take_carriers(count)
        # n_t, the number of values that carry bit t, and √n_t for its z_t.
        served = np.bincount(bits, minlength=stamp.bits)
        message = 2.0 * key.message - 1.0
        # A bit without values keeps y_t = 0; the 1 avoids a division by zero.
        factors = message / np.sqrt(np.maximum(1, served))
        # int32 and int8 keep memory within the 5 bytes a value of `MOST_VALUES`.
        self._bits = torch.from_numpy(bits.astype(np.int32))  # (N,)
        self._signs = torch.from_numpy(signs.copy())  # (N,)
        self._factors = torch.from_numpy(factors.astype(np.float32))  # (T,)

    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the hinge loss (), summed over the T bits."""
        device = weights[0].device
        self._bits, self._signs = self._bits.to(device), self._signs.to(device)
        self._factors = self._factors.to(device)
        bounded = self._stamp.reading == "bounded"
        parts = [
            bound_values(_read_values(weight, place), tuple(weight.shape), place.start)
            if bounded
            else _normalise_values(weight, place)
            for weight, place in zip(weights, self._places.values(), strict=True)
        ]
        signed = torch.cat(parts) * self._signs  # (N,)
        y = torch.zeros(self._stamp.bits, device=device).index_add(0, self._bits, signed)
        return self._stamp.strength * (self._stamp.margin - self._factors * y).clamp_min(0).sum()


def _read_values(weight: Tensor, place: range) -> Tensor:
    """Return the values (n,) of a tensor that carry the stamp."""
    return weight.float().reshape(-1)[place.start : place.stop]


def _normalise_values(weight: Tensor, place: range) -> Tensor:
    """Return the carrying values of a tensor divided by their spread, which gets no gradient."""
    part = _read_values(weight, place)
    spread = part.detach().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return part / spread
