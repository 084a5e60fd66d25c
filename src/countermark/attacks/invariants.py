"""Exact invariants: other weights, the same outputs. They break whatever reads weights in order.

Neurons are reordered, rescaled against their consumers, flipped in sign, or joined by dummies. They
need the architecture, no data and no training; outputs stay equal to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from countermark.attacks.base import Attack, Done
from countermark.errors import ConfigError
from countermark.units import Member, Units
from countermark.units.tracing import units_of

_SIZES = {  # what a layer says of its own size, by axis of its weight
    nn.Linear: {0: "out_features", 1: "in_features"},
    nn.Conv1d: {0: "out_channels", 1: "in_channels"},
    nn.Conv2d: {0: "out_channels", 1: "in_channels"},
    nn.Conv3d: {0: "out_channels", 1: "in_channels"},
    nn.BatchNorm1d: {0: "num_features"},
    nn.BatchNorm2d: {0: "num_features"},
    nn.BatchNorm3d: {0: "num_features"},
}


@dataclass(frozen=True)
class Permute(Attack):
    """Every class of neurons is put into another order, in its producers and its consumers.

    Attributes:
        layers: only neurons that one of these tensors has; of no names, all.
        seed: draws the orders.
    """

    name: ClassVar[str] = "permute"
    does: ClassVar[str] = "puts neurons and channels into another order; outputs stay equal"
    source: ClassVar[str] = "Uchida et al. 2017; Li et al. 2021 (function-preserving); KDD 2023"
    needs_model: ClassVar[bool] = True

    layers: tuple[str, ...] = ()
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Reorder every class of neurons that is found."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            state = stolen.state_dict()
            for units in _found(stolen, self):
                order = torch.randperm(units.size, generator=generator)
                for member in units.members:
                    tensor = state[member.name]
                    tensor.copy_(
                        tensor.index_select(member.axis, _reordered(member, order, tensor))
                    )
        return Done()


@dataclass(frozen=True)
class Rescale(Attack):
    """Every neuron is scaled by a positive factor, which its consumers and norms take back.

    Attributes:
        largest: factors lie between 1 / largest and largest, their logarithms uniformly.
        layers, seed: as for `Permute`.
    """

    name: ClassVar[str] = "rescale"
    does: ClassVar[str] = "scales neurons across ReLU and batch norm; outputs stay equal"
    source: ClassVar[str] = "Neyshabur et al. 2015 (path normalisation); Yan et al. 2023"
    needs_model: ClassVar[bool] = True

    largest: Annotated[float, Field(gt=1, le=1e3)] = 4.0
    layers: tuple[str, ...] = ()
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Scale every neuron that can be.

        Raises:
            ConfigError: there is none.
        """
        generator, possible = torch.Generator().manual_seed(self.seed), False
        reach = float(np.log(self.largest))
        for units in _found(stolen, self):
            factors = []
            possible |= any(domain.scalable for domain in units.domains)
            for domain in units.domains:
                drawn = torch.rand(units.size, generator=generator, dtype=torch.float64)
                factors.append((reach * (2 * drawn - 1)).exp() if domain.scalable
                               else torch.ones_like(drawn))  # fmt: skip
            _scaled(stolen, units, factors)
        if not possible:
            raise ConfigError(
                f"{self.name}: no neuron can be scaled: the model has neither batch norms nor "
                "ReLU; take permute or flip_signs"
            )
        return Done()


@dataclass(frozen=True)
class FlipSigns(Attack):
    """About half of the neurons change sign where nothing notices: before norms, around tanh.

    Attributes:
        layers, seed: as for `Permute`.
    """

    name: ClassVar[str] = "flip_signs"
    does: ClassVar[str] = "flips signs before batch norm and around odd activations; outputs equal"
    source: ClassVar[str] = "Chen et al. 1993 (symmetries of tanh networks); Yan et al. 2023"
    needs_model: ClassVar[bool] = True

    layers: tuple[str, ...] = ()
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Flip every second neuron or so that can be.

        Raises:
            ConfigError: there is none, as in a plain network of ReLU.
        """
        generator, possible = torch.Generator().manual_seed(self.seed), False
        for units in _found(stolen, self):
            signs = []
            for domain in units.domains:
                drawn = torch.randint(0, 2, (units.size,), generator=generator) * 2 - 1
                signs.append((drawn if domain.flippable else torch.ones_like(drawn)).double())
                possible |= domain.flippable
            _scaled(stolen, units, signs)
        if not possible:
            raise ConfigError(
                f"{self.name}: no neuron can change sign: the model has neither batch norms nor "
                "odd activations; take permute or rescale"
            )
        return Done()


@dataclass(frozen=True)
class Dummies(Attack):
    """Neurons are added that change nothing: they say nothing, share a part, or cancel each other.

    Attributes:
        kind: "zero", random inputs that no consumer listens to; "split", copies of neurons that
            share what their consumers take of the original; "clique", copies of one random neuron
            whose consumers' weights sum to zero.
        share: how many are added to each class, as a share of what it has.
        layers, seed: as for `Permute`.
    """

    name: ClassVar[str] = "dummies"
    does: ClassVar[str] = "adds neurons that change nothing: zero, split or clique"
    source: ClassVar[str] = "Yan et al. 2023, Rethinking White-Box Watermarks (obfuscation)"
    needs_model: ClassVar[bool] = True

    kind: Literal["zero", "split", "clique"] = "zero"
    share: Annotated[float, Field(gt=0, le=4)] = 0.25
    layers: tuple[str, ...] = ()
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Add neurons to every class that can have more, behind those that are there."""
        generator, added = torch.Generator().manual_seed(self.seed), 0
        for units in _found(stolen, self):
            if units.grows:
                count = max(2, round(self.share * units.size))
                _add(stolen, units, _Extra(self.kind, count, generator))
                added += count
        return Done(found={"added": added})


@dataclass(frozen=True)
class _Extra:
    """How many neurons are added to a class, and of which kind."""

    kind: str
    count: PositiveInt
    generator: torch.Generator


def _found(model: nn.Module, attack: Permute | Rescale | FlipSigns | Dummies) -> Iterator[Units]:
    """The classes of neurons of a model that an attack is about.

    Raises:
        ConfigError: there is none.
    """
    found = [units for units in units_of(model) if units.touches(attack.layers)]
    if not found:
        raise ConfigError(
            f"{attack.name}: no neurons of {type(model).__name__} were found between two layers"
            + (" that have one of these tensors: leave layers out" if attack.layers else "")
        )
    yield from found


def _reordered(member: Member, order: Tensor, tensor: Tensor) -> Tensor:
    """The places along a member's axis, with its units in another order."""
    places = torch.arange(tensor.shape[member.axis])
    units = order.numpy()
    places[member.positions(np.arange(len(units)))] = torch.from_numpy(member.positions(units))
    return places.to(tensor.device)


def _scaled(model: nn.Module, units: Units, factors: list[Tensor]) -> None:
    """Scale a class of units by factors (size,) a domain; batch norms keep their outputs."""
    state = model.state_dict()
    with torch.no_grad():
        for norm in units.norms:
            factor, var = factors[norm.before], state[norm.var].double().cpu()
            # γ·(s·x − s·μ) / √(s²·v + ε) is γ·(x − μ) / √(v + ε) once γ takes up the rest.
            rest = (factor**2 * var + norm.eps).sqrt() / (factor * (var + norm.eps).sqrt())
            weight = state[norm.weight]
            weight.copy_(weight.double() * rest.to(weight.device))
        for member in units.members:
            tensor = state[member.name]
            whole = torch.ones(tensor.shape[member.axis], dtype=torch.float64)
            places = torch.from_numpy(member.positions(np.arange(units.size)))
            powers = factors[member.domain] ** member.power
            whole[places] = powers.repeat_interleave(member.each)
            shape = [-1 if axis == member.axis else 1 for axis in range(tensor.dim())]
            tensor.copy_(tensor.double() * whole.reshape(shape).to(tensor.device))


def _add(model: nn.Module, units: Units, extra: _Extra) -> None:
    """Add units to a class: new rows for producers and norms, new columns for consumers."""
    chosen = torch.randint(units.size, (extra.count,), generator=extra.generator)
    if extra.kind == "clique":
        chosen[:] = chosen[0]
    shares = torch.rand(extra.count, generator=extra.generator, dtype=torch.float64) * 0.6 + 0.2
    for member in units.members:
        tensor = model.state_dict()[member.name].detach()
        places = torch.from_numpy(member.positions(chosen.numpy())).to(tensor.device)
        copies = tensor.index_select(member.axis, places)
        if member.power < 0:
            tensor, copies = _consumed(tensor, copies, (member, units, chosen, shares), extra)
        elif tensor.dim() > 1 and extra.kind != "split":
            copies = _random(copies, member, extra)
        _install(model, member, torch.cat([tensor, copies], member.axis))


def _random(copies: Tensor, member: Member, extra: _Extra) -> Tensor:
    """Producers of new units: weights of the size that there are; one for all of a clique."""
    drawn = torch.randn(copies.shape, generator=extra.generator).to(copies)
    if extra.kind == "clique":
        drawn = drawn.narrow(member.axis, 0, member.each).expand_as(copies)
    return drawn * copies.std()


def _consumed(
    tensor: Tensor, copies: Tensor, which: tuple[Member, Units, Tensor, Tensor], extra: _Extra
) -> tuple[Tensor, Tensor]:
    """What a consumer takes of the units that were there, and of the new ones."""
    member, units, chosen, shares = which
    if extra.kind == "zero":
        return tensor, torch.zeros_like(copies)
    shape = [-1 if axis == member.axis else 1 for axis in range(tensor.dim())]
    if extra.kind == "clique":
        drawn = torch.randn(copies.shape, generator=extra.generator).to(copies) * tensor.std()
        parts = drawn.movedim(member.axis, 0).reshape(extra.count, member.each, -1)
        silent = (parts - parts.mean(0)).reshape(drawn.movedim(member.axis, 0).shape)
        return tensor, silent.movedim(0, member.axis)
    kept = torch.ones(units.size, dtype=torch.float64)
    taken = torch.empty_like(shares)
    for at, unit in enumerate(chosen.tolist()):  # one that is split twice gives twice
        taken[at] = kept[unit] * shares[at]
        kept[unit] -= taken[at]
    wide = kept.repeat_interleave(member.each).reshape(shape).to(tensor.device)
    new = taken.repeat_interleave(member.each).reshape(shape).to(tensor.device)
    return (tensor.double() * wide).to(tensor.dtype), (copies.double() * new).to(tensor.dtype)


def _install(model: nn.Module, member: Member, tensor: Tensor) -> None:
    """Put a tensor of another size into its module, and say so to the module."""
    path, _, last = member.name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._parameters:
        setattr(module, last, nn.Parameter(tensor))
    else:
        setattr(module, last, tensor)
    size = _SIZES.get(type(module), {}).get(member.axis)
    if size and (last == "weight"):
        setattr(module, size, tensor.shape[member.axis])
