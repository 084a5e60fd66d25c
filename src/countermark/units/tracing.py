"""The units of a live model: a transformer's by its names, else by following it with `torch.fx`.

What is not understood is left alone: units that pass through an operation without a rule here are
not reordered, and values that it returns are not followed.
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

from countermark.errors import ConfigError
from countermark.units.architecture import Architecture
from countermark.units.base import Domain, Member, Norm, Units
from countermark.units.blocks import blocks_of
from countermark.units.chain import norm_members

_Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_Batch: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

# What an elementwise step allows of the domain it passes: (scalable, flippable).
_RECTIFIED, _ODD, _LINEAR, _NEITHER = (True, False), (False, True), (True, True), (False, False)
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


def units_of(model: nn.Module, *, residual: bool = False) -> tuple[Units, ...]:
    """The classes of units of a model that can be reordered; the model is not changed.

    Args:
        model: a transformer with a configuration, which is known by its names; else it is traced.
        residual: of such a transformer, add the channels between its blocks, which can be reordered
            only together with all that hears them.

    Raises:
        ConfigError: its forward cannot be traced.
    """
    if (architecture := Architecture.of_model(model)) is not None:
        shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
        if found := blocks_of(shapes, architecture, residual=residual):
            return found
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception as error:  # a forward is foreign code, and its tracing may raise anything
        said = str(error).strip().partition("\n")[0][:120]
        raise ConfigError(
            f"{type(model).__name__} cannot be traced by torch.fx ({said}): its neurons are not "
            "found; a forward without branches on the data can be traced"
        ) from None
    return _Walk(model).over(graph)


@dataclass
class _Found:
    """A class of units on its way; `units` and `domains` of merged classes point to one."""

    size: int
    members: list[tuple[str, int, int, int, int, int]] = field(default_factory=list)
    norms: list[tuple[str, float, int, int]] = field(default_factory=list)
    frozen: bool = False
    grows: bool = True


@dataclass(frozen=True)
class _Value:
    """What flows: the class of its channels (axis 1, or the last of token features), its domain."""

    units: int
    domain: int


class _Walk:
    """One pass over a graph. Classes and domains that an addition joins are united."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._units: list[_Found] = []
        self._domains: list[tuple[bool, bool]] = []
        self._united: dict[int, int] = {}  # classes
        self._joined: dict[int, int] = {}  # domains
        self._seen: set[str] = set()
        self._values: dict[torch.fx.Node, _Value | None] = {}

    def over(self, graph: torch.fx.Graph) -> tuple[Units, ...]:
        """All classes of units that are free."""
        for node in graph.nodes:
            given = [self._values.get(each) for each in node.all_input_nodes]
            rule: Callable[[torch.fx.Node, list[_Value | None]], _Value | None]
            rule = {"call_module": self._module, "call_function": self._function,
                    "call_method": self._function}.get(node.op, self._stop)  # fmt: skip
            self._values[node] = rule(node, given)
        roots: dict[int, list[_Found]] = {}
        for number, found in enumerate(self._units):
            roots.setdefault(_root(self._united, number), []).append(found)
        return tuple(
            self._finished(parts) for parts in roots.values() if not any(p.frozen for p in parts)
        )

    def _stop(self, node: torch.fx.Node, given: list[_Value | None]) -> _Value | None:
        """An operation without a rule, an input or the output: units are left as they are."""
        del node
        for value in given:
            if value is not None:
                self._units[value.units].frozen = True
        return None

    def _module(self, node: torch.fx.Node, given: list[_Value | None]) -> _Value | None:
        name, module = str(node.target), self._model.get_submodule(str(node.target))
        if name in self._seen:  # shared weights
            for found in self._units:
                found.frozen |= any(member[0].startswith(f"{name}.") for member in found.members)
            return self._stop(node, given)
        self._seen.add(name)
        if isinstance(module, nn.MultiheadAttention):
            return self._attention(name, module, node, given)
        if isinstance(module, _Layer) and getattr(module, "groups", 1) == 1:
            return self._layer(name, module, given[0])
        return None if given[0] is None else self._between(name, module, node, given)

    def _between(
        self, name: str, module: nn.Module, node: torch.fx.Node, given: list[_Value | None]
    ) -> _Value | None:
        """A norm or an elementwise step on units that are followed."""
        value = given[0]
        if value is None:
            return None
        if isinstance(module, _Batch) and self._normal(module, value):
            return self._norm(name, module, value)
        if isinstance(module, nn.LayerNorm) and self._fits(module, value):
            return self._layer_norm(name, module, value)
        if type(module) in _MODULES:
            return self._pass(value, _MODULES[type(module)])
        return self._stop(node, given)

    def _function(self, node: torch.fx.Node, given: list[_Value | None]) -> _Value | None:
        if node.target in _ADDITIONS and len(given) == 2:
            return self._add(node, given)
        if not given or given[0] is None:
            return self._stop(node, given)
        if node.target is operator.getitem:  # of what an attention returns
            return given[0] if node.args[1] == 0 else None
        if node.target in _FUNCTIONS and len(given) == 1:
            return self._pass(given[0], _FUNCTIONS[node.target])
        return self._stop(node, given)

    def _add(self, node: torch.fx.Node, given: list[_Value | None]) -> _Value | None:
        one, other = given
        if one is None or other is None:
            return self._stop(node, given)
        if self._units[one.units].size != self._units[other.units].size:
            return self._stop(node, given)
        _unite(self._united, one.units, other.units)
        _unite(self._joined, one.domain, other.domain)
        return one

    def _pass(self, value: _Value, allows: tuple[bool, bool]) -> _Value:
        scalable, flippable = self._domains[value.domain]
        self._domains[value.domain] = (scalable and allows[0], flippable and allows[1])
        return value

    def _new(self, size: int) -> _Value:
        self._units.append(_Found(size))
        return _Value(len(self._units) - 1, self._domain())

    def _domain(self, allows: tuple[bool, bool] = _LINEAR) -> int:
        self._domains.append(allows)
        return len(self._domains) - 1

    def _place(
        self, value: _Value, name: str, axis: int, power: int, *, each: int = 1, offset: int = 0
    ) -> None:
        member = (name, axis, value.domain, power, each, offset)
        self._units[value.units].members.append(member)

    def _layer(self, name: str, layer: _Layer, value: _Value | None) -> _Value:
        weight: Tensor = layer.weight
        if value is not None:
            each, rest = divmod(weight.shape[1], self._units[value.units].size)
            self._place(value, f"{name}.weight", 1, -1, each=each)
            self._units[value.units].frozen |= bool(rest)
        made = self._new(weight.shape[0])
        self._place(made, f"{name}.weight", 0, 1)
        if layer.bias is not None:
            self._place(made, f"{name}.bias", 0, 1)
        return made

    def _normal(self, norm: _Batch, value: _Value) -> bool:
        same = norm.num_features == self._units[value.units].size
        return bool(same and norm.affine and norm.track_running_stats)

    def _norm(self, name: str, norm: _Batch, value: _Value) -> _Value:
        after = self._domain()
        self._units[value.units].norms.append((name, norm.eps, value.domain, after))
        return _Value(value.units, after)

    def _fits(self, norm: nn.LayerNorm, value: _Value) -> bool:
        sizes = (self._units[value.units].size,)
        return norm.elementwise_affine and tuple(norm.normalized_shape) == sizes

    def _layer_norm(self, name: str, norm: nn.LayerNorm, value: _Value) -> _Value:
        self._pass(value, _NEITHER)
        self._units[value.units].grows = False
        made = _Value(value.units, self._domain())
        self._place(made, f"{name}.weight", 0, 1)
        if norm.bias is not None:
            self._place(made, f"{name}.bias", 0, 1)
        return made

    def _attention(
        self, name: str, module: nn.MultiheadAttention, node: torch.fx.Node,
        given: list[_Value | None],
    ) -> _Value | None:  # fmt: skip
        """Units of each head: query and key in one class, value and output in another."""
        if module.in_proj_weight is None or module.bias_k is not None or len(set(given)) != 1:
            return self._stop(node, given)
        prefix, size, width = f"{name}.", module.embed_dim, module.head_dim
        if given[0] is not None:
            self._place(given[0], f"{prefix}in_proj_weight", 1, -1)
        for at in range(0, size, width):
            pairs, values = self._new(width), self._new(width)
            for part, value, power in ((0, pairs, 1), (1, pairs, -1), (2, values, 1)):
                for last in ("in_proj_weight", "in_proj_bias"):
                    if getattr(module, last) is not None:
                        offset = part * size + at
                        self._place(value, prefix + last, 0, power, offset=offset)
            self._place(values, f"{prefix}out_proj.weight", 1, -1, offset=at)
            self._units[pairs.units].grows = self._units[values.units].grows = False
        made = self._new(size)
        self._place(made, f"{prefix}out_proj.weight", 0, 1)
        if module.out_proj.bias is not None:
            self._place(made, f"{prefix}out_proj.bias", 0, 1)
        return made

    def _finished(self, parts: list[_Found]) -> Units:
        """A class with its domains numbered from 0."""
        numbers: dict[int, int] = {}
        for part in parts:
            for each in (*(m[2] for m in part.members), *(d for n in part.norms for d in n[2:])):
                numbers.setdefault(_root(self._joined, each), len(numbers))

        def number(domain: int) -> int:
            return numbers[_root(self._joined, domain)]

        members = [
            Member(n, a, number(d), p, e, o) for f in parts for n, a, d, p, e, o in f.members
        ]
        norms = [
            Norm(f"{n}.weight", f"{n}.bias", f"{n}.running_mean", f"{n}.running_var", eps,
                 number(before), number(after))
            for part in parts for n, eps, before, after in part.norms
        ]  # fmt: skip
        members += [member for norm in norms for member in norm_members(norm)]
        flags = [(True, True)] * len(numbers)
        for domain, (scalable, flippable) in enumerate(self._domains):
            if (root := _root(self._joined, domain)) in numbers:
                at = numbers[root]
                flags[at] = (flags[at][0] and scalable, flags[at][1] and flippable)
        domains = tuple(Domain(*each) for each in flags)
        grows = all(part.grows for part in parts)
        return Units(parts[0].size, tuple(members), tuple(norms), domains, grows)


def _root(parents: Mapping[int, int], number: int) -> int:
    while number in parents:
        number = parents[number]
    return number


def _unite(parents: dict[int, int], one: int, other: int) -> None:
    if (a := _root(parents, one)) != (b := _root(parents, other)):
        parents[b] = a
