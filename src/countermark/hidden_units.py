"""Hidden units: what of a suspect shows that an axis may be permuted for a null hypothesis.

A key names the axis, and its owner may be dishonest. Input pixels, classes, tokens and positions
are not exchangeable, so a rank among their permutations proves nothing. An axis is accepted only
where the suspect itself shows that it holds hidden units, and where their order means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError
from countermark.subject import HiddenUnits
from countermark.units import Architecture, blocks_of

if TYPE_CHECKING:
    from torch import nn

    from countermark.units import Units
    from countermark.weights import Suspect, Weights

_Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
_Place: TypeAlias = tuple[str, int]  # a tensor and one of its axes
_Shower: TypeAlias = Literal["architecture", "configuration", "shapes"]

ORDERED = 1e-3
"""Units whose index correlates with a statistic of theirs at this level are in an order."""

_MOST_STATISTICS = 32  # of a class of units: a residual stream has hundreds of tensors
_FEW = 30  # units up to which the rank correlation's distribution is drawn, not approximated
_DRAWS = 40_000


def find_hidden_units(
    suspect: Suspect, weights: Weights, where: Mapping[str, str], axes: Mapping[str, int]
) -> HiddenUnits:
    """Find out whether the axes that a key permutes hold hidden units of the suspect.

    Args:
        suspect: a file, or a live module, whose forward is traced.
        weights: the same, opened.
        where: for each tensor of the key its name in the suspect.
        axes: for each tensor of the key the axis that is permuted, −1 for none.

    Returns: what shows it, or why it is refused.
    """
    shapes = {name: info.shape for name, info in weights.tensors.items()}
    wanted = {(where[name], axis) for name, axis in axes.items() if axis >= 0}
    size = next((shapes[name][axis] for name, axis in sorted(wanted)), 0)
    shown_by, places, refused = _seen(suspect, weights, set(where.values()), wanted)
    if refused is None:
        refused = _find_order(weights, places, size)
    return HiddenUnits(dict(sorted(wanted)), size, None if refused else shown_by, refused)


def _seen(
    suspect: Suspect, weights: Weights, read: set[str], wanted: set[_Place]
) -> tuple[_Shower, list[_Place], str | None]:
    """What shows the units, all places that they have in the suspect, or why it is refused."""
    shapes = {name: info.shape for name, info in weights.tensors.items()}
    if hasattr(suspect, "named_parameters"):
        from countermark.units.tracing import units_of

        try:
            classes = units_of(cast("nn.Module", suspect))
        except ConfigError:
            pass  # a forward that cannot be followed: its shapes may leave one way to see it
        else:
            found = _class_of(classes, shapes, read, wanted)
            why = None if found else (
                f"{_in_words(wanted)} is no axis of hidden units in the traced architecture of the "
                "suspect: inputs, classes, tokens, positions, kernels and units that are also "
                "another axis of what is read are not exchangeable"
            )  # fmt: skip
            return "architecture", found or [], why
    path = Path(weights.name)
    architecture = Architecture.beside(path) if path.exists() else None
    if architecture is not None:
        found = _class_of(blocks_of(shapes, architecture), shapes, read, wanted)
        if found:
            return "configuration", found, None
    return "shapes", *_by_shapes(_without_views(weights), read, wanted)


def _class_of(
    classes: Sequence[Units], shapes: _Shapes, read: set[str], wanted: set[_Place]
) -> list[_Place] | None:
    """The places of the class of units that has just the wanted ones among the tensors read.

    A tensor that is read and has the same units along another axis, or unpermuted, would make the
    permutation one of half of the units' weights, under which nothing is invariant.
    """
    for units in classes:
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


def _without_views(weights: Weights) -> _Shapes:
    """Shapes with each tensor once: a view takes the place of a stored tensor of its sizes."""
    shapes = {n: each.shape for n, each in weights.tensors.items() if n not in weights.views}
    for view in weights.views:
        sizes = sorted(weights.tensors[view].shape)
        stored = (n for n, shape in shapes.items() if len(shape) > 1 and sorted(shape) == sizes)
        shapes.pop(next(stored, ""), None)
        shapes[view] = weights.tensors[view].shape
    return shapes


def _by_shapes(
    shapes: _Shapes, read: set[str], wanted: set[_Place]
) -> tuple[list[_Place], str | None]:
    """All places of the units where shapes leave one way to see them, or why they do not."""
    sizes = {shapes.get(name, ())[axis : axis + 1] for name, axis in wanted}
    what = f"that {_in_words(wanted)} holds hidden units cannot be seen in the suspect's shapes"
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
    makers = [name for name, axis in places if axis == 0]
    hearers = [name for name, axis in places if axis == 1]
    if len(places) != 2 or len(makers) != 1 or len(hearers) != 1 or makers == hearers:
        return [], (
            f"{what}: {size} is not the output axis of exactly one weight, the input axis of "
            "exactly one other and of nothing else but vectors; give a live module, which is traced"
        )
    maker, hearer = makers[0], hearers[0]
    biased = any(f"{_module(each)}.bias".lstrip(".") in vectors for each in (maker, hearer))
    if len(matrices[maker]) == 2 and not biased:
        return [], (
            f"{what}: neither {maker} nor {hearer} has a bias of {size}, so {maker} may be a table "
            "of tokens or positions; give a live module, which is traced"
        )
    if _leads(matrices, maker, hearer):
        return [], (
            f"{what}: the outputs of {hearer} may lead to {maker}, so {size} may be both the input "
            "and the output of the network; give a live module, which is traced"
        )
    found = [(maker, 0), (hearer, 1), *((each, 0) for each in vectors)]
    if any(place not in wanted for place in found if place[0] in read) or wanted - set(found):
        return [], f"{what}: the key reads units that it does not permute along with the others"
    return found, None


def _leads(matrices: _Shapes, maker: str, hearer: str) -> bool:
    """Whether layers, by their sizes, may lead from the outputs of one to the inputs of another.

    What a layer gives may be heard as it is, flattened, or joined with what another one gives.
    """
    target = matrices[maker][1]
    between = [shape for name, shape in matrices.items() if name not in (maker, hearer)]
    given = {shape[0] for shape in matrices.values()}
    mapped = any(len(shape) > 2 for shape in matrices.values())

    def heard(size: int, by: int) -> bool:
        flattened = mapped and size > 1 and by % size == 0
        return by == size or flattened or by - size in given

    reached, new = set[int](), {matrices[hearer][0]}
    while new:
        if any(heard(size, target) for size in new):
            return True
        reached |= new
        new = {s[0] for s in between if any(heard(size, s[1]) for size in new)} - reached
    return False


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _in_words(places: set[_Place]) -> str:
    return " with ".join(f"axis {axis} of {name}" for name, axis in sorted(places))


def _find_order(weights: Weights, places: Sequence[_Place], size: int) -> str | None:
    """Why the order of the units means something, by what correlates with their index.

    Statistics are the norms of their weights and the values of vectors: biases, gains, moments.
    """
    vectors = [each for each in places if len(weights.tensors[each[0]].shape) == 1]
    ordered = [*vectors, *(each for each in places if each not in vectors)]
    found = list(islice(_statistics(weights, ordered), _MOST_STATISTICS))
    for name, values in found:
        p = _rank_correlation_p(values)
        if p * len(found) < ORDERED:
            return (
                f"the {size} units are in an order that means something, so they are not "
                f"exchangeable: the rank correlation of {name} with the unit index has p = "
                f"{p:.1g}, below {ORDERED:g} for one of {len(found)} statistics"
            )
    return None


def _statistics(
    weights: Weights, places: Sequence[_Place]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """What each unit has in each tensor, as one number (size,); no constants."""
    for name, axis in places:
        values = np.moveaxis(weights.read(name).astype(np.float64), axis, 0)
        if values.ndim == 1:
            what, each = name, values
        else:
            rows = values.reshape(len(values), -1)
            what, each = f"the norms of {name}", np.linalg.norm(rows, axis=1)
        if (each != each[0]).any():
            yield what, each


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks (n,) from 0; equal values share the mean of theirs."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    found: NDArray[np.float64] = (last - (counts - 1) / 2)[at]
    return found


def _rank_correlation_p(values: NDArray[np.float64]) -> float:
    """The two-sided p-value of Spearman's correlation of values (n,) with their index."""
    n, ranks = len(values), _ranks(values)
    ranks = (ranks - ranks.mean()) / ranks.std()
    index = np.arange(n) - (n - 1) / 2
    index = index / index.std()
    observed = abs(float(ranks @ index)) / n
    if n > _FEW:
        return math.erfc(observed * math.sqrt((n - 1) / 2))
    random = np.random.default_rng(0)  # of few units the normal tail is far too wide
    drawn = random.permuted(np.tile(ranks, (_DRAWS, 1)), axis=1) @ index / n
    return (1 + int(np.count_nonzero(abs(drawn) >= observed - 1e-12))) / (_DRAWS + 1)
