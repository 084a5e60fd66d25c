"""Fold the batch norms of a reference, for suspects whose norms were folded by an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.reducing import Floats, Tensors
from countermark.alignment.symmetries import BatchNormTensors, GroupMember, PermutationGroup


@dataclass(frozen=True)
class FoldedReference:
    """A reference whose batch norms are folded into the layers before them.

    Attributes:
        tensors: its tensors; a layer without a bias has received one.
        units: its permutation groups, without the norms.
        factors: the factor of each row (axis 0) of a tensor, by the tensor's name.
    """

    tensors: Tensors
    units: tuple[PermutationGroup, ...]
    factors: Mapping[str, Floats]


def fold_batch_norms(
    reference: Mapping[str, NDArray[Any]], units: Sequence[PermutationGroup]
) -> FoldedReference | None:
    """Fold every batch norm that is the only reader of one layer.

    Args:
        reference: tensors by name.
        units: the permutation groups of the reference.

    Returns: the folded reference, or None if no norm can be folded.
    """
    tensors = {name: np.asarray(each, np.float64) for name, each in reference.items()}
    factors: dict[str, Floats] = {}
    found = [_fold_group_norms(each, tensors, factors) for each in units]
    return FoldedReference(tensors, tuple(found), factors) if factors else None


def _fold_group_norms(
    units: PermutationGroup, tensors: Tensors, factors: dict[str, Floats]
) -> PermutationGroup:
    """Fold all batch norms of one permutation group, changing `tensors` and `factors` in place."""
    for norm in units.norms:
        before = [
            m
            for m in units.members
            if m.domain == norm.before and m.name not in _list_norm_tensors(norm)
        ]
        weights = [m for m in before if m.power == 1 and m.name.endswith("weight")]
        others = [m for m in before if m.power != 1]
        others += [n for n in units.norms if n is not norm and n.before == norm.before]  # type: ignore[misc]
        # With a second layer, norm or consumer on the same values, folding would change the others.
        if len(weights) != 1 or others or len(before) > 2:
            continue
        units = _fold_norm(units, norm, weights[0], tensors, factors)
    return units


def _fold_norm(
    units: PermutationGroup,
    norm: BatchNormTensors,
    weight: GroupMember,
    tensors: Tensors,
    factors: dict[str, Floats],
) -> PermutationGroup:
    """Fold one batch norm into a layer and return the permutation group without the norm.

    With factor f = weight / sqrt(var + eps), the layer's weight becomes f * weight and its bias
    becomes norm bias + f * (bias - mean).
    """
    factor = tensors[norm.weight] / np.sqrt(tensors[norm.var] + norm.eps)  # (units,)
    bias = weight.name.removesuffix("weight") + "bias"
    values = tensors[weight.name]
    tensors[weight.name] = values * factor.reshape(-1, *[1] * (values.ndim - 1))
    # A layer before a batch norm usually has no bias, as the norm subtracts the mean anyway.
    shift = tensors.get(bias, np.zeros(units.size)) - tensors[norm.mean]
    tensors[bias] = tensors[norm.bias] + factor * shift
    factors[weight.name] = factor
    for name in _list_norm_tensors(norm):
        tensors.pop(name)
    kept = [
        m for m in units.members if m.name not in (*_list_norm_tensors(norm), weight.name, bias)
    ]
    # Folding merges the two domains of the norm: the layer now produces in the domain behind it.
    kept += [replace(weight, domain=norm.after), GroupMember(bias, 0, norm.after, 1)]
    return PermutationGroup(
        units.size, tuple(kept), tuple(each for each in units.norms if each is not norm),
        units.domains, units.grows,
    )  # fmt: skip


def _list_norm_tensors(norm: BatchNormTensors) -> tuple[str, ...]:
    """Return the names of the four tensors of a batch norm."""
    return norm.weight, norm.bias, norm.mean, norm.var
