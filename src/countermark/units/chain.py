"""The units of a plain chain of layers, from names and shapes alone: no torch, no architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, islice, pairwise, permutations

from countermark.errors import ConfigError
from countermark.units.base import Domain, Member, Norm, Units, natural

_EPS = 1e-5  # of batch norms; a file does not say
_MOST_ORDERS = 5040  # of the parts of a model that are tried
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def chain_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Units, ...]:
    """The units between the layers of a network whose layers feed each other in order.

    Layers are taken in the order of the numbers in their names, parts of a model in the one order
    in which each layer's inputs are the outputs of the one before. Between them ReLU is assumed.

    Args:
        shapes: every tensor's shape by name, as in a state dict.

    Raises:
        ConfigError: there is no such order, or more than one: the architecture must be named.
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = shape
    fitting = list(islice(_fitting(modules), 2))
    if len(fitting) != 1:
        how = "more than one order" if fitting else "no order"
        raise ConfigError(
            f"the reference's layers fit together in {how}, so they are no plain chain: "
            "name the architecture with --model, or give a live model as the reference"
        )
    return tuple(_units(modules, *each) for each in _links(modules, fitting[0]))


def _fitting(modules: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[list[str]]:
    """Orders of the modules in which every layer takes what the one before gives."""
    ordered = sorted(modules, key=natural)
    parts = [list(group) for _, group in groupby(ordered, key=_part)]
    tried = islice(permutations(parts), _MOST_ORDERS)
    orders = ([name for part in order for name in part] for order in tried)
    return [order for order in orders if _fits(modules, order)]


def _fits(modules: Mapping[str, Mapping[str, tuple[int, ...]]], order: Sequence[str]) -> bool:
    layers = [modules[name]["weight"] for name in order if _is_layer(modules[name])]
    if len(layers) < 2 or not all(_each(a, b) for a, b in pairwise(layers)):
        return False
    width = 0
    for name in order:  # a norm stands behind the layer that it belongs to
        shape = modules[name].get("weight", modules[name].get("running_mean"))
        if shape is None:
            continue
        if len(shape) == 1 and shape[0] != width:
            return False
        width = shape[0]
    return True


def _links(
    modules: Mapping[str, Mapping[str, tuple[int, ...]]], order: Sequence[str]
) -> list[tuple[str, tuple[str, ...], str]]:
    """Each layer with the norms behind it and the next layer."""
    at = [place for place, name in enumerate(order) if _is_layer(modules[name])]
    return [(order[a], tuple(order[a + 1 : b]), order[b]) for a, b in pairwise(at)]


def _units(
    modules: Mapping[str, Mapping[str, tuple[int, ...]]], producer: str, between: tuple[str, ...],
    consumer: str,
) -> Units:  # fmt: skip
    members = [
        Member(_joined(producer, last), 0, 0, 1)
        for last in ("weight", "bias")
        if last in modules[producer]
    ]
    domains, norms = [Domain()], []
    for module in between:
        if set(_STATISTICS) <= set(modules[module]):
            weight, bias, mean, var = (_joined(module, each) for each in _STATISTICS)
            before = len(domains) - 1
            norm = Norm(weight, bias, mean, var, _EPS, before, before + 1)
            norms.append(norm)
            members += norm_members(norm)
            domains.append(Domain())
    domains[-1] = Domain(flippable=False)
    produced, consumed = modules[producer]["weight"], modules[consumer]["weight"]
    each = _each(produced, consumed)
    members.append(Member(_joined(consumer, "weight"), 1, len(domains) - 1, -1, each))
    return Units(produced[0], tuple(members), tuple(norms), tuple(domains))


def norm_members(norm: Norm) -> list[Member]:
    """A batch norm's four tensors as members."""
    return [
        Member(norm.weight, 0, norm.after, 1),
        Member(norm.bias, 0, norm.after, 1),
        Member(norm.mean, 0, norm.before, 1),
        Member(norm.var, 0, norm.before, 2),
    ]


def _is_layer(module: Mapping[str, tuple[int, ...]]) -> bool:
    return len(module.get("weight", ())) > 1


def _each(produced: tuple[int, ...], consumed: tuple[int, ...]) -> int:
    """How many inputs of a layer belong to one output of the layer before; 0 where none fit."""
    each, rest = divmod(consumed[1], produced[0])
    return each if not rest and (each == 1 or len(consumed) == 2 < len(produced)) else 0


def _joined(module: str, last: str) -> str:
    return f"{module}.{last}" if module else last


def _part(name: str) -> str:
    """The part of a model that a module belongs to; of numbered ones, all."""
    first = name.partition(".")[0]
    return "" if first.isdigit() else first
