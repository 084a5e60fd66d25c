"""Describe permutation groups as names and axes of tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ScaleDomain:
    """A part of a group between producers and consumers, with one factor for each unit.

    Attributes:
        scalable: positive factors leave the outputs unchanged, because every operation in between
            is positively homogeneous.
        flippable: signs leave the outputs unchanged, because every operation in between is odd.
    """

    scalable: bool = True
    flippable: bool = True


@dataclass(frozen=True)
class GroupMember:
    """The place of a group's units on one axis of a tensor: `each` positions a unit from `offset`.

    Attributes:
        name, axis: of the tensor.
        domain: the scale domain whose factor applies, as an index of the group's `domains`.
        power: the exponent of that factor: 1 for producers, −1 for consumers, 2 for a variance.
        each: positions of one unit; more than 1 if a linear layer reads flattened channels.
        offset: position of the first unit; above 0 if a tensor joins several matrices.
    """

    name: str
    axis: int
    domain: int
    power: int
    each: int = 1
    offset: int = 0

    def compute_positions(self, units: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the positions (n·each,) of units (n,) along the axis, in that order."""
        # int64 throughout, because a caller's smaller integers could overflow for wide layers.
        starts = self.offset + np.asarray(units, dtype=np.int64) * self.each
        return (starts[:, None] + np.arange(self.each)).reshape(-1)  # (n, each) -> (n·each,)


@dataclass(frozen=True)
class BatchNormTensors:
    """A batch norm on units, which absorbs the factor of the domain before it.

    The statistics absorb the size of the factor, and the weight absorbs its sign.

    Attributes:
        weight, bias, mean, var: names of tensors (units,).
        eps: number that is added to the variance.
        before, after: the domains on its two sides.
    """

    weight: str
    bias: str
    mean: str
    var: str
    eps: float
    before: int
    after: int


@dataclass(frozen=True)
class PermutationGroup:
    """One permutation group: units that can all be reordered together.

    Attributes:
        size: number of units.
        members: places of the units in tensors, including the tensors of norms.
        norms: the batch norms on the units.
        domains: the scale domains.
        grows: units can be added, because only weights depend on the number of units.
    """

    size: int
    members: tuple[GroupMember, ...]
    norms: tuple[BatchNormTensors, ...]
    domains: tuple[ScaleDomain, ...]
    grows: bool = True

    def has_any_member(self, names: tuple[str, ...]) -> bool:
        """Return true if any of the named tensors is a member, or if no names are given."""
        # Callers pass no names to select every group.
        return not names or any(member.name in names for member in self.members)


def make_natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers in names as numbers: "layer2" before "layer10"."""
    # The -1 sorts text before numbers; the pairs keep text and numbers from being compared.
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
