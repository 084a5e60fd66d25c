"""Exact invariants: attacks that change the weights and keep the outputs equal up to rounding.

Neurons are reordered, rescaled against their consumers, flipped in sign, or joined by dummies. Each
attack breaks a mark whose reading depends on the order of weights. It needs the architecture, and
neither data nor training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from countermark.alignment.symmetries import GroupMember, PermutationGroup
from countermark.alignment.symmetries.tracing import trace_permutation_groups
from countermark.attacks.base import Attack, ChangeResult
from countermark.errors import ConfigError

_SIZES = {  # attribute with a layer's own size, by axis of its weight
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
    """An attack that reorders every class of neurons, in its producers and its consumers.

    Attributes:
        layers: reorder only the neurons that one of these tensors has; all neurons when empty.
        seed: seed of the orders.
    """

    name: ClassVar[str] = "permute"
    does: ClassVar[str] = "puts neurons and channels into another order; outputs stay equal"
    source: ClassVar[str] = "Uchida et al. 2017; Li et al. 2021 (function-preserving); KDD 2023"
    needs_model: ClassVar[bool] = True

    layers: tuple[str, ...] = ()
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Reorder every class of neurons that the layers name."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            state = stolen.state_dict()
            for units in _find_units(stolen, self):
                # One order for all members of a class keeps producers and consumers in step.
                order = torch.randperm(units.size, generator=generator)
                for member in units.members:
                    tensor = state[member.name]
                    tensor.copy_(
                        tensor.index_select(member.axis, _reorder_positions(member, order, tensor))
                    )
        return ChangeResult()


@dataclass(frozen=True)
class Rescale(Attack):
    """An attack that scales every neuron by a positive factor, which consumers and norms undo.

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

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Scale every neuron that can be scaled.

        Raises:
            ConfigError: no neuron can be scaled.
        """
        generator, possible = torch.Generator().manual_seed(self.seed), False
        reach = float(np.log(self.largest))
        for units in _find_units(stolen, self):
            factors = []
            possible |= any(domain.scalable for domain in units.domains)
            for domain in units.domains:
                # Drawn for every domain, so that a seed means the same factors whether domains
                # scale or not.
                drawn = torch.rand(units.size, generator=generator, dtype=torch.float64)
                factors.append((reach * (2 * drawn - 1)).exp() if domain.scalable
                               else torch.ones_like(drawn))  # fmt: skip
            _scale_units(stolen, units, factors)
        if not possible:
            raise ConfigError(
                f"{self.name}: no neuron can be scaled: the model has neither batch norms nor "
                "ReLU; take permute or flip_signs"
            )
        return ChangeResult()


@dataclass(frozen=True)
class FlipSigns(Attack):
    """An attack that flips the sign of about half of the neurons: before batch norms, around tanh.

    Attributes:
        layers, seed: as for `Permute`.
    """

    name: ClassVar[str] = "flip_signs"
    does: ClassVar[str] = "flips signs before batch norm and around odd activations; outputs equal"
    source: ClassVar[str] = "Chen et al. 1993 (symmetries of tanh networks); Yan et al. 2023"
    needs_model: ClassVar[bool] = True

    layers: tuple[str, ...] = ()
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Flip the sign of each neuron that can be flipped, with probability 1/2.

        Raises:
            ConfigError: no neuron can be flipped, as in a plain ReLU network.
        """
        generator, possible = torch.Generator().manual_seed(self.seed), False
        for units in _find_units(stolen, self):
            signs = []
            for domain in units.domains:
                drawn = torch.randint(0, 2, (units.size,), generator=generator) * 2 - 1
                signs.append((drawn if domain.flippable else torch.ones_like(drawn)).double())
                possible |= domain.flippable
            _scale_units(stolen, units, signs)
        if not possible:
            raise ConfigError(
                f"{self.name}: no neuron can change sign: the model has neither batch norms nor "
                "odd activations; take permute or rescale"
            )
        return ChangeResult()


@dataclass(frozen=True)
class Dummies(Attack):
    """An attack that adds neurons without effect: unread, split, or cancelling each other.

    Attributes:
        kind: "zero", random inputs and zero outgoing weights; "split", copies of neurons that
            share the outgoing weights of the original; "clique", copies of one random neuron
            whose outgoing weights sum to zero.
        share: number of neurons added to each class, as a share of the class's size.
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

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Add neurons to every class that can grow, behind the existing neurons."""
        generator, added = torch.Generator().manual_seed(self.seed), 0
        for units in _find_units(stolen, self):
            if units.grows:
                # A clique needs two neurons at least: a single one cannot cancel itself.
                count = max(2, round(self.share * units.size))
                _add_units(stolen, units, _AddedUnits(self.kind, count, generator))
                added += count
        return ChangeResult(found={"added": added})


@dataclass(frozen=True)
class _AddedUnits:
    """The neurons to add to a class: their kind and number, and the generator that draws them."""

    kind: str
    count: PositiveInt
    generator: torch.Generator


def _find_units(
    model: nn.Module, attack: Permute | Rescale | FlipSigns | Dummies
) -> Iterator[PermutationGroup]:
    """Yield the classes of neurons that an attack changes.

    Raises:
        ConfigError: the model has no such class.
    """
    found = [
        units for units in trace_permutation_groups(model) if units.has_any_member(attack.layers)
    ]
    if not found:
        raise ConfigError(
            f"{attack.name}: no neurons of {type(model).__name__} were found between two layers"
            + (" that have one of these tensors: leave layers out" if attack.layers else "")
        )
    yield from found


def _reorder_positions(member: GroupMember, order: Tensor, tensor: Tensor) -> Tensor:
    """Return the index that puts the units along a member's axis into another order."""
    # Positions of the axis that belong to no unit stay in place.
    places = torch.arange(tensor.shape[member.axis])
    units = order.numpy()
    places[member.compute_positions(np.arange(len(units)))] = torch.from_numpy(
        member.compute_positions(units)
    )
    return places.to(tensor.device)


def _scale_units(model: nn.Module, units: PermutationGroup, factors: list[Tensor]) -> None:
    """Scale a class of units by factors (size,), one tensor a domain; batch norms compensate."""
    state = model.state_dict()
    with torch.no_grad():
        # Batch norms come first: the formula needs the variances before they are scaled below.
        for norm in units.norms:
            factor, var = factors[norm.before], state[norm.var].double().cpu()
            # γ·(s·x − s·μ) / √(s²·v + ε) is γ·(x − μ) / √(v + ε) once γ takes up the rest.
            rest = (factor**2 * var + norm.eps).sqrt() / (factor * (var + norm.eps).sqrt())
            weight = state[norm.weight]
            weight.copy_(weight.double() * rest.to(weight.device))
        for member in units.members:
            tensor = state[member.name]
            whole = torch.ones(tensor.shape[member.axis], dtype=torch.float64)
            places = torch.from_numpy(member.compute_positions(np.arange(units.size)))
            powers = factors[member.domain] ** member.power
            whole[places] = powers.repeat_interleave(member.each)
            shape = [-1 if axis == member.axis else 1 for axis in range(tensor.dim())]
            # Double precision, so that the outputs stay equal up to the rounding of the stored
            # dtype.
            tensor.copy_(tensor.double() * whole.reshape(shape).to(tensor.device))


def _add_units(model: nn.Module, units: PermutationGroup, extra: _AddedUnits) -> None:
    """Add units to a class: new rows for producers and norms, new columns for consumers."""
    chosen = torch.randint(units.size, (extra.count,), generator=extra.generator)
    if extra.kind == "clique":
        chosen[:] = chosen[0]
    # Between 0.2 and 0.8, so that neither part of a split neuron is close to zero.
    shares = torch.rand(extra.count, generator=extra.generator, dtype=torch.float64) * 0.6 + 0.2
    for member in units.members:
        tensor = model.state_dict()[member.name].detach()
        places = torch.from_numpy(member.compute_positions(chosen.numpy())).to(tensor.device)
        copies = tensor.index_select(member.axis, places)
        if member.power < 0:
            tensor, copies = _adapt_consumer(tensor, copies, (member, units, chosen, shares), extra)
        # Biases and norms stay copies; random weights alone make the new units differ.
        elif tensor.dim() > 1 and extra.kind != "split":
            copies = _draw_producer_weights(copies, member, extra)
        _install_tensor(model, member, torch.cat([tensor, copies], member.axis))


def _draw_producer_weights(copies: Tensor, member: GroupMember, extra: _AddedUnits) -> Tensor:
    """Draw producer weights of the usual size; the new units of a clique get equal weights."""
    drawn = torch.randn(copies.shape, generator=extra.generator).to(copies)
    if extra.kind == "clique":
        drawn = drawn.narrow(member.axis, 0, member.each).expand_as(copies)
    return drawn * copies.std()


def _adapt_consumer(
    tensor: Tensor,
    copies: Tensor,
    which: tuple[GroupMember, PermutationGroup, Tensor, Tensor],
    extra: _AddedUnits,
) -> tuple[Tensor, Tensor]:
    """Return a consumer's weights for the existing units and for the new units."""
    member, units, chosen, shares = which
    if extra.kind == "zero":
        return tensor, torch.zeros_like(copies)
    shape = [-1 if axis == member.axis else 1 for axis in range(tensor.dim())]
    if extra.kind == "clique":
        drawn = torch.randn(copies.shape, generator=extra.generator).to(copies) * tensor.std()
        parts = drawn.movedim(member.axis, 0).reshape(extra.count, member.each, -1)
        # Without their mean the outgoing weights of the clique sum to zero.
        silent = (parts - parts.mean(0)).reshape(drawn.movedim(member.axis, 0).shape)
        return tensor, silent.movedim(0, member.axis)
    kept = torch.ones(units.size, dtype=torch.float64)
    taken = torch.empty_like(shares)
    for at, unit in enumerate(chosen.tolist()):  # a unit may be split more than once
        taken[at] = kept[unit] * shares[at]
        kept[unit] -= taken[at]
    wide = kept.repeat_interleave(member.each).reshape(shape).to(tensor.device)
    new = taken.repeat_interleave(member.each).reshape(shape).to(tensor.device)
    return (tensor.double() * wide).to(tensor.dtype), (copies.double() * new).to(tensor.dtype)


def _install_tensor(model: nn.Module, member: GroupMember, tensor: Tensor) -> None:
    """Store a tensor of another size in its module, and update the module's size attribute."""
    path, _, last = member.name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._parameters:
        setattr(module, last, nn.Parameter(tensor))
    else:
        setattr(module, last, tensor)
    size = _SIZES.get(type(module), {}).get(member.axis)
    if size and (last == "weight"):
        setattr(module, size, tensor.shape[member.axis])
