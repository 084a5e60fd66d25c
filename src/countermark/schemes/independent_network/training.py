"""Wang et al. 2020, the training half: host and reader are trained together on the loss L2.

The host gets the gradient λ·∂L2, and the reader gets ∂L2 through its own optimizer. The hardened
form shows the reader two more kinds of vectors:

- Weight vectors without the mark, with target ½. Without them the reader memorises its message and
  reads it from any model.
- Copies of the host that lack hidden units, with the message as target. Without them the mark
  gathers behind units that never fire, where the host's task does not protect it.

Half of the unmarked vectors then lack units as well, so that a lack of units is no sign of a mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from countermark.checkpoints import Array
from countermark.keys.key import Key
from countermark.schemes.convergence import ConvergenceDetector
from countermark.schemes.independent_network.augmentation import MissingUnits, NegativeVectors
from countermark.schemes.independent_network.readers import make_initial_reader
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.weights import WeightScheme
from countermark.schemes.weights_training import Freezer, WeightTraining

EPSILON = 1e-7
"""A bit whose probability is this near to its value is let go of: float32 knows no nearer, and the
frameworks of the paper's time clip there. The reader rests when every bit is."""


class IndependentNetworkTraining(WeightTraining):
    """L2 of one key. The reader takes a step whenever the host has taken one.

    If the loss is evaluated again on the same weights, as under gradient accumulation, the loss and
    the reader stay unchanged: every kind of loop trains the same pair of networks.
    """

    def __init__(
        self, scheme: WeightScheme, key: Key, unmarked: Sequence[Mapping[str, Array]] = ()
    ) -> None:
        super().__init__(scheme, key, unmarked)
        self._network = network = cast(IndependentNetwork, scheme)
        vectors = [network.read_vector(each, key) for each in unmarked]
        width = len(vectors[0])
        mask = network.get_gate_mask(key) if network.mode == "manu" else None
        self._reader = make_initial_reader(network, key, width, mask)
        # The gate of MANU is frozen.
        self._trained = [p for p in self._reader.parameters() if p.requires_grad]
        self._optimizer = torch.optim.Adam(self._trained, network.reader_lr, fused=True)
        self._targets = torch.from_numpy(key.message.astype(np.float32))  # (T,)
        self._negatives = self._missing = None
        if not network.as_published:
            self._negatives = NegativeVectors(network, key, torch.from_numpy(np.stack(vectors)))
            self._missing = MissingUnits(network, key) if network.positives else None
        self._seen: Tensor | None = None
        self._loss = self._gradient = torch.zeros(())

    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """Return λ·L2, the mean binary cross-entropy over the T bits."""
        w = self._read_vector(weights)
        # Compare values, not steps: the loop does not tell when its optimizer has stepped.
        if self._seen is None or not torch.equal(w, self._seen):
            self._take_step(w.detach().clone())
        return cast(Tensor, _KnownGradient.apply(w, self._loss, self._gradient))  # type: ignore[no-untyped-call]

    def finish(self, weights: Sequence[Tensor]) -> None:
        """Train the reader for more steps on the finished host, at a falling learning rate."""
        steps = 0 if self._network.as_published else self._network.settling
        w = self._read_vector(weights)
        for step in range(steps):
            for group in self._optimizer.param_groups:
                group["lr"] = self._network.reader_lr * (1 - step / steps)
            self._take_step(w)

    def export_post_commit_tensors(self) -> dict[str, NDArray[Any]]:
        """Return the reader's tensors by name."""
        return {
            f"reader.{name}": each.detach().cpu().numpy().copy()
            for name, each in self._reader.state_dict().items()
        }

    def export_state(self) -> dict[str, Any]:
        """Return reader, optimizer, random numbers, and the vector of the reader's last step."""
        return {
            "seen": self._seen,
            "loss": self._loss,
            "gradient": self._gradient,
            "reader": self._reader.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "negatives": self._negatives and self._negatives.export_state(),
            "missing": self._missing and self._missing.export_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._seen, self._loss = state["seen"], state["loss"]
        self._gradient = state["gradient"]
        self._reader.load_state_dict(state["reader"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._move_to_device(self._targets.device)
        if self._negatives:
            self._negatives.restore(state["negatives"])
        if self._missing:
            self._missing.restore(state["missing"])

    def _read_vector(self, weights: Sequence[Tensor]) -> Tensor:
        """Join the weights to the vector w (M,), and move the reader to their device."""
        # Reading in float32 keeps bf16 hosts from losing small steps of the mark.
        w = torch.cat([weight.float().reshape(-1) for weight in weights])
        if self._targets.device != w.device:
            self._move_to_device(w.device)
        return w

    def _move_to_device(self, device: torch.device) -> None:
        """Move the reader, its optimizer and the cached tensors to a device."""
        self._reader.to(device)
        self._optimizer.load_state_dict(self._optimizer.state_dict())  # moves the optimizer's state
        self._targets, self._loss = self._targets.to(device), self._loss.to(device)
        self._gradient = self._gradient.to(device)
        self._seen = None if self._seen is None else self._seen.to(device)

    def _take_step(self, w: Tensor) -> None:
        """Compute L2 and its gradient at w (M,), then take the reader's own step."""
        self._seen = w
        kept, unmarked = (each.to(w.device) for each in self._draw_companions(w.cpu()))
        marked = len(kept)
        shown = torch.cat([w * kept, unmarked]).requires_grad_()
        # The caller may have switched gradients off.
        with torch.enable_grad():
            logits = self._reader(shown)  # (P + negatives, T)
        strength, z = self._network.strength, logits.detach()
        # ∂/∂z of Eq. (1) is (sigmoid(z) − m)/T; the unmarked rows have m = ½. Both are averaged.
        errors = torch.sigmoid(z)
        errors[:marked] -= self._targets
        errors[:marked].masked_fill_(errors[:marked].abs() <= EPSILON, 0.0)
        errors[:marked] /= marked
        errors[marked:] -= 0.5
        errors[marked:] /= max(1, len(z) - marked)
        errors /= len(self._targets)
        self._loss = F.binary_cross_entropy_with_logits(z[0], self._targets) * strength
        # No error is left: neither host nor reader moves.
        if not errors.any():
            self._gradient = torch.zeros_like(w)
            return
        gradient, *own = torch.autograd.grad(logits, [shown, *self._trained], errors)
        self._gradient = (gradient[:marked] * kept).sum(dim=0) * strength
        for parameter, each in zip(self._trained, own, strict=True):
            parameter.grad = each
        self._optimizer.step()

    def _draw_companions(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Draw 0/1 factors (1 + positives, M) of w (M,), and unmarked rows (K, M)."""
        # The first row is the whole host; the others lack hidden units.
        kept = torch.ones(1 + (self._network.positives if self._missing else 0), len(w))
        unmarked = self._negatives.draw_rows(w) if self._negatives else w.new_zeros(0, len(w))
        if self._missing:
            kept[1:] = self._missing.draw_masks(w.expand(len(kept) - 1, -1))
            lacking = self._missing.toss_coins(len(unmarked))
            unmarked[lacking] *= self._missing.draw_masks(unmarked[lacking])
        return kept, unmarked

    @classmethod
    def make_freezer(cls, scheme: WeightScheme) -> Freezer | None:
        """Return the convergence detector for MANU, or None for AUTO."""
        network = cast(IndependentNetwork, scheme)
        if network.mode == "auto":
            return None
        return ConvergenceDetector(network)


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient with respect to w (M,) is known already."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG004
        """Return the loss, and keep its gradient."""
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, times the gradient of the loss."""
        return ctx.gradient * gradients[0], None, None
