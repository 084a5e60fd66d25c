"""Find the permutation groups of a live model: by names in a transformer, else with `torch.fx`.

Operations that are not understood leave units alone: units that pass through an operation without a
rule here are not reordered, and the values that it returns are not followed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from countermark.alignment.symmetries.architecture import Architecture
from countermark.alignment.symmetries.base import (
    BatchNormTensors,
    GroupMember,
    PermutationGroup,
    ScaleDomain,
)
from countermark.alignment.symmetries.blocks import find_block_groups
from countermark.alignment.symmetries.chain import make_norm_members
from countermark.errors import ConfigError

_Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_Batch: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

# Factors that an elementwise operation lets pass: (scalable, flippable).
_RECTIFIED, _ODD, _LINEAR, _NEITHER = (True, False), (False, True), (True, True), (False, False)
# The rules go by exact type, because a subclass may compute something else.
_MODULES: Mapping[type[nn.Module], tuple[bool, bool]] = {
    nn.ReLU: _RECTIFIED, nn.LeakyReLU: _RECTIFIED, nn.MaxPool1d: _RECTIFIED,
    nn.MaxPool2d: _RECTIFIED, nn.AdaptiveMaxPool2d: _RECTIFIED,
    nn.Tanh: _ODD, nn.Softsign: _ODD, nn.Hardtanh: _ODD,
    nn.Identity: _LINEAR, nn.Dropout: _LINEAR, nn.Dropout2d: _LINEAR, nn.AvgPool2d: _LINEAR,
    nn.AdaptiveAvgPool2d: _LINEAR, nn.Flatten: _LINEAR,
    nn.GELU: _NEITHER, nn.SiLU: _NEITHER, nn.ELU: _NEITHER, nn.Sigmoid: _NEITHER,
}  # fmt: skip
_FUNCTIONS: Mapping[Any, tuple[bool, bool]] = {
    F.relu: _RECTIFIED, torch.relu: _RECTIFIED, "relu": _RECTIFIED, F.leaky_relu: _RECTIFIED,
    F.max_pool2d: _RECTIFIED, torch.max_pool2d: _RECTIFIED,
    torch.tanh: _ODD, "tanh": _ODD, F.tanh: _ODD,
    F.avg_pool2d: _LINEAR, F.adaptive_avg_pool2d: _LINEAR, F.dropout: _LINEAR,
    F.interpolate: _LINEAR, torch.flatten: _LINEAR, "flatten": _LINEAR, "mean": _LINEAR,
    "contiguous": _LINEAR, F.gelu: _NEITHER, F.silu: _NEITHER, torch.sigmoid: _NEITHER,
    "sigmoid": _NEITHER,
}  # fmt: skip
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def trace_permutation_groups(
    model: nn.Module, *, residual: bool = False
) -> tuple[PermutationGroup, ...]:
    """Return the permutation groups of a model, which is not changed.

    Args:
        model: a transformer with a configuration, whose layers are known by their names; any other
            model is traced.
        residual: for such a transformer, add the channels between its blocks, which can be
            reordered only together with all layers that read or write them.

    Raises:
        ConfigError: the forward method of the model cannot be traced.
    """
    if (architecture := Architecture.from_model(model)) is not None:
        shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
        if found := find_block_groups(shapes, architecture, residual=residual):
            return found
    try:
        graph = HooklessTracer().trace(model)
    except Exception as error:  # `forward` is foreign code and may raise anything
        said = str(error).strip().partition("\n")[0][:120]
        raise ConfigError(
            f"{type(model).__name__} cannot be traced by torch.fx ({said}): its neurons are not "
            "found; a forward without branches on the data can be traced"
        ) from None
    return _GraphWalk(model).find_groups(graph)


class HooklessTracer(torch.fx.Tracer):
    """A tracer that runs no hook of the model.

    A hook may change the model: a first forward pass through a part of a model that is sharded by
    FSDP2 makes that part a root of its own, and the training fails.
    """

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a module by its `forward` method instead of its `__call__`, which runs hooks."""
        del forward
        return super().call_module(m, m.forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - torch's
        """Treat a sharded layer of torch as the layer that it is."""
        of_torch = _get_written_class(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
        return of_torch and not isinstance(m, nn.Sequential)


def _get_written_class(module: nn.Module) -> type:
    """Return the class of a module, without the class that FSDP2 puts on top of it."""
    kinds = type(module).__mro__
    # FSDP2 makes a class `FSDPLinear(FSDPModule, Linear)`, whose module is not torch.nn.
    return kinds[2] if len(kinds) > 2 and kinds[1].__name__ == "FSDPModule" else kinds[0]


@dataclass
class _GroupBuilder:
    """A permutation group under construction; merged groups and domains point to one root.

    Attributes:
        size: number of units.
        members: name, axis, domain, power, each and offset of each member.
        norms: module name, eps, domain before and domain after of each batch norm.
        frozen: the units must stay in order.
        grows: units can be added.
    """

    size: int
    members: list[tuple[str, int, int, int, int, int]] = field(default_factory=list)
    norms: list[tuple[str, float, int, int]] = field(default_factory=list)
    frozen: bool = False
    grows: bool = True


@dataclass(frozen=True)
class _TracedValue:
    """A value that flows through the graph: the group and the scale domain of its channels.

    The channels are axis 1, or the last axis of token features.
    """

    units: int
    domain: int


class _GraphWalk:
    """One pass over a graph. An addition merges the groups and the domains of its two terms.

    Args:
        model: the traced model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._units: list[_GroupBuilder] = []
        self._domains: list[tuple[bool, bool]] = []
        # Union-find forests of the groups and of the domains: child to parent.
        self._united: dict[int, int] = {}
        self._joined: dict[int, int] = {}
        self._seen: set[str] = set()
        self._values: dict[torch.fx.Node, _TracedValue | None] = {}

    def find_groups(self, graph: torch.fx.Graph) -> tuple[PermutationGroup, ...]:
        """Return all permutation groups that may be reordered."""
        for node in graph.nodes:
            given = [self._values.get(each) for each in node.all_input_nodes]
            rule: Callable[[torch.fx.Node, list[_TracedValue | None]], _TracedValue | None]
            rule = {"call_module": self._follow_module, "call_function": self._follow_function,
                    "call_method": self._follow_function}.get(node.op, self._freeze_units)  # fmt: skip
            self._values[node] = rule(node, given)
        # One frozen part freezes the whole merged group.
        roots: dict[int, list[_GroupBuilder]] = {}
        for number, found in enumerate(self._units):
            roots.setdefault(_find_root(self._united, number), []).append(found)
        return tuple(
            self._build_group(parts) for parts in roots.values() if not any(p.frozen for p in parts)
        )

    def _freeze_units(
        self, node: torch.fx.Node, given: list[_TracedValue | None]
    ) -> _TracedValue | None:
        """Freeze the units of all inputs: the operation has no rule, or is an input or output."""
        del node
        for value in given:
            if value is not None:
                self._units[value.units].frozen = True
        return None

    def _follow_module(
        self, node: torch.fx.Node, given: list[_TracedValue | None]
    ) -> _TracedValue | None:
        """Follow a call of a submodule; shared weights freeze all units that they touch."""
        name, module = str(node.target), self._model.get_submodule(str(node.target))
        if name in self._seen:  # weights that are used twice
            for found in self._units:
                found.frozen |= any(member[0].startswith(f"{name}.") for member in found.members)
            return self._freeze_units(node, given)
        self._seen.add(name)
        if isinstance(module, nn.MultiheadAttention):
            return self._follow_attention(name, module, node, given)
        if isinstance(module, _Layer) and getattr(module, "groups", 1) == 1:
            return self._follow_layer(name, module, given[0])
        return None if given[0] is None else self._follow_step(name, module, node, given)

    def _follow_step(
        self, name: str, module: nn.Module, node: torch.fx.Node, given: list[_TracedValue | None]
    ) -> _TracedValue | None:
        """Follow a norm or an elementwise operation on units that are tracked."""
        value = given[0]
        if value is None:
            return None
        if isinstance(module, _Batch) and self._is_plain_norm(module, value):
            return self._follow_batch_norm(name, module, value)
        if isinstance(module, nn.LayerNorm) and self._has_matching_size(module, value):
            return self._follow_layer_norm(name, module, value)
        kind = _get_written_class(module)
        if kind in _MODULES:
            return self._restrict_domain(value, _MODULES[kind])
        return self._freeze_units(node, given)

    def _follow_function(
        self, node: torch.fx.Node, given: list[_TracedValue | None]
    ) -> _TracedValue | None:
        """Follow a call of a function or of a method of a tensor."""
        if node.target in _ADDITIONS and len(given) == 2:
            return self._follow_addition(node, given)
        if not given or given[0] is None:
            return self._freeze_units(node, given)
        # An attention returns a pair: its output, and attention weights, which have no units.
        if node.target is operator.getitem:
            return given[0] if node.args[1] == 0 else None
        if node.target in _FUNCTIONS and len(given) == 1:
            return self._restrict_domain(given[0], _FUNCTIONS[node.target])
        return self._freeze_units(node, given)

    def _follow_addition(
        self, node: torch.fx.Node, given: list[_TracedValue | None]
    ) -> _TracedValue | None:
        """Follow an addition: both terms must have the same units in the same order."""
        one, other = given
        if one is None or other is None:
            return self._freeze_units(node, given)
        if self._units[one.units].size != self._units[other.units].size:
            return self._freeze_units(node, given)
        _join_roots(self._united, one.units, other.units)
        _join_roots(self._joined, one.domain, other.domain)
        return one

    def _restrict_domain(self, value: _TracedValue, allows: tuple[bool, bool]) -> _TracedValue:
        """Restrict the scale domain of a value to the factors that an operation allows."""
        scalable, flippable = self._domains[value.domain]
        self._domains[value.domain] = (scalable and allows[0], flippable and allows[1])
        return value

    def _add_group(self, size: int) -> _TracedValue:
        """Add a permutation group with a new scale domain, and return its value."""
        self._units.append(_GroupBuilder(size))
        return _TracedValue(len(self._units) - 1, self._add_domain())

    def _add_domain(self, allows: tuple[bool, bool] = _LINEAR) -> int:
        """Add a scale domain and return its index."""
        self._domains.append(allows)
        return len(self._domains) - 1

    def _add_member(
        self,
        value: _TracedValue,
        name: str,
        axis: int,
        power: int,
        *,
        each: int = 1,
        offset: int = 0,
    ) -> None:
        """Add a member to the group of a value."""
        member = (name, axis, value.domain, power, each, offset)
        self._units[value.units].members.append(member)

    def _follow_layer(self, name: str, layer: _Layer, value: _TracedValue | None) -> _TracedValue:
        """Follow a linear or convolutional layer, which consumes one group and produces another."""
        weight: Tensor = layer.weight
        if value is not None:
            # Behind a flattening, a linear layer reads several inputs for each channel.
            each, rest = divmod(weight.shape[1], self._units[value.units].size)
            self._add_member(value, f"{name}.weight", 1, -1, each=each)
            self._units[value.units].frozen |= bool(rest)
        made = self._add_group(weight.shape[0])
        self._add_member(made, f"{name}.weight", 0, 1)
        if layer.bias is not None:
            self._add_member(made, f"{name}.bias", 0, 1)
        return made

    def _is_plain_norm(self, norm: _Batch, value: _TracedValue) -> bool:
        """Return true if a batch norm has weights and statistics of the size of the group."""
        same = norm.num_features == self._units[value.units].size
        return bool(same and norm.affine and norm.track_running_stats)

    def _follow_batch_norm(self, name: str, norm: _Batch, value: _TracedValue) -> _TracedValue:
        """Follow a batch norm, behind which a new scale domain begins."""
        after = self._add_domain()
        self._units[value.units].norms.append((name, norm.eps, value.domain, after))
        return _TracedValue(value.units, after)

    def _has_matching_size(self, norm: nn.LayerNorm, value: _TracedValue) -> bool:
        """Return true if a layer norm has weights and normalises exactly the units of the value."""
        sizes = (self._units[value.units].size,)
        return norm.elementwise_affine and tuple(norm.normalized_shape) == sizes

    def _follow_layer_norm(
        self, name: str, norm: nn.LayerNorm, value: _TracedValue
    ) -> _TracedValue:
        """Follow a layer norm, which allows no factor before it."""
        # The mean and the variance run over all units, so no factor passes and their number is
        # fixed.
        self._restrict_domain(value, _NEITHER)
        self._units[value.units].grows = False
        made = _TracedValue(value.units, self._add_domain())
        self._add_member(made, f"{name}.weight", 0, 1)
        if norm.bias is not None:
            self._add_member(made, f"{name}.bias", 0, 1)
        return made

    def _follow_attention(
        self, name: str, module: nn.MultiheadAttention, node: torch.fx.Node,
        given: list[_TracedValue | None],
    ) -> _TracedValue | None:  # fmt: skip
        """Follow a self-attention, adding two groups for each head.

        Units of query and key are reordered together, and so are units of value and output.
        """
        # In cross-attention, query, key and value come from several groups; only one input is
        # handled.
        if module.in_proj_weight is None or module.bias_k is not None or len(set(given)) != 1:
            return self._freeze_units(node, given)
        prefix, size, width = f"{name}.", module.embed_dim, module.head_dim
        if given[0] is not None:
            self._add_member(given[0], f"{prefix}in_proj_weight", 1, -1)
        for at in range(0, size, width):
            pairs, values = self._add_group(width), self._add_group(width)
            # The product of query and key is unchanged if a factor moves from one to the other, so
            # the key has power −1. Their weights lie below each other in `in_proj_weight`, in this
            # order.
            for part, value, power in ((0, pairs, 1), (1, pairs, -1), (2, values, 1)):
                for last in ("in_proj_weight", "in_proj_bias"):
                    if getattr(module, last) is not None:
                        offset = part * size + at
                        self._add_member(value, prefix + last, 0, power, offset=offset)
            self._add_member(values, f"{prefix}out_proj.weight", 1, -1, offset=at)
            self._units[pairs.units].grows = self._units[values.units].grows = False
        made = self._add_group(size)
        self._add_member(made, f"{prefix}out_proj.weight", 0, 1)
        if module.out_proj.bias is not None:
            self._add_member(made, f"{prefix}out_proj.bias", 0, 1)
        return made

    def _build_group(self, parts: list[_GroupBuilder]) -> PermutationGroup:
        """Merge the parts of a group and number its domains from 0."""
        numbers: dict[int, int] = {}
        for part in parts:
            for each in (*(m[2] for m in part.members), *(d for n in part.norms for d in n[2:])):
                numbers.setdefault(_find_root(self._joined, each), len(numbers))

        def renumber_domain(domain: int) -> int:
            """Return the number of a domain within the merged group."""
            return numbers[_find_root(self._joined, domain)]

        members = [
            GroupMember(n, a, renumber_domain(d), p, e, o)
            for f in parts
            for n, a, d, p, e, o in f.members
        ]
        norms = [
            BatchNormTensors(f"{n}.weight", f"{n}.bias", f"{n}.running_mean", f"{n}.running_var", eps,
                 renumber_domain(before), renumber_domain(after))
            for part in parts for n, eps, before, after in part.norms
        ]  # fmt: skip
        members += [member for norm in norms for member in make_norm_members(norm)]
        flags = [(True, True)] * len(numbers)
        for domain, (scalable, flippable) in enumerate(self._domains):
            if (root := _find_root(self._joined, domain)) in numbers:
                at = numbers[root]
                flags[at] = (flags[at][0] and scalable, flags[at][1] and flippable)
        domains = tuple(ScaleDomain(*each) for each in flags)
        grows = all(part.grows for part in parts)
        return PermutationGroup(parts[0].size, tuple(members), tuple(norms), domains, grows)


def _find_root(parents: Mapping[int, int], number: int) -> int:
    """Return the root of a set in a union-find forest."""
    while number in parents:
        number = parents[number]
    return number


def _join_roots(parents: dict[int, int], one: int, other: int) -> None:
    """Merge two sets of a union-find forest."""
    if (a := _find_root(parents, one)) != (b := _find_root(parents, other)):
        parents[b] = a
