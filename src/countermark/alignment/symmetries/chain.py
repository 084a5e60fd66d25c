"""Find the permutation groups of a plain chain of layers from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, islice, pairwise, permutations

from countermark.alignment.symmetries.base import (
    BatchNormTensors,
    GroupMember,
    PermutationGroup,
    ScaleDomain,
    make_natural_key,
)
from countermark.errors import ConfigError

_EPS = 1e-5  # of batch norms: the default of torch, as a file does not store the value
_MOST_ORDERS = 5040  # 7!, so all orders of up to seven parts are tried
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def find_chain_groups(shapes: Mapping[str, tuple[int, ...]]) -> tuple[PermutationGroup, ...]:
    """Return the permutation groups between the layers of a network whose layers form one chain.

    The layers of each part of a model are taken in the order of the numbers in their names. The
    parts must have exactly one order in which each layer's inputs are the outputs of the layer
    before. The activation between layers is assumed to be ReLU.

    Args:
        shapes: every tensor's shape by name, as in a state dict.

    Raises:
        ConfigError: there is no such order, or more than one: the architecture must be named.
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = shape
    # Two orders are enough to know that the order is ambiguous.
    fitting = list(islice(_find_orders(modules), 2))
    if len(fitting) != 1:
        how = "more than one order" if fitting else "no order"
        raise ConfigError(
            f"the reference's layers fit together in {how}, so they are no plain chain: "
            "name the architecture with --model, or give a live model as the reference"
        )
    return tuple(_make_group(modules, *each) for each in _list_links(modules, fitting[0]))


def _find_orders(modules: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[list[str]]:
    """List the orders of layers in which each takes in as many units as the layer before gives out."""
    ordered = sorted(modules, key=make_natural_key)
    parts = [list(group) for _, group in groupby(ordered, key=_find_part)]
    # Within a part the numbers in the names give the order; only whole parts are permuted.
    tried = islice(permutations(parts), _MOST_ORDERS)
    orders = ([name for part in order for name in part] for order in tried)
    return [order for order in orders if _is_chain(modules, order)]


def _is_chain(modules: Mapping[str, Mapping[str, tuple[int, ...]]], order: Sequence[str]) -> bool:
    """Return true if the layers form a chain in this order, with norms behind their layers."""
    layers = [modules[name]["weight"] for name in order if _is_layer(modules[name])]
    if len(layers) < 2 or not all(_count_inputs_per_unit(a, b) for a, b in pairwise(layers)):
        return False
    width = 0
    for name in order:  # a norm stands behind its layer
        shape = modules[name].get("weight", modules[name].get("running_mean"))
        # A module without shapes that tell a width, such as a scalar counter's, changes nothing.
        if shape is None:
            continue
        if len(shape) == 1 and shape[0] != width:
            return False
        width = shape[0]
    return True


def _list_links(
    modules: Mapping[str, Mapping[str, tuple[int, ...]]], order: Sequence[str]
) -> list[tuple[str, tuple[str, ...], str]]:
    """Return each layer with the norms behind it and the next layer."""
    at = [place for place, name in enumerate(order) if _is_layer(modules[name])]
    return [(order[a], tuple(order[a + 1 : b]), order[b]) for a, b in pairwise(at)]


def _make_group(
    modules: Mapping[str, Mapping[str, tuple[int, ...]]], producer: str, between: tuple[str, ...],
    consumer: str,
) -> PermutationGroup:  # fmt: skip
    """Make the permutation group between two layers.

    Args:
        modules: shapes by module and last part of the tensor's name.
        producer: name of the first layer.
        between: names of the modules between the layers.
        consumer: name of the second layer.
    """
    members = [
        GroupMember(_join_name(producer, last), 0, 0, 1)
        for last in ("weight", "bias")
        if last in modules[producer]
    ]
    domains, norms = [ScaleDomain()], []
    for module in between:
        if set(_STATISTICS) <= set(modules[module]):
            weight, bias, mean, var = (_join_name(module, each) for each in _STATISTICS)
            before = len(domains) - 1
            norm = BatchNormTensors(weight, bias, mean, var, _EPS, before, before + 1)
            norms.append(norm)
            members += make_norm_members(norm)
            domains.append(ScaleDomain())
    # ReLU is positively homogeneous but not odd: scales pass it, signs do not.
    domains[-1] = ScaleDomain(flippable=False)
    produced, consumed = modules[producer]["weight"], modules[consumer]["weight"]
    each = _count_inputs_per_unit(produced, consumed)
    members.append(GroupMember(_join_name(consumer, "weight"), 1, len(domains) - 1, -1, each))
    return PermutationGroup(produced[0], tuple(members), tuple(norms), tuple(domains))


def make_norm_members(norm: BatchNormTensors) -> list[GroupMember]:
    """Return the four tensors of a batch norm as members."""
    return [
        GroupMember(norm.weight, 0, norm.after, 1),
        GroupMember(norm.bias, 0, norm.after, 1),
        GroupMember(norm.mean, 0, norm.before, 1),
        # A variance grows with the square of the factor.
        GroupMember(norm.var, 0, norm.before, 2),
    ]


def _is_layer(module: Mapping[str, tuple[int, ...]]) -> bool:
    """Return true if a module has a weight with more than one axis."""
    return len(module.get("weight", ())) > 1


def _count_inputs_per_unit(produced: tuple[int, ...], consumed: tuple[int, ...]) -> int:
    """Return how many inputs of a layer belong to one output of the layer before; 0 if none fit.

    More than one input an output is possible only between a convolution and a linear layer, which
    reads flattened channels.
    """
    each, rest = divmod(consumed[1], produced[0])
    return each if not rest and (each == 1 or len(consumed) == 2 < len(produced)) else 0


def _join_name(module: str, last: str) -> str:
    """Return the name of a tensor of a module; the root module has an empty name."""
    return f"{module}.{last}" if module else last


def _find_part(name: str) -> str:
    """Return the part of a model to which a module belongs; numbered modules form one part."""
    first = name.partition(".")[0]
    return "" if first.isdigit() else first
