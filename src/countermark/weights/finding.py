"""Where the tensors that are wanted are in a suspect, whatever it calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice, permutations, product

from countermark.weights.base import Weights

MOST_CANDIDATES = 1000
"""Renamed tensors are tried in at most this many ways; each is a test that p is corrected for."""

_Shapes = Mapping[str, tuple[int, ...]]


def assignments(
    weights: Weights, wanted: _Shapes, *, partial: bool = False
) -> Iterator[dict[str, str]]:
    """Every way in which the wanted tensors can be found in a suspect; each one is a test.

    A tensor of the wanted name and shape is taken. Where several are wanted and all are there under
    names with another beginning, these are taken. Else a missing one is sought among all others of
    its shape. Yields maps from the wanted name to the suspect's name; none when a shape is missing.
    Beyond `MOST_CANDIDATES` not every one is there: so many are too many to be tried.

    Args:
        weights: the suspect, open.
        wanted: shapes by name.
        partial: where there is no other way, or too many, take those that have their names, or
            names with another beginning, if these are at least half; others are left out.
    """
    if alike := prefixed(weights, wanted):
        yield from alike
        return
    ways = _by_shape(weights, wanted)
    if not partial:
        yield from ways
        return
    tried = list(islice(ways, MOST_CANDIDATES + 1))
    if not 1 <= len(tried) <= MOST_CANDIDATES:
        tried = prefixed(weights, wanted, least=(len(wanted) + 1) // 2) or tried
    yield from tried


def prefixed(
    weights: Weights, wanted: _Shapes, *, least: int | None = None
) -> list[dict[str, str]]:
    """The ways in which the names of a suspect are the wanted ones with another beginning.

    Names are as they are, or one that they have in common is put in front of them or taken off:
    "module.", "bert." and their like.

    Args:
        weights: the suspect, open.
        wanted: shapes by name, at least two: others may end in one name by chance.
        least: how many have to be there; all of None. The ways that have most of them are given.
    """
    if len(wanted) < 2:
        return []
    there = {name: info.shape for name, info in weights.tensors.items()}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, shape in there.items():
        for before, end in _cut(name):
            if wanted.get(end) == shape:
                found.setdefault((before, ""), {})[end] = name
    for name, shape in wanted.items():
        for before, end in islice(_cut(name), 1, None):
            if there.get(end) == shape:
                found.setdefault(("", before), {})[name] = end
    most = max(map(len, found.values()), default=0)
    if most < (len(wanted) if least is None else least) or not most:
        return []
    if len(found.get(("", ""), ())) == most:
        found = {("", ""): found["", ""]}
    ways = [
        {name: way[name] for name in wanted if name in way}
        for way in found.values() if len(way) == most
    ]  # fmt: skip
    return ways[: MOST_CANDIDATES + 1]


def _cut(name: str) -> Iterator[tuple[str, str]]:
    """A name as a beginning, none at first, and the rest of it."""
    yield "", name
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1], name[at + 1 :]
        at = name.find(".", at + 1)


def _by_shape(weights: Weights, wanted: _Shapes) -> Iterator[dict[str, str]]:
    """Names as they are, and those that are missing in every order of the others of their shape."""
    free: dict[tuple[int, ...], list[str]] = {}
    for name, info in weights.tensors.items():
        if wanted.get(name) != info.shape:
            free.setdefault(info.shape, []).append(name)
    missing: dict[tuple[int, ...], list[str]] = {}
    for name, shape in wanted.items():
        if name not in weights.tensors or weights.tensors[name].shape != shape:
            missing.setdefault(shape, []).append(name)
    names = [name for group in missing.values() for name in group]
    choices = [
        list(islice(permutations(free.get(shape, []), len(group)), MOST_CANDIDATES + 1))
        for shape, group in missing.items()
    ]
    for found in product(*choices):
        renamed = dict(zip(names, chain.from_iterable(found), strict=True))
        yield {name: renamed.get(name, name) for name in wanted}
