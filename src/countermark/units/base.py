"""What a class of units is, as names and axes of tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Domain:
    """A stretch between producers and consumers, with one factor for each unit.

    Attributes:
        scalable: positive factors change nothing: all between is positively homogeneous.
        flippable: so do signs: all between is odd.
    """

    scalable: bool = True
    flippable: bool = True


@dataclass(frozen=True)
class Member:
    """Where the units lie along one axis of one tensor: `each` positions a unit from `offset` on.

    Attributes:
        name, axis: of the tensor.
        domain: which factor it scales with, as a place in `Units.domains`.
        power: the exponent of that factor: 1 of producers, −1 of consumers, 2 of a variance.
        each: positions of one unit, where a linear layer reads flattened channels.
        offset: position of the first unit, where a tensor joins several matrices.
    """

    name: str
    axis: int
    domain: int
    power: int
    each: int = 1
    offset: int = 0

    def positions(self, units: NDArray[np.integer]) -> NDArray[np.int64]:
        """The positions (n·each,) of units (n,) along the axis, in that order."""
        starts = self.offset + np.asarray(units, dtype=np.int64) * self.each
        return (starts[:, None] + np.arange(self.each)).reshape(-1)  # (n, each) -> (n·each,)


@dataclass(frozen=True)
class Norm:
    """A batch norm on units. Its weight takes up what its statistics do not of a factor before it.

    Attributes:
        weight, bias, mean, var: names of tensors (units,).
        eps: what is added to the variance.
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
class Units:
    """One class of units, all of which can be reordered together.

    Attributes:
        size: how many there are.
        members: their places, those of norms included.
        norms: the batch norms among them.
        domains: their scale domains.
        grows: more can be added: no consumer but weights asks for their number.
    """

    size: int
    members: tuple[Member, ...]
    norms: tuple[Norm, ...]
    domains: tuple[Domain, ...]
    grows: bool = True

    def touches(self, names: tuple[str, ...]) -> bool:
        """Whether any of the named tensors is a member; of no names, always."""
        return not names or any(member.name in names for member in self.members)


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts names with numbers in them by these."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
