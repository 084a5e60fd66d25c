"""Many MLPs trained together: one stack of parameters of N hosts, computed by batched products.

Up to rounding, each host becomes the model that `fit` would train alone; the other hosts of the
stack do not change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from countermark.errors import DataError
from countermark.training.data import Dataset
from countermark.training.loop import draw_epoch_order
from countermark.training.models import Recipe
from countermark_lab.hosts.grey_images import CLASSES, SIDE

_LANES = 16  # the parameters of a host are padded to whole vectors and cache lines


class Stack:
    """N MLPs that train together, each parameter being a tensor (N, ...).

    All hosts take the same number of steps with the same batch size.
    """

    def __init__(
        self, states: Sequence[Mapping[str, Tensor]], parts: Sequence[Dataset],
        orders: Sequence[int], recipe: Recipe,
    ) -> None:  # fmt: skip
        """Stack the hosts.

        Args:
            states: the initial weights of each MLP.
            parts: the training rows of each MLP, equally many.
            orders: the seed of the data order of each MLP.
            recipe: Adam, without weight decay.

        Raises:
            DataError: there are fewer training rows than one batch holds.
        """
        self._parts, self._orders = parts, orders
        self._rows, self._batch = len(parts[0].train_labels), recipe.batch_size
        self._steps = self._rows // self._batch
        if self._steps < 1:
            raise DataError(
                f"{parts[0].name}: expected at least one batch of {self._batch} training rows, "
                f"got {self._rows}: take more rows or a smaller batch_size"
            )
        self._shapes = {name: each.shape for name, each in states[0].items()}
        # Unpadded, Adam's rounding of a weight would depend on the place of its host.
        size = sum(each.numel() for each in states[0].values())
        self._flat = torch.zeros(len(states), math.ceil(size / _LANES) * _LANES)
        self._flat.grad = torch.zeros_like(self._flat)
        self._parameters, self._into = (
            self._view_by_name(self._flat),
            self._view_by_name(self._flat.grad),
        )
        for name, stacked in self._parameters.items():
            stacked.copy_(torch.stack([each[name] for each in states]))
        # Adam works on each element alone: one on the stack is as good as one for each host.
        self._adam = torch.optim.Adam([self._flat], recipe.lr, fused=True)
        self._images = torch.empty(len(states), self._batch, SIDE * SIDE)

    def train(self, epochs: int, advance: Callable[[float], None]) -> None:
        """Train all hosts for `epochs` epochs.

        `advance` receives the progress of each step as a share of an epoch, summed over the hosts.
        """
        for epoch in range(epochs):
            orders = [draw_epoch_order(seed, epoch, self._rows) for seed in self._orders]
            for step in range(self._steps):
                at = slice(step * self._batch, (step + 1) * self._batch)
                labels = self._load_batch([order[at] for order in orders])
                self._compute_gradients(labels)
                self._adam.step()
                advance(len(orders) / self._steps)

    def list_states(self) -> Iterator[dict[str, Tensor]]:
        """Yield the parameters of one host after the other, by name."""
        for at in range(len(self._flat)):
            yield {name: stacked[at] for name, stacked in self._parameters.items()}

    def _view_by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views (N, ...) into parameters or gradients (N, P), by parameter name."""
        found, at = {}, 0
        for name, shape in self._shapes.items():
            found[name] = flat[:, at : at + shape.numel()].view(-1, *shape)  # (N, ...)
            at += shape.numel()
        return found

    def _load_batch(self, rows: Sequence[Tensor]) -> Tensor:
        """Load the training rows (B,) of each host into `_images` (N, B, 784).

        Returns: their labels (N, B).
        """
        for to, part, chosen in zip(self._images, self._parts, rows, strict=True):
            # Indexing with [chosen] would take three times as long.
            images = part.train_images.index_select(0, chosen)
            to.copy_(part.normalised(images).flatten(1))  # (B, 1, 28, 28) -> (B, 784)
        return torch.stack([p.train_labels[r] for p, r in zip(self._parts, rows, strict=True)])

    def _compute_gradients(self, labels: Tensor) -> None:
        """Compute gradients of each host's mean cross-entropy by the chain rule, into `_flat.grad`.

        The formulas are written out, because autograd allocates all gradients anew at each step,
        which costs a third more.
        """
        weight, bias, out_weight, out_bias = self._parameters.values()
        to_weight, to_bias, to_out_weight, to_out_bias = self._into.values()
        hidden = torch.baddbmm(bias[:, None], self._images, weight.mT).relu_()  # (N, B, 64)
        scores = torch.baddbmm(out_bias[:, None], hidden, out_weight.mT)  # (N, B, 10)
        # d loss / d scores = softmax - one-hot labels, over the batch size for the mean.
        errors = (scores.softmax(2) - F.one_hot(labels, CLASSES)) / self._batch
        torch.bmm(errors.mT, hidden, out=to_out_weight)
        torch.sum(errors, 1, out=to_out_bias)
        # The derivative of ReLU is 1 where its output is positive, else 0.
        behind = torch.bmm(errors, out_weight).mul_(hidden > 0)  # (N, B, 64)
        torch.bmm(behind.mT, self._images, out=to_weight)
        torch.sum(behind, 1, out=to_bias)
