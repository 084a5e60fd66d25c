"""Read a suspect's tensors as a key expects them, after undoing changes to its neurons."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.folding import fold_batch_norms
from countermark.alignment.matching import align_tensors
from countermark.alignment.naming import WantedTensor, find_tensor_names
from countermark.alignment.reducing import Floats
from countermark.alignment.reference import Reference
from countermark.alignment.symmetries import GroupMember, PermutationGroup
from countermark.checkpoints import Array, Weights, find_prefixed_names
from countermark.errors import AlignmentError

_RIGID: frozenset[int] = frozenset()  # free axes of a tensor without permutation groups
_MOST_ADDED = 16  # largest multiple of the reference's number of neurons


@dataclass(frozen=True)
class RealignedTensors:
    """The tensors of a suspect after alignment, for a key to read.

    Attributes:
        tensors: by the key's names, in the key's shapes.
        where: the suspect's names of these tensors.
        similarity: mean cosine of the matched neurons; 1 for a copy.
        known: the least number of values by which a neuron was matched.
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
class _ReferenceForm:
    """The reference in a form that a suspect may have: with batch norms, or with folded norms.

    Attributes:
        tensors: by name.
        units: the permutation groups.
        factors: the factor of each row of a tensor whose norm was folded, by the tensor's name.
    """

    tensors: Mapping[str, NDArray[Any]]
    units: Sequence[PermutationGroup]
    factors: Mapping[str, Floats]


@dataclass(frozen=True)
class _SoughtTensors:
    """The tensors that a key reads.

    Attributes:
        shapes: by name.
        hidden: names of the tensors that must not be compared with the reference.
        partial: some tensors may be missing, up to half of them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    hidden: frozenset[str]
    partial: bool


def realign_suspect(
    suspect: Weights, reference: Reference, wanted: Mapping[str, tuple[int, ...]],
    *, unmarked: Collection[str] = (), partial: bool = False,
) -> RealignedTensors:  # fmt: skip
    """Find a key's tensors in a suspect and undo changes to their neurons.

    Args:
        suspect: an open suspect.
        reference: the owner's model.
        wanted: names and shapes of the tensors that the key reads.
        unmarked: names of wanted tensors whose values in the reference are known to be older than
            the message, so that neurons may be matched by them.
        partial: leave out wanted tensors that the suspect does not have under their own names, up
            to half of them.

    Raises:
        AlignmentError: the suspect cannot be aligned to the reference; the message tells why.
        SuspectError: the suspect or the reference cannot be read.
        ConfigError: the permutation groups of the reference cannot be guessed from its layers.
    """
    weights, units = reference.open_reference()
    with weights:
        names = {member.name for each in units for member in each.members}
        for name, shape in wanted.items():
            if name not in weights.tensors or weights.tensors[name].shape != shape:
                raise AlignmentError(
                    f"the reference has no {name} of shape {list(shape)}, which the key reads"
                )
        if not names & wanted.keys():
            raise AlignmentError(f"no neurons of {next(iter(wanted))} were found in the reference")
        # A wanted tensor without permutation groups is read without reordering.
        names |= wanted.keys()
        tensors = {name: weights.read(name) for name in sorted(names) if name in weights.tensors}
    own = {name: tensors[name] for name in wanted}
    sought = _SoughtTensors(wanted, frozenset(wanted.keys() - unmarked), partial)
    plain = _ReferenceForm(tensors, units, {})
    try:
        return _align_to_form(suspect, plain, sought, own)
    except AlignmentError as error:
        # The reference as it is comes first: folding is tried only for a suspect without norms.
        form = fold_batch_norms(tensors, units)
        if form is None or not _has_missing_norms(suspect, units):
            raise
        try:
            return _align_to_form(
                suspect, _ReferenceForm(form.tensors, form.units, form.factors), sought, own
            )
        except AlignmentError:
            raise error from None


def _has_missing_norms(suspect: Weights, units: Sequence[PermutationGroup]) -> bool:
    """Return true if the suspect does not have the statistics of all the reference's norms."""
    names = {n for each in units for norm in each.norms for n in (norm.mean, norm.var)}
    return not names <= set(suspect.tensors)


def _align_to_form(
    suspect: Weights, form: _ReferenceForm, sought: _SoughtTensors, own: dict[str, Array]
) -> RealignedTensors:
    """Align a suspect to one form of the reference.

    Args:
        suspect: an open suspect.
        form: the reference, with or without batch norms.
        sought: the tensors that the key reads.
        own: the reference's own tensors, for the field `reference` of the result.

    Raises:
        AlignmentError: the suspect cannot be aligned to this form.
        SuspectError: the suspect cannot be read.
    """
    form = _drop_resized_tensors(suspect, form)
    if sought.partial:
        form, sought = _drop_missing_tensors(suspect, form, sought)
    where = find_tensor_names(suspect, _list_wanted_tensors(form, sought))
    read = {name: suspect.read(other) for name, other in where.items()}
    for each in form.units:
        _require_equal_counts(read, each)
    by = set(form.tensors) - sought.hidden
    matched = align_tensors(read, form.tensors, form.units, by=by)
    found = {}
    for name, shape in sought.shapes.items():
        values = matched.tensors.get(name, read[name])
        if name in form.factors:
            # The key reads the layer as it was before folding, so the factors of the rows are
            # undone.
            values = values / form.factors[name].reshape(-1, *[1] * (values.ndim - 1))
        found[name] = values.reshape(shape).astype(np.float32)
    places = {name: where[name] for name in sought.shapes}
    similarity = min(1.0, matched.similarity)  # rounding may lift a mean cosine above 1
    return RealignedTensors(found, places, similarity, matched.known, bool(form.factors), own)


def _drop_resized_tensors(suspect: Weights, form: _ReferenceForm) -> _ReferenceForm:
    """Drop tensors whose shape differs from the suspect's in an axis that holds no neurons.

    A head for other classes is such a tensor: it tells nothing about the neurons that it reads.
    """
    free = _find_free_axes(form.units)
    gone = {
        name for name, each in form.tensors.items()
        if name in suspect.tensors
        and not WantedTensor(each.shape, free.get(name, _RIGID), None).is_compatible(
            suspect.tensors[name].shape
        )
    }  # fmt: skip
    return _drop_tensors(form, gone) if gone else form


def _drop_tensors(form: _ReferenceForm, gone: Set[str]) -> _ReferenceForm:
    """Return a form without some tensors, and without groups that have no member left."""
    units = [
        PermutationGroup(
            u.size, tuple(m for m in u.members if m.name not in gone), u.norms, u.domains, u.grows
        )
        for u in form.units
    ]
    tensors = {name: each for name, each in form.tensors.items() if name not in gone}
    return _ReferenceForm(tensors, [each for each in units if each.members], form.factors)


def _drop_missing_tensors(
    suspect: Weights, form: _ReferenceForm, sought: _SoughtTensors
) -> tuple[_ReferenceForm, _SoughtTensors]:
    """Drop the tensors that a suspect lacks, if it has at least half of them by their names.

    Returns: both arguments unchanged if more than half of the key's tensors would be missing.
    """
    shapes = {name: each.shape for name, each in form.tensors.items()}
    ways = find_prefixed_names(suspect, shapes, least=(len(shapes) + 1) // 2)
    if len(ways) != 1:
        return form, sought
    # All names differ by the same prefix, so one pair of names shows the prefix.
    one, other = next(iter(ways[0].items()))
    added, gone = other.removesuffix(one), one.removesuffix(other)

    def rename_for_suspect(name: str) -> str:
        """Return the suspect's name of a tensor of the reference."""
        return added + name if other.endswith(one) else name.removeprefix(gone)

    missing = {name for name in shapes if rename_for_suspect(name) not in suspect.tensors}
    kept = {name: shape for name, shape in sought.shapes.items() if name not in missing}
    if not missing or 2 * len(kept) < len(sought.shapes):
        return form, sought
    return _drop_tensors(form, missing), replace(sought, shapes=kept)


def _find_free_axes(units: Sequence[PermutationGroup]) -> dict[str, frozenset[int]]:
    """Return the axes of each tensor along which neurons can have been added or removed."""
    found: dict[str, set[int]] = {}
    for each in units:
        for member in each.members:
            axes = found.setdefault(member.name, set())
            # A group of fixed size, such as attention heads, leaves its axes rigid.
            if each.grows:
                axes.add(member.axis)
    return {name: frozenset(axes) for name, axes in found.items()}


def _list_wanted_tensors(form: _ReferenceForm, sought: _SoughtTensors) -> dict[str, WantedTensor]:
    """List the tensors of a form as wanted tensors, without the values that must not be compared.

    Raises:
        AlignmentError: the form lacks a tensor that the key reads.
    """
    free = _find_free_axes(form.units)
    # A tensor of the key may have been dropped above, because its shape differs from the suspect's.
    if missing := [name for name in sought.shapes if name not in form.tensors]:
        raise AlignmentError(f"the suspect's {missing[0]} has other sizes than the reference's")
    return {
        name: WantedTensor(
            each.shape, free.get(name, _RIGID), None if name in sought.hidden else each
        )
        for name, each in form.tensors.items()
    }


def _require_equal_counts(read: Mapping[str, Array], units: PermutationGroup) -> None:
    """Raise `AlignmentError` unless all members of a group have one bounded number of neurons."""
    if not units.grows:
        return
    # The bound keeps a hostile suspect from costing a product of millions of pairs of neurons.
    counts = {_count_neurons(read[member.name], member) for member in units.members}
    if len(counts) != 1 or not 1 <= counts.copy().pop() <= _MOST_ADDED * units.size:
        raise AlignmentError(
            f"the suspect's tensors disagree on the neurons of {units.members[0].name}, or have "
            f"more than {_MOST_ADDED} times those of the reference"
        )


def _count_neurons(tensor: Array, member: GroupMember) -> int:
    """Return the number of neurons along the axis of a member; 0 if the axis does not divide."""
    count, rest = divmod(tensor.shape[member.axis], member.each)
    return 0 if rest else count
