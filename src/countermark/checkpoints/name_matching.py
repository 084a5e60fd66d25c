"""Find wanted tensors in a suspect that may call them by other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice, permutations, product

from countermark.checkpoints.base import Weights
from countermark.checkpoints.moved_blocks import (
    OriginalValues,
    find_moved_blocks,
    match_by_values,
)

MOST_CANDIDATES = 1000
"""Renamed tensors are tried in at most this many ways; each is a test that p is corrected for."""

# Parts that torch.compile, FSDP, activation checkpointing, adapters and DDP put into names.
_WRAPPERS = {
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "module",
}  # fmt: skip

_Shapes = Mapping[str, tuple[int, ...]]


def find_assignments(
    weights: Weights,
    wanted: _Shapes,
    *,
    partial: bool = False,
    before: OriginalValues | None = None,
) -> Iterator[dict[str, str]]:
    """Yield every way to find the wanted tensors in a suspect; each way is one test.

    A tensor with the wanted name and shape is taken. Otherwise, if several tensors are wanted and
    all of them are present under names with another prefix, these are taken. Otherwise a missing
    tensor is sought among all other tensors of its shape. If there are more than `MOST_CANDIDATES`
    ways, they are not listed completely: the caller must refuse to try that many.

    Args:
        weights: the suspect, open.
        wanted: shapes by name.
        partial: if there is no way or too many ways, accept a way that finds at least half of the
            wanted tensors under their own names or under names with another prefix, and leave out
            the other tensors.
        before: values from before the message was drawn, by which blocks of other numbers and
            tensors of unknown names are sought, too; may be empty; None to trust names and shapes.

    Yields:
        Maps from the wanted name to the suspect's name; no map if a shape is missing.
    """
    alike = find_wrapped_names(weights, wanted)
    if before is None or len(alike) > MOST_CANDIDATES:
        yield from _assign_by_names_or_shapes(weights, wanted, alike, partial=partial)
        return
    # In a file with several state dicts, for example raw and averaged weights, each is tried, and
    # each once more with its blocks moved: another state dict must not hide a moved one.
    several = len(alike) > 1
    known = alike if several else [each for each in [find_known_names(weights, wanted)] if each]
    ways = [way for each in known for way in find_moved_blocks(weights, wanted, each, before)]
    complete = several or any(len(each) == len(wanted) for each in known)
    if not ways and not complete:
        ways = [match_by_values(weights, wanted, before)]
    # Values say which tensors are there; numbers alone must find half of them.
    least = 1 if before else (1 + len(wanted)) // 2
    ways = [way for way in ways if len(way) >= (least if partial else len(wanted))]
    if not ways or complete:
        yield from _assign_by_names_or_shapes(weights, wanted, alike, partial=partial)
    # A way that the names give already is no second test.
    ways = [way for way in ways if not complete or way not in known]
    yield from ({name: way[name] for name in wanted if name in way} for way in ways)


def find_known_names(weights: Weights, wanted: _Shapes) -> dict[str, str]:
    """Return the one way to find as many wanted tensors as there are by their names.

    The way is empty if no name fits, or if several prefixes fit equally well.
    """
    there = weights.tensors
    if all(name in there and there[name].shape == shape for name, shape in wanted.items()):
        return {name: name for name in wanted}
    found = find_prefixed_names(weights, wanted, least=1)
    return found[0] if len(found) == 1 else {}


def _assign_by_names_or_shapes(
    weights: Weights, wanted: _Shapes, alike: list[dict[str, str]], *, partial: bool
) -> Iterator[dict[str, str]]:
    """Yield ways by names (`alike`), else by shapes, else in part by names."""
    if alike:
        yield from alike
        return
    ways = _assign_by_shape(weights, wanted)
    if not partial:
        yield from ways
        return
    # One way beyond the limit shows that there are too many, without listing all of them: the
    # number of permutations grows with the factorial of the number of tensors.
    tried = list(islice(ways, MOST_CANDIDATES + 1))
    if not 1 <= len(tried) <= MOST_CANDIDATES:
        tried = find_wrapped_names(weights, wanted, least=(len(wanted) + 1) // 2) or tried
    yield from tried


def find_prefixed_names(
    weights: Weights, wanted: _Shapes, *, least: int | None = None
) -> list[dict[str, str]]:
    """List the ways in which the suspect's names are the wanted names with another prefix.

    All names are unchanged, or one common prefix ("module.", "bert.") is added to the wanted names
    or removed from them.

    Args:
        weights: the suspect, open.
        wanted: shapes by name, at least two: a single name may match other names by chance.
        least: how many wanted tensors a way must find; None requires all of them.

    Returns:
        The ways that find the largest number of wanted tensors, as maps from the wanted name to the
        suspect's name; an empty list if that number is below `least`.
    """
    there = {name: info.shape for name, info in weights.tensors.items()}
    return _match_prefixes(there, wanted, least)


def find_wrapped_names(
    weights: Weights, wanted: _Shapes, *, least: int | None = None
) -> list[dict[str, str]]:
    """List the ways in `find_prefixed_names`, or those without the parts that wrappers put in.

    Beside unchanged names, a prefix of views counts as well: it is another state dict in the file.
    `torch.compile`, FSDP, checkpointing and adapters put parts of their own into a name
    ("layers.0._orig_mod.weight"). If more tensors are found without these, in the suspect's names
    and in the wanted names, they are left out.

    Args:
        weights: the suspect, open.
        wanted: shapes by name, at least two.
        least: how many wanted tensors a way must find; None requires all of them.
    """
    there = {name: info.shape for name, info in weights.tensors.items()}
    plain = _match_prefixes(there, wanted, least, weights.views)
    if plain and len(plain[0]) == len(wanted):
        return plain
    # Names decide which form is read, not values, so the choice is no test. Of equals, the first
    # one, with the names as they are, is taken.
    clean = _match_without_wrappers(weights, wanted, least)
    return max(plain, clean, key=lambda ways: len(ways[0]) if ways else 0)


def _match_without_wrappers(
    weights: Weights, wanted: _Shapes, least: int | None
) -> list[dict[str, str]]:
    """List the ways to match wanted tensors by name, without the parts that wrappers put into names.

    Where several of the suspect's names become the same one, each of them is taken in another way.
    """
    clean = {_drop_wrappers(name): name for name in wanted}
    if len(clean) != len(wanted):
        return []
    shapes = {name: wanted[other] for name, other in clean.items()}
    own: dict[str, list[str]] = {}
    for name in weights.tensors:
        own.setdefault(_drop_wrappers(name), []).append(name)
    ways: list[dict[str, str]] = []
    for at in range(min(max(map(len, own.values()), default=0), MOST_CANDIDATES + 1)):
        chosen = {name: names[min(at, len(names) - 1)] for name, names in own.items()}
        there = {name: weights.tensors[other].shape for name, other in chosen.items()}
        views = frozenset(name for name, other in chosen.items() if other in weights.views)
        for way in _match_prefixes(there, shapes, least, views):
            renamed = {clean[name]: chosen[other] for name, other in way.items()}
            ways += [renamed] if renamed not in ways else []
    most = max(map(len, ways), default=0)
    return [way for way in ways if len(way) == most][: MOST_CANDIDATES + 1]


def _drop_wrappers(name: str) -> str:
    """Return a tensor's name without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _match_prefixes(
    there: _Shapes, wanted: _Shapes, least: int | None, views: frozenset[str] = frozenset()
) -> list[dict[str, str]]:
    """List the ways in which the names `there` are the wanted names with another prefix.

    Args:
        there: shapes of the suspect's tensors by name.
        wanted: shapes by name.
        least: how many wanted tensors a way must find; None requires all of them.
        views: names of the suspect's views that count beside unchanged names.
    """
    if len(wanted) < 2:
        return []
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, shape in there.items():
        for before, end in _split_prefixes(name):
            if wanted.get(end) == shape:
                found.setdefault((before, ""), {})[end] = name
    for name, shape in wanted.items():
        # The empty prefix was tried above, so the splits begin at the second.
        for before, end in islice(_split_prefixes(name), 1, None):
            if there.get(end) == shape:
                found.setdefault(("", before), {})[name] = end
    most = max(map(len, found.values()), default=0)
    if most < (len(wanted) if least is None else least) or not most:
        return []
    # Unchanged names win over prefixes that fit equally well.
    if len(found.get(("", ""), ())) == most:
        found = {
            before: way for before, way in found.items()
            if before == ("", "") or views.issuperset(way.values())
        }  # fmt: skip
    ways = [
        {name: way[name] for name in wanted if name in way}
        for way in found.values() if len(way) == most
    ]  # fmt: skip
    return ways[: MOST_CANDIDATES + 1]


def _split_prefixes(name: str) -> Iterator[tuple[str, str]]:
    """Yield every split of a name into a prefix up to a dot and the rest, empty prefix first."""
    yield "", name
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1], name[at + 1 :]
        at = name.find(".", at + 1)


def _assign_by_shape(weights: Weights, wanted: _Shapes) -> Iterator[dict[str, str]]:
    """Yield ways that keep matching names and try the missing ones on tensors of their shape."""
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
