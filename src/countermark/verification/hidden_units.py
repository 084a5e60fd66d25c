"""Hidden units: check that a suspect allows an axis to be permuted for a null hypothesis.

A key names the axis, and its owner may be dishonest. Input pixels, classes, tokens and positions
are not exchangeable, so a rank among their permutations proves nothing. An axis is accepted only
if the suspect itself shows that the axis holds hidden units, and if their order has no meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.symmetries import Architecture, find_block_groups
from countermark.errors import ConfigError
from countermark.results.subject import HiddenUnits

if TYPE_CHECKING:
    from torch import nn

    from countermark.alignment.symmetries import PermutationGroup
    from countermark.checkpoints import Suspect, Weights

_Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
_Place: TypeAlias = tuple[str, int]  # a tensor and one of its axes
_Shower: TypeAlias = Literal["architecture", "configuration", "shapes"]

ORDERED = 1e-3
"""Units whose index correlates with a statistic of theirs at this level are in an order."""

_MOST_STATISTICS = 32  # of a class of units: a residual stream has hundreds of tensors
_FEW = 30  # up to so many units the correlation's distribution is simulated
_DRAWS = 40_000


def find_hidden_units(
    suspect: Suspect, weights: Weights, where: Mapping[str, str], axes: Mapping[str, int]
) -> HiddenUnits:
    """Determine whether the axes that a key permutes hold hidden units of the suspect.

    Args:
        suspect: a file, or a live module, whose forward is traced.
        weights: the same suspect, opened.
        where: for each tensor of the key its name in the suspect.
        axes: for each tensor of the key the axis that is permuted, −1 for no axis.

    Returns: how the suspect shows the hidden units, or why the axes are refused.
    """
    shapes = {name: info.shape for name, info in weights.tensors.items()}
    wanted = {(where[name], axis) for name, axis in axes.items() if axis >= 0}
    size = next((shapes[name][axis] for name, axis in sorted(wanted)), 0)
    shown_by, places, refused = _locate_units(suspect, weights, set(where.values()), wanted)
    if refused is None:
        refused = _find_order_problem(weights, places, size)
    return HiddenUnits(dict(sorted(wanted)), size, None if refused else shown_by, refused)


def _locate_units(
    suspect: Suspect, weights: Weights, read: set[str], wanted: set[_Place]
) -> tuple[_Shower, list[_Place], str | None]:
    """Locate the hidden units in the suspect.

    Args:
        suspect: a file, or a live module.
        weights: the same suspect, opened.
        read: names of the suspect's tensors that the key reads.
        wanted: the tensors and axes that the key permutes.

    Returns: the kind of proof, all tensors and axes that hold the units, and why the axes are
        refused (None if they are accepted).
    """
    shapes = {name: info.shape for name, info in weights.tensors.items()}
    # A live module is preferred: its traced forward leaves nothing to guess.
    if hasattr(suspect, "named_parameters"):
        from countermark.alignment.symmetries.tracing import trace_permutation_groups

        try:
            classes = trace_permutation_groups(cast("nn.Module", suspect))
        except ConfigError:
            pass  # the forward cannot be traced: shapes may still allow only one explanation
        else:
            found = _find_unit_class(classes, shapes, read, wanted)
            why = None if found else (
                f"{_describe_places(wanted)} is no axis of hidden units in the traced architecture of the "
                "suspect: inputs, classes, tokens, positions, kernels and units that are also "
                "another axis of what is read are not exchangeable"
            )  # fmt: skip
            return "architecture", found or [], why
    path = Path(weights.name)
    # The configuration is a file beside the suspect; a live module's name is no path.
    architecture = Architecture.load_beside(path) if path.exists() else None
    if architecture is not None:
        found = _find_unit_class(find_block_groups(shapes, architecture), shapes, read, wanted)
        if found:
            return "configuration", found, None
    return "shapes", *_locate_by_shapes(_collect_distinct_shapes(weights), read, wanted)


def _find_unit_class(
    classes: Sequence[PermutationGroup], shapes: _Shapes, read: set[str], wanted: set[_Place]
) -> list[_Place] | None:
    """Return all places of the class of units whose members among the read tensors are `wanted`.

    Returns None if there is no such class. A tensor that the key reads and that holds the same
    units along another axis, or unpermuted, is refused: the permutation would then move only some
    of a unit's weights, and no property of the network would be invariant under it.
    """
    for units in classes:
        # Exactly the wanted axes must be read: one more read member would stay unpermuted.
        members = [each for each in units.members if each.name in read]
        whole = [
            (each.name, each.axis)
            for each in units.members
            if each.each == 1 and each.offset == 0
            and shapes.get(each.name, ())[each.axis : each.axis + 1] == (units.size,)
        ]  # fmt: skip
        if len(members) == len(wanted) and wanted <= set(whole):
            return whole
    return None


def _collect_distinct_shapes(weights: Weights) -> _Shapes:
    """Return shapes with each tensor once: a view replaces a stored tensor of the same sizes."""
    shapes = {n: each.shape for n, each in weights.tensors.items() if n not in weights.views}
    for view in weights.views:
        sizes = sorted(weights.tensors[view].shape)
        # A transposed view and its stored tensor are one layer; counted twice, its size would look
        # ambiguous.
        stored = (n for n, shape in shapes.items() if len(shape) > 1 and sorted(shape) == sizes)
        shapes.pop(next(stored, ""), None)
        shapes[view] = weights.tensors[view].shape
    return shapes


def _locate_by_shapes(
    shapes: _Shapes, read: set[str], wanted: set[_Place]
) -> tuple[list[_Place], str | None]:
    """Return all places of the units if shapes allow one explanation only, else the reason.

    Args:
        shapes: shapes of the suspect's tensors.
        read: names of the suspect's tensors that the key reads.
        wanted: the tensors and axes that the key permutes.
    """
    sizes = {shapes.get(name, ())[axis : axis + 1] for name, axis in wanted}
    what = (
        f"that {_describe_places(wanted)} holds hidden units cannot be seen in the suspect's shapes"
    )
    if len(sizes) != 1 or not all(sizes):
        return [], f"{what}: its sizes differ"
    (size,) = sizes.pop()
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    vectors = [name for name, shape in shapes.items() if shape == (size,)]
    places = [
        (name, axis)
        for name, shape in matrices.items()
        for axis, length in enumerate(shape)
        if length == size
    ]
    # Weights are stored as (outputs, inputs, …): axis 0 makes the units, axis 1 takes them.
    makers = [name for name, axis in places if axis == 0]
    hearers = [name for name, axis in places if axis == 1]
    if len(places) != 2 or len(makers) != 1 or len(hearers) != 1 or makers == hearers:
        return [], (
            f"{what}: {size} is not the output axis of exactly one weight, the input axis of "
            "exactly one other and of nothing else but vectors; give a live module, which is traced"
        )
    maker, hearer = makers[0], hearers[0]
    biased = any(
        f"{_get_module_name(each)}.bias".lstrip(".") in vectors for each in (maker, hearer)
    )
    # An embedding table has the shape of a linear layer without bias, and its rows are tokens.
    if len(matrices[maker]) == 2 and not biased:
        return [], (
            f"{what}: neither {maker} nor {hearer} has a bias of {size}, so {maker} may be a table "
            "of tokens or positions; give a live module, which is traced"
        )
    if _has_return_path(matrices, maker, hearer):
        return [], (
            f"{what}: the outputs of {hearer} may lead to {maker}, so {size} may be both the input "
            "and the output of the network; give a live module, which is traced"
        )
    found = [(maker, 0), (hearer, 1), *((each, 0) for each in vectors)]
    if any(place not in wanted for place in found if place[0] in read) or wanted - set(found):
        return [], f"{what}: the key reads units that it does not permute along with the others"
    return found, None


def _has_return_path(matrices: _Shapes, maker: str, hearer: str) -> bool:
    """Return true if, by their sizes, layers may lead from the hearer's outputs to the maker.

    The outputs of a layer may be read as they are, flattened, or concatenated with the outputs of
    another layer.

    Args:
        matrices: shapes of all weights with two or more axes.
        maker: the weight whose outputs are the units.
        hearer: the weight that takes the units as inputs.
    """
    # If layers lead from the hearer back to the maker, the axis may be the network's own input and
    # output.
    target = matrices[maker][1]
    between = [shape for name, shape in matrices.items() if name not in (maker, hearer)]
    given = {shape[0] for shape in matrices.values()}
    mapped = any(len(shape) > 2 for shape in matrices.values())

    def is_compatible(size: int, by: int) -> bool:
        """Return true if a layer with `by` inputs may take the `size` outputs of another layer."""
        flattened = mapped and size > 1 and by % size == 0
        return by == size or flattened or by - size in given

    reached, new = set[int](), {matrices[hearer][0]}
    # Each pass adds the sizes that can be reached by one more layer, until no new size appears.
    while new:
        if any(is_compatible(size, target) for size in new):
            return True
        reached |= new
        new = {s[0] for s in between if any(is_compatible(size, s[1]) for size in new)} - reached
    return False


def _get_module_name(name: str) -> str:
    """Return the name of the module that a tensor belongs to."""
    return name.rpartition(".")[0]


def _describe_places(places: set[_Place]) -> str:
    """Describe tensors and their axes in words."""
    return " with ".join(f"axis {axis} of {name}" for name, axis in sorted(places))


def _find_order_problem(weights: Weights, places: Sequence[_Place], size: int) -> str | None:
    """Return why the order of the units has a meaning; None if no statistic shows an order.

    The statistics are the norms of each unit's weights, and the values of vectors: biases, gains,
    moments. Each is tested for a rank correlation with the index of the units.
    """
    # Vectors come first: they are the cheapest to read, and the number of statistics is limited.
    vectors = [each for each in places if len(weights.tensors[each[0]].shape) == 1]
    ordered = [*vectors, *(each for each in places if each not in vectors)]
    found = list(islice(_iterate_statistics(weights, ordered), _MOST_STATISTICS))
    for name, values in found:
        p = _compute_rank_correlation_p(values)
        # Bonferroni over the statistics: unordered units must not be refused by chance.
        if p * len(found) < ORDERED:
            return (
                f"the {size} units are in an order that means something, so they are not "
                f"exchangeable: the rank correlation of {name} with the unit index has p = "
                f"{p:.1g}, below {ORDERED:g} for one of {len(found)} statistics"
            )
    return None


def _iterate_statistics(
    weights: Weights, places: Sequence[_Place]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield one number per unit (size,) for each tensor, with its name; constants are left out."""
    for name, axis in places:
        values = np.moveaxis(weights.read(name).astype(np.float64), axis, 0)
        if values.ndim == 1:
            what, each = name, values
        else:
            rows = values.reshape(len(values), -1)
            what, each = f"the norms of {name}", np.linalg.norm(rows, axis=1)
        # Constants, such as fresh biases, have no ranks and would divide by a deviation of zero.
        if (each != each[0]).any():
            yield what, each


def _compute_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks (n,) from 0; equal values share their mean rank."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    found: NDArray[np.float64] = (last - (counts - 1) / 2)[at]
    return found


def _compute_rank_correlation_p(values: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of Spearman's correlation of values (n,) with their index."""
    n, ranks = len(values), _compute_ranks(values)
    ranks = (ranks - ranks.mean()) / ranks.std()
    index = np.arange(n) - (n - 1) / 2
    index = index / index.std()
    observed = abs(float(ranks @ index)) / n
    if n > _FEW:
        return math.erfc(observed * math.sqrt((n - 1) / 2))
    random = np.random.default_rng(0)  # for few units the normal approximation is far too wide
    # A fixed seed: the same suspect always gets the same answer.
    drawn = random.permuted(np.tile(ranks, (_DRAWS, 1)), axis=1) @ index / n
    return (1 + int(np.count_nonzero(abs(drawn) >= observed - 1e-12))) / (_DRAWS + 1)
