"""Learnt readers as torch modules: the published one, or the owner's own from its factory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.errors import ConfigError, printable
from countermark.factories import made
from countermark.key import Key
from countermark.schemes.independent_network import IndependentNetwork
from countermark.schemes.reader import Logits


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


def initial_reader(
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
    expected = "a function (inputs, bits) that returns a torch module"
    reader = made("reader", network.reader, expected, (width, network.bits))
    try:
        with torch.no_grad():
            shape = list(reader.eval()(torch.zeros(2, width)).shape)
    except Exception as error:  # foreign code may raise anything
        raise ConfigError(
            f"reader {network.reader!r} cannot be made ({printable(str(error), 200)}): expected "
            f"{expected}"
        ) from None
    if shape != [2, network.bits]:
        raise ConfigError(
            f"reader {network.reader!r} gives logits {shape} for two vectors: expected "
            f"{[2, network.bits]}"
        )
    return reader if mask is None else _Masked(reader, torch.from_numpy(mask).float())


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
