"""Learnt readers as torch modules: the published reader, or the owner's own from its factory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark._internal.plugins import call_factory
from countermark.errors import ConfigError, make_printable
from countermark.keys.key import Key
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.learnt_reader import LogitFunction


class MlpNetwork(nn.Module):
    """The published reader: `MlpReader` with gradients."""

    def __init__(self, gate: Tensor, first: Tensor, last: Tensor, *, frozen_gate: bool) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate, requires_grad=not frozen_gate)  # (M,)
        self.first, self.last = nn.Parameter(first), nn.Parameter(last)  # (H, M), (T, H)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return logits (N, T) of weight vectors (N, M)."""
        logits = _MlpFunction.apply(vectors, self.gate, self.first, self.last)  # type: ignore[no-untyped-call]
        return cast(Tensor, logits)


class _MlpFunction(torch.autograd.Function):
    """Gate, ReLU units and outputs; the explicit gradient halves the cost for few rows."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, gate: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Return logits (N, T), and save the intermediate tensors."""
        gated = vectors * gate
        hidden = torch.mm(gated, first.t()).relu_()  # (N, H)
        ctx.saved = vectors, gate, first, last, gated, hidden
        return torch.mm(hidden, last.t())  # (N, T)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of vectors, gate and both layers."""
        vectors, gate, first, last, gated, hidden = ctx.saved
        # The ReLU passes gradients only where its output is positive.
        behind = torch.mm(errors[0], last).mul_(hidden > 0)  # (N, H)
        inputs = torch.mm(behind, first)  # (N, M)
        to_last, to_first = torch.mm(errors[0].t(), hidden), torch.mm(behind.t(), gated)
        return inputs * gate, (inputs * vectors).sum(dim=0), to_first, to_last


class _MaskedReader(nn.Module):
    """A reader behind the frozen gate of MANU; the gate is not part of its state."""

    def __init__(self, reader: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.reader = reader
        self.mask: Tensor
        # The mask is frozen in the key already; a second copy could differ.
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the reader's logits for the masked vectors (N, M)."""
        return cast(Tensor, self.reader(vectors * self.mask))


def make_initial_reader(
    network: IndependentNetwork, key: Key, width: int, mask: NDArray[np.uint8] | None
) -> nn.Module:
    """Make the reader before training, from the key: equal on every machine, and secret.

    Args:
        network: the scheme.
        key: gives the random initial weights.
        width: M, the length of the weight vectors.
        mask: 0/1 (M,) of the weights that MANU reads, or None.
    """
    if network.reader_code is None:
        shapes = {"first": (network.hidden, width), "last": (network.bits, network.hidden)}
        first, last = (
            # Glorot and Bengio 2010; the paper does not say
            torch.from_numpy(
                key.make_stream("reader", name).draw_normal_rows(*shape) * np.sqrt(2 / sum(shape))
            ).float()
            for name, shape in shapes.items()
        )
        gate = torch.ones(width) if mask is None else torch.from_numpy(mask).float()
        return MlpNetwork(gate, first, last, frozen_gate=mask is not None)
    with torch.random.fork_rng():
        # The factory draws its initial weights from torch's global generator.
        torch.manual_seed(int(key.make_stream("reader").take_words(1)[0] >> np.uint64(1)))
        return _build_reader(network, width, mask)


def _build_reader(
    network: IndependentNetwork, width: int, mask: NDArray[np.uint8] | None
) -> nn.Module:
    """Build the owner's own reader with its factory.

    Raises:
        ConfigError: the factory fails, or its module does not return (N, T) logits.
    """
    expected = "a function (inputs, bits) that returns a torch module"
    reader = call_factory("reader", network.reader, expected, (width, network.bits))
    try:
        with torch.no_grad():
            shape = list(reader.eval()(torch.zeros(2, width)).shape)
    except Exception as error:  # foreign code may raise anything
        raise ConfigError(
            f"reader {network.reader!r} cannot be made ({make_printable(str(error), 200)}): expected "
            f"{expected}"
        ) from None
    if shape != [2, network.bits]:
        raise ConfigError(
            f"reader {network.reader!r} gives logits {shape} for two vectors: expected "
            f"{[2, network.bits]}"
        )
    return reader if mask is None else _MaskedReader(reader, torch.from_numpy(mask).float())


def make_module_logits(
    network: IndependentNetwork,
    width: int,
    tensors: Mapping[str, NDArray[Any]],
    mask: NDArray[np.uint8] | None,
) -> LogitFunction:
    """Return the owner's trained reader as a function on numpy vectors.

    Raises:
        ConfigError: the factory fails, or the key's tensors do not fit its module.
    """
    with torch.random.fork_rng():
        made = _build_reader(network, width, mask)
    try:
        # The tensors come from a key file: their names and shapes may not fit the module.
        made.load_state_dict(
            {n.removeprefix("reader."): torch.from_numpy(each) for n, each in tensors.items()}
        )
    except (RuntimeError, TypeError) as error:
        said = make_printable(" ".join(str(error).partition("\n")[2].split()), 400)
        raise ConfigError(f"the key's reader does not fit {network.reader!r}: {said}") from None

    def compute_logits(vectors: NDArray[Any], bits: int | None = None) -> NDArray[Any]:
        """Return the logits of vectors (N, M), at most `bits` of each."""
        with torch.no_grad():
            return np.asarray(made(torch.from_numpy(vectors).float()))[:, :bits]

    return compute_logits
