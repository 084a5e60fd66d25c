"""Uchida et al. 2017, the training half: the embedding regularizer of Section 3.2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from countermark.checkpoints import Array
from countermark.errors import CapacityError
from countermark.keys.key import Key
from countermark.schemes.bounded_training import bound_values
from countermark.schemes.convergence import ConvergenceDetector
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.weights import WeightScheme
from countermark.schemes.weights_training import Freezer, WeightTraining

MOST_ENTRIES = 1 << 28  # entries of X kept in memory while training, 1 GiB in float32


class UchidaTraining(WeightTraining):
    """E_R of one key, with an explicit gradient: one product forward, one product backward."""

    def __init__(
        self, scheme: WeightScheme, key: Key, unmarked: Sequence[Mapping[str, Array]] = ()
    ) -> None:
        super().__init__(scheme, key, unmarked)
        self._uchida = uchida = cast(Uchida, scheme)
        signs = 2.0 * key.message.astype(np.float32) - 1.0
        width = uchida.count_all_read_values(key)
        # Refuse before the matrix is allocated: layers may have any size.
        if uchida.bits * width > MOST_ENTRIES:
            raise CapacityError(
                f"a matrix of {uchida.bits} bits × {width:,} weights does not fit into memory "
                f"(at most {MOST_ENTRIES:,} entries): name fewer layers, or set read=filter_mean"
            )
        rows = np.concatenate([b.astype(np.float32) for b in uchida.generate_row_blocks(key)])
        # One matrix for key and message: bit t is as it should be when [against·w]_t < 0.
        self._against = torch.from_numpy(-signs[:, None] * rows)  # (T, M)
        if uchida.regularizer == "hinge":
            row_norm = torch.linalg.vector_norm(self._against[0])
            self._against *= uchida.strength / (compute_usual_spread(uchida, key) * row_norm)
        margin = uchida.strength * cast(float, uchida.margin)  # resolved in the scheme
        self._margins = torch.full((uchida.bits,), margin)  # (T,)
        # With a mask of converged weights, only the positions of its ones are read.
        self._picked = [
            None if mask is None else torch.from_numpy(np.flatnonzero(mask))
            for mask in (uchida.get_mask(key, name) for name in key.tensors)
        ]

    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """Return λ·E_R (), E_R summed over the T bits."""
        w = self._read_vector(weights)
        if self._against.device != w.device:
            self._against = self._against.to(w.device)
            self._margins = self._margins.to(w.device)
        if self._uchida.regularizer == "hinge":
            loss = _HingeFunction.apply(w, self._against, self._margins)  # type: ignore[no-untyped-call]
        else:
            loss = _CrossEntropyFunction.apply(w, self._against, self._uchida.strength)  # type: ignore[no-untyped-call]
        return cast(Tensor, loss)

    def _read_vector(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the vector w (M,) that the key reads from the host's tensors."""
        mean, bounded = self._uchida.read == "filter_mean", self._uchida.reading == "bounded"
        parts = []
        for weight, picked in zip(weights, self._picked, strict=True):
            # Reading in float32 keeps bf16 hosts from losing small steps of the mark.
            flat = (weight.float().mean(dim=0) if mean else weight.float()).reshape(-1)  # (M_l,)
            if bounded:
                flat = bound_values(flat, tuple(weight.shape))
            parts.append(flat if picked is None else flat[picked.to(flat.device)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # (M,)

    @classmethod
    def make_freezer(cls, scheme: WeightScheme) -> Freezer | None:
        """Return the convergence detector if only converged weights carry the mark, else None."""
        uchida = cast(Uchida, scheme)
        if uchida.select == "all":
            return None
        return _ReadConvergenceDetector(uchida)


def compute_usual_spread(uchida: Uchida, key: Key) -> float:
    """Return the root mean square of the read values for the usual initial variance 1 / fan-in.

    It is 1 for bounded values. It follows from the shapes alone, so that the margin of the hinge
    means the same in every layer and at every moment of training.
    """
    if uchida.reading == "bounded":
        return 1.0
    squares = total = 0.0
    for shape in key.tensors.values():
        read = uchida.count_read_values(shape)
        filters = shape[0] if uchida.read == "filter_mean" else 1
        squares += read / (max(1, math.prod(shape[1:])) * filters)
        total += read
    return math.sqrt(squares / total)


class _ReadConvergenceDetector(ConvergenceDetector):
    """A convergence detector of the values read: the weights, or their means over filters."""

    def __init__(self, uchida: Uchida) -> None:
        super().__init__(uchida)
        self._mean = uchida.read == "filter_mean"

    def end_epoch(self, tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]] | None:
        """Record the read values of an epoch; see `ConvergenceDetector.end_epoch`."""
        # The key reads means over filters, so that means are what must have converged.
        if self._mean:
            tensors = {name: tensor.mean(dim=0) for name, tensor in tensors.items()}
        return super().end_epoch(tensors)


class _CrossEntropyFunction(torch.autograd.Function):
    """The loss λ·Σ_t −log sigmoid(z_t), z = (2m − 1)∘X·w = −against·w, and its gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, against: Tensor, strength: float) -> Tensor:
        """Return the loss, and keep its gradient."""
        minus_z = torch.mv(against, w)
        # Eq. (3): E_R = −Σ_t (b_t log y_t + (1 − b_t) log(1 − y_t)), y = sigmoid(X·w)
        ctx.gradient = torch.mv(against.t(), torch.sigmoid(minus_z).mul_(strength))
        return F.softplus(minus_z).sum().mul_(strength)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, times the gradient of the loss."""
        return ctx.gradient * gradients[0], None, None


class _HingeFunction(torch.autograd.Function):
    """The loss λ·Σ_t max(0, margin − z_t / s), s the deviation of z on usual unmarked weights.

    `against` holds −λ/s times the signed rows and `margins` holds λ·margin, so that a step needs
    few operations: beside a small host their number decides the cost of the mark.
    Differs from the paper: a bit that has its margin gets no gradient, so the weights move less.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, against: Tensor, margins: Tensor) -> Tensor:
        """Return the loss, and keep its gradient."""
        missing = torch.addmv(margins, against, w).relu_()
        ctx.gradient = torch.mv(against.t(), missing.sign())
        return missing.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, times the gradient of the loss."""
        return ctx.gradient * gradients[0], None, None
