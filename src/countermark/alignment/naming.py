"""Find a reference's tensors among the tensors of a suspect, whatever names the suspect gives them.

The names of the reference are kept if all of them fit, unchanged or with another prefix. Otherwise
tensors are told apart by rank, by the sizes of axes to which no neurons can have been added, and by
their values without regard to order and scale. A tensor that the key reads is compared only if the
reference has its values from before the mark; else it must be the one tensor that is left over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.assigning import solve_assignment
from countermark.alignment.reducing import Floats
from countermark.checkpoints import Weights, find_wrapped_names
from countermark.errors import AlignmentError

_QUANTILES = 101
_NEVER = 1e6  # distance of tensors whose shapes do not fit


@dataclass(frozen=True)
class WantedTensor:
    """A tensor of the reference that is sought in a suspect.

    Attributes:
        shape: in the reference.
        free: axes that may be longer or shorter in the suspect.
        values: in the reference; None for a tensor that must not be compared.
    """

    shape: tuple[int, ...]
    free: frozenset[int]
    values: NDArray[Any] | None

    def is_compatible(self, shape: tuple[int, ...]) -> bool:
        """Return true if a tensor of this shape in the suspect may be the wanted tensor."""
        return len(shape) == len(self.shape) and all(
            one == other or axis in self.free
            for axis, (one, other) in enumerate(zip(self.shape, shape, strict=True))
        )


def find_tensor_names(weights: Weights, wanted: Mapping[str, WantedTensor]) -> dict[str, str]:
    """Return the suspect's name of each wanted tensor.

    Raises:
        AlignmentError: a tensor is missing, or several tensors could be the one that the key reads.
    """
    if all(
        name in weights.tensors and each.is_compatible(weights.tensors[name].shape)
        for name, each in wanted.items()
    ):
        return {name: name for name in wanted}
    alike = find_wrapped_names(weights, {name: each.shape for name, each in wanted.items()})
    # Two prefixes that fit equally well do not tell the tensors apart; their values may.
    if len(alike) == 1:
        return alike[0]
    found = _find_closest_names(
        weights, {n: each for n, each in wanted.items() if each.values is not None}
    )
    # A tensor of the key is found by elimination: comparing its values would use the mark.
    left = [name for name in weights.tensors if name not in found.values()]
    for name, each in wanted.items():
        if each.values is None:
            able = [other for other in left if each.is_compatible(weights.tensors[other].shape)]
            if len(able) != 1:
                raise AlignmentError(
                    f"{len(able)} tensors of the suspect may be {name} {list(each.shape)}, which "
                    "the key reads: expected one that is no other tensor of the reference"
                )
            found[name] = able[0]
            left.remove(able[0])
    return found


def _find_closest_names(weights: Weights, wanted: Mapping[str, WantedTensor]) -> dict[str, str]:
    """Assign the suspect's tensors to all compared tensors at once, with the least total distance.

    Raises:
        AlignmentError: there is no assignment in which all shapes fit.
    """
    names = [
        name for name, info in weights.tensors.items()
        if any(each.is_compatible(info.shape) for each in wanted.values())
    ]  # fmt: skip
    if len(names) < len(wanted):
        raise AlignmentError(
            f"the suspect has {len(names)} tensors of shapes that fit, the reference {len(wanted)}"
        )
    curves = {name: _compute_quantiles(weights.read(name)) for name in names}
    # Half of `_NEVER` bounds the cost of a pair that fits, so a pair that does not fit costs more.
    costs = np.full((len(wanted), len(names)), _NEVER)
    for row, each in enumerate(wanted.values()):
        own = _compute_quantiles(np.asarray(each.values))
        for column, name in enumerate(names):
            if each.is_compatible(weights.tensors[name].shape):
                costs[row, column] = min(float(np.linalg.norm(own - curves[name])), _NEVER / 2)
    rows, columns = solve_assignment(costs)
    if costs[rows, columns].max(initial=0.0) >= _NEVER:
        raise AlignmentError("the suspect's tensors do not fit those of the reference one by one")
    order: Sequence[str] = list(wanted)
    return {order[r]: names[c] for r, c in zip(rows, columns, strict=True)}


def _compute_quantiles(values: NDArray[Any]) -> Floats:
    """Return the quantiles of a tensor's values at 101 levels, which no reordering changes.

    The rows of tensors with several axes are first normalised to one length.
    """
    wide = values.astype(np.float64)
    if wide.ndim > 1:
        rows = wide.reshape(len(wide), -1)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        # Rescaling neurons changes the lengths of rows; the root mean square of each row becomes 1.
        wide = rows / np.where(lengths > 0, lengths, 1) * np.sqrt(rows.shape[1])
    curve: Floats = np.quantile(wide, np.linspace(0, 1, _QUANTILES))
    return curve
