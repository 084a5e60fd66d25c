"""Examples for a hardened reader beside the marked host: unmarked weights, and incomplete hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from countermark.keys.key import Key
from countermark.schemes.independent_network.scheme import IndependentNetwork


class MissingUnits:
    """Random masks that remove hidden units from weight vectors, drawn anew for each step.

    The first row lacks the units with the largest weights, the next row lacks random units, and so
    on in turn. With `pruned`, the second kind of row lacks its smallest weights instead.
    """

    def __init__(self, network: IndependentNetwork, key: Key) -> None:
        permuter = network.make_permuter(key.tensors)
        self._size, self._dropped, self._pruned = permuter.size, network.dropped, network.pruned
        self._unit = torch.from_numpy(permuter.unit)  # (M,)
        self._of_a_unit = torch.from_numpy(permuter.stride > 0)  # (M,)
        seed = int(key.make_stream("missing").take_words(1)[0])
        self._generator = torch.Generator().manual_seed(seed)

    def draw_masks(self, rows: Tensor) -> Tensor:
        """Return masks (n, M) for rows (n, M): 1 for each weight that is left, 0 for the others."""
        shares = torch.rand(len(rows), 1, generator=self._generator) * self._dropped
        order = torch.rand(len(rows), self._size, generator=self._generator)
        squares = rows[::2].square() * self._of_a_unit
        # Every second row ranks the units by the sum of their squared weights, not at random.
        order[::2] = torch.zeros_like(order[::2]).index_add_(1, self._unit, squares)
        # Sorting twice turns an order into ranks.
        ranks = order.argsort(dim=1, descending=True).argsort(dim=1)
        left = ranks >= (shares * self._size).round()  # (n, units)
        # Weights that belong to no hidden unit always stay.
        masks = left[:, self._unit] | ~self._of_a_unit  # (n, M)
        if self._pruned:
            masks[1::2] = self._prune_smallest(rows[1::2])
        return masks.float()

    def _prune_smallest(self, rows: Tensor) -> Tensor:
        """Return masks (n, M) that prune a random share of the smallest weights of rows (n, M)."""
        shares = torch.rand(len(rows), 1, generator=self._generator) * self._pruned
        ranks = rows.abs().argsort(dim=1).argsort(dim=1)
        return ranks >= (shares * rows.shape[1]).round()

    def toss_coins(self, count: int) -> Tensor:
        """Toss fair coins (count,)."""
        return torch.rand(count, generator=self._generator) < 0.5

    def export_state(self) -> Tensor:
        """Return the state of the random numbers."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Continue from a saved state."""
        self._generator.set_state(state)


class NegativeVectors:
    """Weight vectors without the mark, drawn anew for each step of the reader.

    They are of five kinds, in turn: hidden-unit permutations of the current host, Gaussian noise
    with the host's spread, the host with flipped signs, unmarked models, and permutations of
    unmarked models.
    """

    _TURN = ("permuted", "other", "noise", "mixed", "permuted", "other", "flipped", "mixed")

    def __init__(self, network: IndependentNetwork, key: Key, unmarked: Tensor) -> None:
        permuter = network.make_permuter(key.tensors)
        self._size, self._count, self._turn = permuter.size, network.negatives, 0
        self._unit, self._offset, self._stride = (
            torch.from_numpy(each) for each in (permuter.unit, permuter.offset, permuter.stride)
        )
        self._unmarked = unmarked  # (P, M)
        seed = int(key.make_stream("negatives").take_words(1)[0])
        self._generator = torch.Generator().manual_seed(seed)

    def draw_rows(self, w: Tensor) -> Tensor:
        """Return the next negatives (K, M), for the host's vector w (M,) on the CPU."""
        turn = self._turn
        kinds = [self._TURN[(turn + at) % len(self._TURN)] for at in range(self._count)]
        self._turn = (turn + self._count) % len(self._TURN)
        permuted, other, mixed = (kinds.count(k) for k in ("permuted", "other", "mixed"))
        order = torch.rand(permuted + mixed, self._size, generator=self._generator).argsort(dim=1)
        # Only the unit in a weight's index changes: offset and stride give the rest of its place.
        places = order[:, self._unit] * self._stride + self._offset  # (n, M)
        drawn = torch.randint(len(self._unmarked), (other + mixed,), generator=self._generator)
        others = self._unmarked[drawn]
        noise = torch.randn(kinds.count("noise"), len(w), generator=self._generator)
        rows = [
            w[places[:permuted]],
            others[:other],
            others[other:].gather(1, places[permuted:]),
            noise * w.std(),
            -w.expand(kinds.count("flipped"), -1),
        ]
        return torch.cat(rows)

    def export_state(self) -> dict[str, Any]:
        """Return the position in the turn, and the random numbers."""
        return {"turn": self._turn, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._turn = state["turn"]
        self._generator.set_state(state["generator"])
