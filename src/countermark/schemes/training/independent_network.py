"""Wang et al. 2020, the training half: host and reader learn together from one L2.

The host gets λ·∂L2, the reader ∂L2 by an optimizer of its own. In the hardened form the reader also
sees weight vectors that bear no mark, with target ½: without them it memorises its message and
reads it from any model. And it sees copies of the host that lack hidden units, with the message as
target: without them the mark gathers behind units that never fire, where the task does not hold it.
Half of the unmarked vectors then lack units as well, so that a lack is no mark.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.errors import ConfigError, printable
from countermark.key import Key
from countermark.schemes.independent_network import IndependentNetwork
from countermark.schemes.reader import Logits
from countermark.schemes.training.base import Freezer, WeightTraining
from countermark.schemes.training.convergence import ConvergenceDetector
from countermark.schemes.white_box import WeightScheme
from countermark.weights import Array

EPSILON = 1e-7
"""A bit whose probability is this near to its value is let go of: float32 knows no nearer, and the
frameworks of the paper's time clip there. The reader rests when every bit is."""


class IndependentNetworkTraining(WeightTraining):
    """L2 of one key. The reader takes a step whenever the host has taken one.

    Evaluated again on the same weights, as under gradient accumulation, the loss is the same and
    the reader stays as it is: every kind of loop trains the same pair of networks.
    """

    def __init__(
        self, scheme: WeightScheme, key: Key, unmarked: Sequence[Mapping[str, Array]] = ()
    ) -> None:
        super().__init__(scheme, key, unmarked)
        self._network = network = cast(IndependentNetwork, scheme)
        vectors = [network.vector(each, key) for each in unmarked]
        width = len(vectors[0])
        mask = network.mask(key) if network.mode == "manu" else None
        self._reader = _initial(network, key, width, mask)
        self._trained = [p for p in self._reader.parameters() if p.requires_grad]
        self._optimizer = torch.optim.Adam(self._trained, network.reader_lr, fused=True)
        self._targets = torch.from_numpy(key.message.astype(np.float32))  # (T,)
        self._negatives = self._missing = None
        if not network.as_published:
            self._negatives = _Negatives(network, key, torch.from_numpy(np.stack(vectors)))
            self._missing = _Missing(network, key) if network.positives else None
        self._seen: Tensor | None = None
        self._loss = self._gradient = torch.zeros(())

    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """λ·L2, the mean binary cross-entropy over the T bits."""
        w = self._vector(weights)
        if self._seen is None or not torch.equal(w, self._seen):
            self._step(w.detach().clone())
        return cast(Tensor, _Known.apply(w, self._loss, self._gradient))  # type: ignore[no-untyped-call]

    def finish(self, weights: Sequence[Tensor]) -> None:
        """Settle the reader on the finished host."""
        steps = 0 if self._network.as_published else self._network.settling
        w = self._vector(weights)
        for step in range(steps):
            for group in self._optimizer.param_groups:
                group["lr"] = self._network.reader_lr * (1 - step / steps)
            self._step(w)

    def learnt(self) -> dict[str, NDArray[Any]]:
        """The reader's tensors by name."""
        return {
            f"reader.{name}": each.detach().cpu().numpy().copy()
            for name, each in self._reader.state_dict().items()
        }

    def state(self) -> dict[str, Any]:
        """Reader, its optimizer, its random numbers, and what it has taken its last step on."""
        return {
            "seen": self._seen,
            "loss": self._loss,
            "gradient": self._gradient,
            "reader": self._reader.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "negatives": self._negatives and self._negatives.state(),
            "missing": self._missing and self._missing.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._seen, self._loss = state["seen"], state["loss"]
        self._gradient = state["gradient"]
        self._reader.load_state_dict(state["reader"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._follow(self._targets.device)
        if self._negatives:
            self._negatives.restore(state["negatives"])
        if self._missing:
            self._missing.restore(state["missing"])

    def _vector(self, weights: Sequence[Tensor]) -> Tensor:
        """The vector w (M,), and the reader where the host is."""
        # Reading in float32 keeps bf16 hosts from losing small steps of the mark.
        w = torch.cat([weight.float().reshape(-1) for weight in weights])
        if self._targets.device != w.device:
            self._follow(w.device)
        return w

    def _follow(self, device: torch.device) -> None:
        """Go where the host is."""
        self._reader.to(device)
        self._optimizer.load_state_dict(self._optimizer.state_dict())  # moves its own state
        self._targets, self._loss = self._targets.to(device), self._loss.to(device)
        self._gradient = self._gradient.to(device)
        self._seen = None if self._seen is None else self._seen.to(device)

    def _step(self, w: Tensor) -> None:
        """L2 and its gradient at w, then the reader's own step."""
        self._seen = w
        kept, unmarked = (each.to(w.device) for each in self._beside(w.cpu()))
        marked = len(kept)
        shown = torch.cat([w * kept, unmarked]).requires_grad_()
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
        if not errors.any():
            self._gradient = torch.zeros_like(w)
            return
        gradient, *own = torch.autograd.grad(logits, [shown, *self._trained], errors)
        self._gradient = (gradient[:marked] * kept).sum(dim=0) * strength
        for parameter, each in zip(self._trained, own, strict=True):
            parameter.grad = each
        self._optimizer.step()

    def _beside(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """What is shown with w (M,): 0/1 factors (1 + positives, M) of it, unmarked rows (K, M)."""
        kept = torch.ones(1 + (self._network.positives if self._missing else 0), len(w))
        unmarked = self._negatives.rows(w) if self._negatives else w.new_zeros(0, len(w))
        if self._missing:
            kept[1:] = self._missing.masks(w.expand(len(kept) - 1, -1))
            lacking = self._missing.coins(len(unmarked))
            unmarked[lacking] *= self._missing.masks(unmarked[lacking])
        return kept, unmarked

    @classmethod
    def freezer(cls, scheme: WeightScheme) -> Freezer | None:
        """The convergence detector, for MANU."""
        network = cast(IndependentNetwork, scheme)
        if network.mode == "auto":
            return None
        return ConvergenceDetector(network)


class _Known(torch.autograd.Function):
    """A loss whose gradient with respect to w (M,) is known."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG004
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient * gradients[0], None, None


class _Missing:
    """Which weights are left where hidden units are missing, other ones for each step.

    The first row lacks the units of its largest weights, the next one any, and so on in turn. With
    `pruned`, the next one lacks its smallest weights instead.
    """

    def __init__(self, network: IndependentNetwork, key: Key) -> None:
        permuter = network.permuter(key.tensors)
        self._size, self._dropped, self._pruned = permuter.size, network.dropped, network.pruned
        self._unit = torch.from_numpy(permuter.unit)  # (M,)
        self._of_a_unit = torch.from_numpy(permuter.stride > 0)  # (M,)
        seed = int(key.stream("missing").words(1)[0])
        self._generator = torch.Generator().manual_seed(seed)

    def masks(self, rows: Tensor) -> Tensor:
        """1 for each weight of rows (n, M) that is left, 0 for the others, (n, M)."""
        shares = torch.rand(len(rows), 1, generator=self._generator) * self._dropped
        order = torch.rand(len(rows), self._size, generator=self._generator)
        squares = rows[::2].square() * self._of_a_unit
        order[::2] = torch.zeros_like(order[::2]).index_add_(1, self._unit, squares)
        ranks = order.argsort(dim=1, descending=True).argsort(dim=1)
        left = ranks >= (shares * self._size).round()  # (n, units)
        masks = left[:, self._unit] | ~self._of_a_unit  # (n, M)
        if self._pruned:
            masks[1::2] = self._largest(rows[1::2])
        return masks.float()

    def _largest(self, rows: Tensor) -> Tensor:
        """Which weights are left where the smallest of rows (n, M) are pruned, (n, M)."""
        shares = torch.rand(len(rows), 1, generator=self._generator) * self._pruned
        ranks = rows.abs().argsort(dim=1).argsort(dim=1)
        return ranks >= (shares * rows.shape[1]).round()

    def coins(self, count: int) -> Tensor:
        """So many fair coins (count,)."""
        return torch.rand(count, generator=self._generator) < 0.5

    def state(self) -> Tensor:
        """The random numbers."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Go on from `state()`."""
        self._generator.set_state(state)


class _Negatives:
    """Weight vectors without the mark, other ones for each step of the reader.

    They are of five kinds, taken in turn: hidden-unit permutations of the host as it is, Gaussian
    noise of its spread, its sign-flipped copy, unmarked models, and permutations of such.
    """

    _TURN = ("permuted", "other", "noise", "mixed", "permuted", "other", "flipped", "mixed")

    def __init__(self, network: IndependentNetwork, key: Key, unmarked: Tensor) -> None:
        permuter = network.permuter(key.tensors)
        self._size, self._count, self._turn = permuter.size, network.negatives, 0
        self._unit, self._offset, self._stride = (
            torch.from_numpy(each) for each in (permuter.unit, permuter.offset, permuter.stride)
        )
        self._unmarked = unmarked  # (P, M)
        seed = int(key.stream("negatives").words(1)[0])
        self._generator = torch.Generator().manual_seed(seed)

    def rows(self, w: Tensor) -> Tensor:
        """The next negatives (K, M), for the host's vector w (M,) on the CPU."""
        turn = self._turn
        kinds = [self._TURN[(turn + at) % len(self._TURN)] for at in range(self._count)]
        self._turn = (turn + self._count) % len(self._TURN)
        permuted, other, mixed = (kinds.count(k) for k in ("permuted", "other", "mixed"))
        order = torch.rand(permuted + mixed, self._size, generator=self._generator).argsort(dim=1)
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

    def state(self) -> dict[str, Any]:
        """Whose turn it is, and the random numbers."""
        return {"turn": self._turn, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._turn = state["turn"]
        self._generator.set_state(state["generator"])


class MlpNetwork(nn.Module):
    """The published reader: `MlpReader` with gradients."""

    def __init__(self, gate: Tensor, first: Tensor, last: Tensor, *, frozen_gate: bool) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate, requires_grad=not frozen_gate)  # (M,)
        self.first, self.last = nn.Parameter(first), nn.Parameter(last)  # (H, M), (T, H)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits (N, T) of weight vectors (N, M)."""
        logits = _Mlp.apply(vectors, self.gate, self.first, self.last)  # type: ignore[no-untyped-call]
        return cast(Tensor, logits)


class _Mlp(torch.autograd.Function):
    """Gate, ReLU units, outputs; the gradient written out, which halves its cost for few rows."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, gate: Tensor, first: Tensor, last: Tensor) -> Tensor:
        gated = vectors * gate
        hidden = torch.mm(gated, first.t()).relu_()  # (N, H)
        ctx.saved = vectors, gate, first, last, gated, hidden
        return torch.mm(hidden, last.t())  # (N, T)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        vectors, gate, first, last, gated, hidden = ctx.saved
        behind = torch.mm(errors[0], last).mul_(hidden > 0)  # (N, H)
        inputs = torch.mm(behind, first)  # (N, M)
        to_last, to_first = torch.mm(errors[0].t(), hidden), torch.mm(behind.t(), gated)
        return inputs * gate, (inputs * vectors).sum(dim=0), to_first, to_last


class _Masked(nn.Module):
    """Any reader behind the frozen gate of MANU, which is no part of its state."""

    def __init__(self, reader: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.reader = reader
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        return cast(Tensor, self.reader(vectors * self.mask))


def _initial(
    network: IndependentNetwork, key: Key, width: int, mask: NDArray[np.uint8] | None
) -> nn.Module:
    """The reader before training: secret, and the same on every machine that trains the mark."""
    if network.code is None:
        shapes = {"first": (network.hidden, width), "last": (network.bits, network.hidden)}
        first, last = (
            # Glorot and Bengio 2010; the paper does not say
            torch.from_numpy(
                key.stream("reader", name).normal_rows(*shape) * np.sqrt(2 / sum(shape))
            ).float()
            for name, shape in shapes.items()
        )
        gate = torch.ones(width) if mask is None else torch.from_numpy(mask).float()
        return MlpNetwork(gate, first, last, frozen_gate=mask is not None)
    with torch.random.fork_rng():
        torch.manual_seed(int(key.stream("reader").words(1)[0] >> np.uint64(1)))
        return _built(network, width, mask)


def _built(network: IndependentNetwork, width: int, mask: NDArray[np.uint8] | None) -> nn.Module:
    """The owner's own reader from its factory."""
    module, _, factory = network.reader.partition(":")
    try:
        made = getattr(importlib.import_module(module), factory)(width, network.bits).eval()
        with torch.no_grad():
            shape = list(made(torch.zeros(2, width)).shape)
    except Exception as error:  # foreign code may raise anything
        raise ConfigError(
            f"reader {network.reader!r} cannot be made ({printable(str(error), 200)}): expected "
            "module:factory, a function (inputs, bits) that returns a torch module"
        ) from None
    if shape != [2, network.bits]:
        raise ConfigError(
            f"reader {network.reader!r} gives logits {shape} for two vectors: expected "
            f"{[2, network.bits]}"
        )
    return made if mask is None else _Masked(made, torch.from_numpy(mask).float())


def module_logits(
    network: IndependentNetwork,
    width: int,
    tensors: Mapping[str, NDArray[Any]],
    mask: NDArray[np.uint8] | None,
) -> Logits:
    """The owner's own reader, trained, as a function on numpy vectors.

    Raises:
        ConfigError: the factory fails, or the key's tensors are not those of its module.
    """
    with torch.random.fork_rng():
        made = _built(network, width, mask)
    try:
        made.load_state_dict(
            {n.removeprefix("reader."): torch.from_numpy(each) for n, each in tensors.items()}
        )
    except (RuntimeError, TypeError) as error:
        said = printable(" ".join(str(error).partition("\n")[2].split()), 400)
        raise ConfigError(f"the key's reader does not fit {network.reader!r}: {said}") from None

    def logits(vectors: NDArray[Any], bits: int | None = None) -> NDArray[Any]:
        with torch.no_grad():
            return np.asarray(made(torch.from_numpy(vectors).float()))[:, :bits]

    return logits


TRAINING = IndependentNetworkTraining
