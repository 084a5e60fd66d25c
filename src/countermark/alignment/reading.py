"""A suspect's tensors as a key expects them, whatever was done to its neurons."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.folding import folded
from countermark.alignment.matching import align
from countermark.alignment.naming import Wanted, named
from countermark.alignment.reducing import Floats
from countermark.alignment.reference import Reference
from countermark.errors import AlignmentError
from countermark.units import Member, Units
from countermark.weights import Array, Weights, prefixed

_RIGID: frozenset[int] = frozenset()  # no axis of a tensor that no neurons were found in
_MOST_ADDED = 16  # times as many neurons as the reference's class has


@dataclass(frozen=True)
class Realigned:
    """What a key can read.

    Attributes:
        tensors: by the key's names, in its shapes.
        where: the suspect's names of them.
        similarity, known: mean cosine of the neurons matched, 1 for a copy, and by how many
            values each was matched, at the least.
        folded: the suspect's batch norms had been folded away.
        reference: the reference's own tensors, as the key would read them.
    """

    tensors: dict[str, Array]
    where: dict[str, str]
    similarity: float
    known: int
    folded: bool
    reference: dict[str, Array]


@dataclass(frozen=True)
class _Form:
    """The reference in a form that a suspect may have."""

    tensors: Mapping[str, NDArray[Any]]
    units: Sequence[Units]
    factors: Mapping[str, Floats]


@dataclass(frozen=True)
class _Sought:
    """What a key reads: shapes by name, which of them are not compared, and if all are needed."""

    shapes: Mapping[str, tuple[int, ...]]
    hidden: frozenset[str]
    partial: bool


def realigned(
    suspect: Weights, reference: Reference, wanted: Mapping[str, tuple[int, ...]],
    *, unmarked: Collection[str] = (), partial: bool = False,
) -> Realigned:  # fmt: skip
    """Find a key's tensors in a suspect and undo what was done to their neurons.

    Args:
        suspect: an open suspect.
        reference: the owner's model.
        wanted: names and shapes of the tensors that the key reads.
        unmarked: those of them whose values in the reference are known to be older than the
            message, so that neurons may be matched by them.
        partial: leave out of them what the suspect has not under its own name, up to a half.

    Raises:
        AlignmentError: the suspect cannot be aligned to the reference; says why.
        SuspectError: one of the two cannot be read.
        ConfigError: the reference's layers are no plain chain, and nothing says what they are.
    """
    weights, units = reference.opened()
    with weights:
        names = {member.name for each in units for member in each.members}
        for name, shape in wanted.items():
            if name not in weights.tensors or weights.tensors[name].shape != shape:
                raise AlignmentError(
                    f"the reference has no {name} of shape {list(shape)}, which the key reads"
                )
        if not names & wanted.keys():
            raise AlignmentError(f"no neurons of {next(iter(wanted))} were found in the reference")
        names |= wanted.keys()  # what has no neurons that were found is read in order
        tensors = {name: weights.read(name) for name in sorted(names) if name in weights.tensors}
    own = {name: tensors[name] for name in wanted}
    sought = _Sought(wanted, frozenset(wanted.keys() - unmarked), partial)
    plain = _Form(tensors, units, {})
    try:
        return _in_form(suspect, plain, sought, own)
    except AlignmentError as error:
        form = folded(tensors, units)
        if form is None or not _lacks_norms(suspect, units):
            raise
        try:
            return _in_form(suspect, _Form(form.tensors, form.units, form.factors), sought, own)
        except AlignmentError:
            raise error from None


def _lacks_norms(suspect: Weights, units: Sequence[Units]) -> bool:
    """Whether the suspect cannot have all of the reference's batch norms."""
    names = {n for each in units for norm in each.norms for n in (norm.mean, norm.var)}
    return not names <= set(suspect.tensors)


def _in_form(suspect: Weights, form: _Form, sought: _Sought, own: dict[str, Array]) -> Realigned:
    form = _comparable(suspect, form)
    if sought.partial:
        form, sought = _there(suspect, form, sought)
    where = named(suspect, _wanted(form, sought))
    read = {name: suspect.read(other) for name, other in where.items()}
    for each in form.units:
        _require_even(read, each)
    by = set(form.tensors) - sought.hidden
    matched = align(read, form.tensors, form.units, by=by)
    found = {}
    for name, shape in sought.shapes.items():
        values = matched.tensors.get(name, read[name])
        if name in form.factors:
            values = values / form.factors[name].reshape(-1, *[1] * (values.ndim - 1))
        found[name] = values.reshape(shape).astype(np.float32)
    places = {name: where[name] for name in sought.shapes}
    similarity = min(1.0, matched.similarity)  # which rounding may lift above 1
    return Realigned(found, places, similarity, matched.known, bool(form.factors), own)


def _comparable(suspect: Weights, form: _Form) -> _Form:
    """The form without tensors of its own names that have other sizes where no neurons are.

    A head for other classes is such a tensor: it says nothing of the neurons that it reads.
    """
    free = _free(form.units)
    gone = {
        name for name, each in form.tensors.items()
        if name in suspect.tensors
        and not Wanted(each.shape, free.get(name, _RIGID), None).fits(suspect.tensors[name].shape)
    }  # fmt: skip
    return _without(form, gone) if gone else form


def _without(form: _Form, gone: Set[str]) -> _Form:
    """A form without some of its tensors."""
    units = [
        Units(
            u.size, tuple(m for m in u.members if m.name not in gone), u.norms, u.domains, u.grows
        )
        for u in form.units
    ]
    tensors = {name: each for name, each in form.tensors.items() if name not in gone}
    return _Form(tensors, [each for each in units if each.members], form.factors)


def _there(suspect: Weights, form: _Form, sought: _Sought) -> tuple[_Form, _Sought]:
    """Both without the tensors that a suspect has not, where it has half or more by their names."""
    shapes = {name: each.shape for name, each in form.tensors.items()}
    ways = prefixed(suspect, shapes, least=(len(shapes) + 1) // 2)
    if len(ways) != 1:
        return form, sought
    one, other = next(iter(ways[0].items()))
    added, gone = other.removesuffix(one), one.removesuffix(other)

    def its(name: str) -> str:
        return added + name if other.endswith(one) else name.removeprefix(gone)

    missing = {name for name in shapes if its(name) not in suspect.tensors}
    kept = {name: shape for name, shape in sought.shapes.items() if name not in missing}
    if not missing or 2 * len(kept) < len(sought.shapes):
        return form, sought
    return _without(form, missing), replace(sought, shapes=kept)


def _free(units: Sequence[Units]) -> dict[str, frozenset[int]]:
    """The axes of each tensor along which there may be more or fewer neurons."""
    found: dict[str, set[int]] = {}
    for each in units:
        for member in each.members:
            axes = found.setdefault(member.name, set())
            if each.grows:
                axes.add(member.axis)
    return {name: frozenset(axes) for name, axes in found.items()}


def _wanted(form: _Form, sought: _Sought) -> dict[str, Wanted]:
    free = _free(form.units)
    if missing := [name for name in sought.shapes if name not in form.tensors]:
        raise AlignmentError(f"the suspect's {missing[0]} has other sizes than the reference's")
    return {
        name: Wanted(each.shape, free.get(name, _RIGID), None if name in sought.hidden else each)
        for name, each in form.tensors.items()
    }


def _require_even(read: Mapping[str, Array], units: Units) -> None:
    """Raise `AlignmentError` where the members of a class do not have the same neurons."""
    if not units.grows:
        return
    counts = {_count(read[member.name], member) for member in units.members}
    if len(counts) != 1 or not 1 <= counts.copy().pop() <= _MOST_ADDED * units.size:
        raise AlignmentError(
            f"the suspect's tensors disagree on the neurons of {units.members[0].name}, or have "
            f"more than {_MOST_ADDED} times those of the reference"
        )


def _count(tensor: Array, member: Member) -> int:
    """How many neurons a tensor has along the axis of a member; 0 where that is no number."""
    count, rest = divmod(tensor.shape[member.axis], member.each)
    return 0 if rest else count
