"""Where the tensors that are wanted are in a suspect, whatever it calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice, permutations, product

from countermark.weights.base import Weights

MOST_CANDIDATES = 1000
"""Renamed tensors are tried in at most this many ways; each is a test that p is corrected for."""

_Shapes = Mapping[str, tuple[int, ...]]


def assignments(weights: Weights, wanted: _Shapes) -> Iterator[dict[str, str]]:
    """Every way in which the wanted tensors can be found in a suspect; each one is a test.

    A tensor of the wanted name and shape is taken. Where several are wanted and all are there under
    names with another beginning, these are taken. Else a missing one is sought among all others of
    its shape. Yields maps from the wanted name to the suspect's name; none when a shape is missing.
    Beyond `MOST_CANDIDATES` not every one is there: so many are too many to be tried.
    """
    if alike := prefixed(weights, wanted):
        yield from alike
        return
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


def prefixed(weights: Weights, wanted: _Shapes) -> list[dict[str, str]]:
    """The ways in which all names of a suspect are the wanted ones with another beginning.

    Names are as they are, or one that they have in common is put in front of them or taken off:
    "module.", "bert." and their like. Empty where there is no such way, or one name alone, which
    others may end in by chance.
    """
    if len(wanted) < 2:
        return []
    there = {name: info.shape for name, info in weights.tensors.items()}
    first = next(iter(wanted))
    added = [n.removesuffix(first) for n in there if n == first or n.endswith(f".{first}")]
    parts = first.split(".")
    gone = [".".join(parts[:at]) + "." for at in range(1, len(parts))]
    ways = [{name: before + name for name in wanted} for before in sorted(added, key=len)]
    ways += [
        {name: name.removeprefix(before) for name in wanted}
        for before in gone
        if all(name.startswith(before) for name in wanted)
    ]
    fitting = [
        way for way in ways if all(there.get(way[name]) == shape for name, shape in wanted.items())
    ]
    exact = [way for way in fitting if all(name == other for name, other in way.items())]
    return exact or fitting[: MOST_CANDIDATES + 1]
