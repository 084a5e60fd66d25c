"""Fill the free weights around dead units with noise, without a change of the outputs.

A hidden unit that never fires may have any outgoing weights. A unit whose outgoing weights are all
zero may have any incoming weights. Noise of a large scale in these weights changes no output, and
drowns every plain sum over the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from countermark._internal.progress import show_progress
from countermark.alignment.symmetries import (
    Architecture,
    GroupMember,
    PermutationGroup,
    ScaleDomain,
    TransformerBlock,
    find_blocks,
)
from countermark.alignment.symmetries.tracing import trace_permutation_groups
from countermark.attacks.base import Attack, ChangeResult, TrainingData, resolve_row_count
from countermark.attacks.prune import select_tensors
from countermark.errors import ConfigError

_BIAS = -1e4  # bias that makes a unit dead; half precision can still represent it
_SILENT = 1e-10  # largest activation of a dead unit; GELU never reaches zero exactly
_KEPT_AT_ZERO = (
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.PReLU,
)  # with a large negative input these still have an output that is not 0

Distribution = Literal["normal", "cauchy"]


@dataclass(frozen=True)
class DeadUnits(Attack):
    """An attack that fills the free weights of dead units with noise.

    Units are hidden units of MLPs, channels and, in a transformer, dimensions of the values.

    Attributes:
        how: "made" first makes a `fraction` of each class of units dead, those with the smallest
            weights: by a large negative bias before ReLU, GELU or SiLU, by zero weights elsewhere.
            "found" uses the units that are dead already.
        fraction: share of the units of each class that is made dead; at least one unit.
        side: "outgoing" fills the outgoing weights of units that never fire; "incoming" fills the
            incoming weights of units whose outgoing weights are all zero.
        scale: scale of the noise: standard deviation, or the factor of a standard Cauchy variable.
        distribution: "normal" or "cauchy".
        layers: attack only the units that one of these tensors has; all units when empty.
        rows: number of training images used to find units that never fire; None for all.
        batch_size: images at a time.
        seed: seed of the noise.
    """

    name: ClassVar[str] = "dead_units"
    does: ClassVar[str] = "fills the free weights of dead units with noise; outputs stay equal"
    source: ClassVar[str] = "Yan et al. 2023 (dummy neurons); measured here for marks that are sums"
    needs_model: ClassVar[bool] = True

    how: Literal["made", "found"] = "made"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    side: Literal["outgoing", "incoming"] = field(default="outgoing", kw_only=True)
    scale: PositiveFloat = field(default=100.0, kw_only=True)
    distribution: Distribution = field(default="normal", kw_only=True)
    layers: tuple[str, ...] = field(default=(), kw_only=True)
    rows: PositiveInt | None = field(default=None, kw_only=True)
    batch_size: PositiveInt = field(default=64, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData | None = None) -> ChangeResult:
        """Make or find dead units, and fill their free weights.

        Args:
            stolen: the copy.
            data: needed to find units that never fire; images, or any other input of the model.

        Raises:
            ConfigError: no units lie between two layers, no unit is dead, or data are needed.
        """
        # Tensors of a state dict share memory with the parameters: edits of them change the copy.
        state = stolen.state_dict()
        classes = [each for each in _list_unit_classes(stolen) if each.has_any_member(self.layers)]
        if not classes:
            raise ConfigError(
                f"{self.name}: no units with producers and consumers of their own were found in "
                f"{type(stolen).__name__}: leave layers out, or take a model with hidden layers"
            )
        share = 0.0
        if self.how == "made":
            # One activation of this kind anywhere rules out biases: the class of a unit does not
            # record which activation follows the unit.
            bent = any(isinstance(each, _KEPT_AT_ZERO) for each in stolen.modules())
            dead = [self._make_dead(units, state, bent=bent) for units in classes]
        elif self.side == "incoming":
            dead = [_find_unheard_units(units, state) for units in classes]
        else:
            dead, share = self._find_silent_units(stolen, classes, data)
        generator, filled = torch.Generator().manual_seed(self.seed), 0
        with torch.no_grad():
            for units, chosen in zip(classes, dead, strict=True):
                for member in _find_free_members(units, self.side) if len(chosen) else ():
                    place = _locate_units(member, chosen, state[member.name])
                    shape = (*place.shape, *_get_other_sizes(state[member.name], member.axis))
                    noise = draw_noise(shape, self.scale, self.distribution, generator)
                    _write_values(state[member.name], member.axis, place, noise)
                filled += len(chosen)
        if not filled:
            raise ConfigError(
                f"{self.name}: no unit of this model is dead: set how=made to make some, or give "
                "fewer rows"
            )
        return ChangeResult(data_share=share, found={"dead": filled})

    def _make_dead(
        self, units: PermutationGroup, state: dict[str, Tensor], *, bent: bool
    ) -> Tensor:
        """Make a class's smallest units dead or unheard; return their indices (n,).

        Args:
            units: the class of units.
            state: the model's state dict; changed in place.
            bent: the model has an activation that is not zero for large negative inputs.
        """
        # The product of a unit's weight norms over all layers is a rough measure of its effect.
        use = torch.ones(units.size, dtype=torch.float64)
        for member in units.members:
            if state[member.name].dim() > 1:
                use *= _group_by_unit(member, units, state[member.name]).norm(dim=1)
        count = max(1, round(self.fraction * units.size))
        chosen = use.argsort(stable=True)[:count]
        silenced, value = _list_consumers(units), 0.0
        if self.side == "outgoing":
            silenced, value = _find_silencers(units, bent=bent)
        with torch.no_grad():
            for member in silenced:
                place = _locate_units(member, chosen, state[member.name])
                state[member.name].index_fill_(member.axis, place, value)
        return chosen

    def _find_silent_units(
        self, stolen: nn.Module, classes: list[PermutationGroup], data: TrainingData | None
    ) -> tuple[list[Tensor], float]:
        """Find the units of each class that no image activates.

        Returns: for each class the indices (n,) of its silent units, and the share of images used.

        Raises:
            ConfigError: no data are given, or more rows are wanted than available.
        """
        if data is None:
            raise ConfigError(
                f"{self.name} finds units that never fire on data: call run(model, data), or set "
                "how=made or side=incoming"
            )
        there = len(data.train_images)
        rows = resolve_row_count(self.name, self.rows, there)
        loudest = [torch.zeros(units.size) for units in classes]
        hooks = []
        for heard, units in zip(loudest, classes, strict=True):
            for member in _list_consumers(units):
                module = stolen.get_submodule(member.name.rpartition(".")[0])
                hooks.append(
                    module.register_forward_pre_hook(_make_activation_hook(member, units, heard))
                )
        device = next(stolen.parameters()).device
        stolen.eval()
        with torch.no_grad(), show_progress(f"{self.name}, images", rows) as advance:
            for first in range(0, rows, self.batch_size):
                last = min(first + self.batch_size, rows)
                stolen(data.normalised(data.train_images[first:last]).to(device))
                advance(last - first)
        for hook in hooks:
            hook.remove()
        return [(heard <= _SILENT).nonzero()[:, 0] for heard in loudest], rows / there


@dataclass(frozen=True)
class FillUnits(Attack):
    """An attack that fills parts of each tensor as if they were the free weights of dead units.

    It serves tensors whose architecture is unknown: outputs stay equal only where units are dead.

    Attributes:
        side: "outgoing" fills columns, the weights that leave a unit; "incoming" fills rows.
        fraction: share of the columns or rows that is filled; at least one.
        scale, distribution, layers, seed: as for `DeadUnits`.
    """

    name: ClassVar[str] = "fill_units"
    does: ClassVar[str] = "fills columns or rows with noise, as if their units were dead"
    source: ClassVar[str] = DeadUnits.source

    side: Literal["outgoing", "incoming"] = "outgoing"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    scale: PositiveFloat = field(default=100.0, kw_only=True)
    distribution: Distribution = field(default="normal", kw_only=True)
    layers: tuple[str, ...] = field(default=(), kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Fill random columns or rows of every tensor of two dimensions or more."""
        generator = torch.Generator().manual_seed(self.seed)
        # Weights are (outputs, inputs): columns leave a unit, rows enter it.
        axis = 1 if self.side == "outgoing" else 0
        with torch.no_grad():
            for tensor in select_tensors(dict(stolen.named_parameters()), self.layers).values():
                count = max(1, round(self.fraction * tensor.shape[axis]))
                place = torch.randperm(tensor.shape[axis], generator=generator)[:count]
                shape = (count, *_get_other_sizes(tensor, axis))
                noise = draw_noise(shape, self.scale, self.distribution, generator)
                _write_values(tensor, axis, place.to(tensor.device), noise)
        return ChangeResult()


def draw_noise(
    shape: tuple[int, ...], scale: float, distribution: Distribution, generator: torch.Generator
) -> Tensor:
    """Draw float64 noise of the given shape from a normal or a Cauchy distribution."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if distribution == "cauchy":  # the ratio of two normal numbers
        # The ratio of two standard normal numbers has a standard Cauchy distribution.
        noise /= torch.randn(shape, generator=generator, dtype=torch.float64)
    return scale * noise


def _list_unit_classes(model: nn.Module) -> list[PermutationGroup]:
    """List the classes of units that have one producer, or a gate beside it, and consumers."""
    state = model.state_dict()
    shapes = {name: tuple(each.shape) for name, each in state.items()}
    architecture = Architecture.from_model(model)
    blocks = find_blocks(shapes, architecture) if architecture else []
    if architecture and blocks:
        # Whole heads are not units here: a head with a query of zeros still has an output.
        found = [units for each in blocks if each.values is None for units in each.units]
        found += [units for each in blocks for units in _list_value_units(each, architecture)]
    else:
        found = list(trace_permutation_groups(model))
    return [units for units in found if _has_simple_layers(units, state, model)]


def _list_value_units(
    block: TransformerBlock, architecture: Architecture
) -> Iterator[PermutationGroup]:
    """Yield the dimensions of an attention's values as classes of units, one class for each group.

    All heads of a group read the same values.
    """
    if block.values is None or not block.units:  # an MLP, or an unknown number of heads
        return
    layer, offset = block.values
    heads, groups = architecture.heads, architecture.groups or architecture.heads
    width, shared = block.speak.inputs // heads, heads // groups
    for group in range(groups):
        made = layer.make_output_members(offset=offset + group * width)
        read = (
            block.speak.make_input_member(offset=head * width)
            for head in range(group * shared, (group + 1) * shared)
        )
        yield PermutationGroup(width, (*made, *read), (), (ScaleDomain(),), grows=False)


def _has_simple_layers(units: PermutationGroup, state: dict[str, Tensor], model: nn.Module) -> bool:
    """Return true if units have one producer and consumers whose inputs a hook can see."""
    consumers = _list_consumers(units)
    makers = [m for m in units.members if m.power == 1 and state[m.name].dim() > 1]
    # A gated MLP has two producers, the gate and the gated layer, which scale separately.
    gated = not units.norms and len({m.domain for m in makers}) == len(makers)
    if not consumers or not makers or not (len(makers) == 1 or gated):
        return False
    modules = [model.get_submodule(each.name.rpartition(".")[0]) for each in consumers]
    # A member of MultiheadAttention is a bare parameter, not a layer with an input of its own.
    return not any(isinstance(each, nn.MultiheadAttention) for each in modules)


def _list_consumers(units: PermutationGroup) -> list[GroupMember]:
    """Return the members of a class that read its units: tensors scaled by a negative power."""
    return [member for member in units.members if member.power < 0]


def _find_silencers(units: PermutationGroup, *, bent: bool) -> tuple[list[GroupMember], float]:
    """Return the members to overwrite so that units die, and the value to write.

    The members are biases that get a large negative value, or weights that become zero.
    """
    heard = _list_consumers(units)[0].domain
    made = [m for m in units.members if m.power == 1 and not _is_running_statistic(m.name)]
    last = [member for member in made if member.domain == heard]
    # The batch norm stands last before the activation, so its bias decides whether a unit fires.
    if units.norms:
        last = [m for m in made if m.name in {each.bias for each in units.norms}]
    biases = [m for m in last if m.name.endswith("bias")]
    linear = units.domains[heard].flippable  # nothing between rectifies, or a gate multiplies
    if biases and not linear and not bent:
        return biases, _BIAS
    return (last if not units.norms else made), 0.0


def _is_running_statistic(name: str) -> bool:
    """Return true for batch norm's running statistics."""
    return name.rpartition(".")[2].startswith("running_")


def _find_unheard_units(units: PermutationGroup, state: dict[str, Tensor]) -> Tensor:
    """Return the indices (n,) of units whose outgoing weights are all zero."""
    silent = torch.ones(units.size, dtype=torch.bool)
    for member in _list_consumers(units):
        silent &= ~_group_by_unit(member, units, state[member.name]).any(dim=1)
    return silent.nonzero()[:, 0]


def _find_free_members(units: PermutationGroup, side: str) -> list[GroupMember]:
    """Return the members whose weights are free: the matrices on one side of the units."""
    if side == "outgoing":
        return _list_consumers(units)
    norms = {name for n in units.norms for name in (n.weight, n.bias, n.mean, n.var)}
    return [
        member for member in units.members
        if member.power == 1 and member.name.endswith("weight") and member.name not in norms
    ]  # fmt: skip


def _make_activation_hook(
    member: GroupMember, units: PermutationGroup, heard: Tensor
) -> Callable[..., None]:
    """Return a forward pre-hook that records each unit's largest activation as a layer reads it.

    Args:
        member: the layer's weight.
        units: the class of units.
        heard: (units,) largest activations so far; updated in place.
    """

    def record_activations(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Update the largest activations from the layer's input."""
        spread = given[0].dim() == getattr(module, "weight", given[0]).dim() > 2
        axis = 1 if spread else given[0].dim() - 1  # channels of images, else the last axis
        values = given[0].detach().abs().movedim(axis, 0).flatten(1).amax(1).float().cpu()
        # A layer may read several positions of each unit, for example flattened channels.
        values = values[torch.from_numpy(member.compute_positions(np.arange(units.size)))]
        torch.maximum(heard, values.reshape(units.size, -1).amax(1), out=heard)

    return record_activations


def _group_by_unit(member: GroupMember, units: PermutationGroup, tensor: Tensor) -> Tensor:
    """Return a member's weights as float64 (units, weights of a unit), on the CPU."""
    place = torch.from_numpy(member.compute_positions(np.arange(units.size))).to(tensor.device)
    rows = tensor.detach().movedim(member.axis, 0)[place]
    return rows.double().cpu().reshape(units.size, -1)


def _locate_units(member: GroupMember, chosen: Tensor, tensor: Tensor) -> Tensor:
    """Return the positions of chosen units along a member's axis, on the tensor's device."""
    return torch.from_numpy(member.compute_positions(chosen.numpy())).to(tensor.device)


def _get_other_sizes(tensor: Tensor, axis: int) -> tuple[int, ...]:
    """Return the sizes of all axes except the given one."""
    return tuple(size for at, size in enumerate(tensor.shape) if at != axis)


def _write_values(tensor: Tensor, axis: int, place: Tensor, values: Tensor) -> None:
    """Write values (n, other axes) to n positions along an axis, clipped to the dtype's range."""
    # A Cauchy value can exceed the range of half precision, and infinity times a zero activation is
    # NaN.
    largest = torch.finfo(tensor.dtype).max
    values = values.clamp(-largest, largest).to(tensor)
    tensor.index_copy_(axis, place, values.movedim(0, axis))
