"""Many small MLPs that each bear a mark of their own, trained as one stack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.uchida.training import compute_usual_spread
from countermark.training.data import Dataset
from countermark.training.loop import seed_torch
from countermark.training.models import build

Weights = dict[str, NDArray[np.float32]]
SHAPES = {"0.weight": (64, 784), "0.bias": (64,), "2.weight": (10, 64), "2.bias": (10,)}


def hosts(seeds: Sequence[int], *, data: Dataset, epochs: int, scheme: Uchida | None = None
          ) -> list[tuple[Weights, Key | None]]:  # fmt: skip
    """One MLP for each seed, with a mark in one whole tensor where there is a scheme.

    The penalty is that of `UchidaTraining` with the hinge; the data order is the seed's own.
    """
    states = []
    for seed in seeds:
        seed_torch(seed, "init")
        states.append(build("mlp", {}).state_dict())
    stack = {name: torch.stack([each[name] for each in states]) for name in SHAPES}
    stack = {name: each.requires_grad_() for name, each in stack.items()}
    keys = [None if scheme is None else _key(scheme, seed) for seed in seeds]
    mark = _Marks(scheme, [key for key in keys if key]) if scheme else None
    optimizer = torch.optim.Adam(stack.values(), 1e-3)
    images, labels = data.normalised(data.train_images).flatten(1), data.train_labels
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(epochs):
        rows = torch.stack([torch.randperm(len(labels), generator=each) for each in orders])
        for batch in rows.split(50, dim=1):  # (N, 50)
            optimizer.zero_grad()
            hidden = torch.baddbmm(stack["0.bias"][:, None], images[batch], stack["0.weight"].mT)
            scores = torch.baddbmm(stack["2.bias"][:, None], hidden.relu(), stack["2.weight"].mT)
            loss = F.cross_entropy(scores.flatten(0, 1), labels[batch].flatten(), reduction="sum")
            loss = loss / batch.shape[1]
            (loss + mark.penalty(stack) if mark else loss).backward()
            optimizer.step()
    finished = {name: each.detach().numpy() for name, each in stack.items()}
    return [({n: each[at] for n, each in finished.items()}, key) for at, key in enumerate(keys)]


def initial(seeds: Sequence[int]) -> list[Weights]:
    """What `hosts` of these seeds begin with."""
    found = []
    for seed in seeds:
        seed_torch(seed, "init")
        found.append({name: each.numpy() for name, each in build("mlp", {}).state_dict().items()})
    return found


def module_of(weights: Weights) -> nn.Module:
    """A live model with such weights."""
    model = build("mlp", {})
    model.load_state_dict({name: torch.from_numpy(each) for name, each in weights.items()})
    return model


def _key(scheme: Uchida, seed: int) -> Key:
    layer = str(scheme.layer)
    material = KeyMaterial.from_test_seed(seed)
    return scheme.generate_key({layer: SHAPES[layer]}, owner="pairs", material=material)


class _Marks:
    """The penalties of all hosts, added up."""

    def __init__(self, scheme: Uchida, keys: Sequence[Key]) -> None:
        self._scheme, self._layer = scheme, str(scheme.layer)
        rows = [np.concatenate(list(scheme.generate_row_blocks(key))) for key in keys]
        signs = np.stack([2.0 * key.message - 1 for key in keys])
        matrix = np.stack(rows) * signs[:, :, None]
        spread = compute_usual_spread(scheme, keys[0]) * np.linalg.norm(matrix[0, 0])
        self._rows = torch.from_numpy((matrix / spread).astype(np.float32))  # (N, T, M)

    def penalty(self, stack: dict[str, Tensor]) -> Tensor:
        z = torch.bmm(self._rows, stack[self._layer].flatten(1)[:, :, None])  # (N, T, 1)
        return self._scheme.strength * (self._scheme.margin - z).relu().sum()
