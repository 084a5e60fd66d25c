"""The second reading of a suspect's weights: after alignment to a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from countermark.alignment import Realigned, Reference, is_committed, realigned, turned_back
from countermark.alignment.reference import guess_units
from countermark.errors import AlignmentError, ConfigError
from countermark.evidence import Alignment, Evidence
from countermark.key import REFERENCE, Key
from countermark.nulls import AlignedCoin, FairCoin, Null
from countermark.openings import Openings
from countermark.schemes import scheme_of
from countermark.schemes.black_box import FreshTriggers
from countermark.schemes.white_box import WeightScheme
from countermark.subject import ReferenceFacts
from countermark.units import Units
from countermark.weights import (
    Array,
    Restored,
    Stored,
    Suspect,
    Weights,
    open_weights,
)

_BEARS_MARK = -2.0  # log10 p of a reference, below which it is said to bear the mark
_LEAST_SIMILARITY, _LEAST_KNOWN = 0.75, 64  # of a suspect, to be aligned to one that does
_SHIFTED = 1.0  # standard deviations that a mean has moved by, which training does not
_EXACT, _LEAST_KNOWN_EXACTLY = 0.999, 8  # where fewer values are known of its neurons


@dataclass(frozen=True)
class Reading:
    """Evidence, the tensors that it was read from, and where they were."""

    evidence: Evidence
    tensors: dict[str, Array]
    where: dict[str, str]


def reference_for(reference: Reference | Suspect, key: Key | Openings | FreshTriggers) -> Reference:
    """The reference, if a key of this kind can make use of one."""
    scheme = scheme_of(key) if isinstance(key, Key) else None
    if not isinstance(scheme, WeightScheme) or not scheme.linear:
        raise ConfigError(
            "a reference is for keys that read bits from weights by a linear rule: a rank among "
            "permuted neurons says nothing once they are in order, and triggers need none"
        )
    return Reference.of(reference)


def aligned(
    weights: Weights, scheme: WeightScheme, key: Key, reference: Reference
) -> tuple[list[Reading], ReferenceFacts]:
    """Read after alignment, or not where that is refused; describe the reference."""
    with open_weights(reference.weights) as opened:
        facts = ReferenceFacts(name=opened.name, sha256=opened.file_digest())
        try:
            if REFERENCE in key.frozen and _is_own(opened, reference.units, key):
                return _aligned_to_committed(weights, scheme, key, reference, facts)
            before = scheme.before(key)
            unmarked = {name for name, kept in before.items() if _as_it_was(opened, name, *kept)}
            if before:
                reference = replace(reference, weights=Restored(opened, before))
                facts = replace(facts, restored=tuple(sorted(before)))
            # Where it is put back, its other tensors were trained with the mark all the same.
            bears_mark = bool(before) and _bears_mark(_as_it_is(opened, scheme, key), scheme, key)
            found = realigned(
                weights, reference, key.tensors, unmarked=unmarked, partial=scheme.partial
            )
            bears_mark = bears_mark or _bears_mark(found.reference, scheme, key)
            if bears_mark:
                _require_unmistakable(found)
        except AlignmentError as error:
            return [], replace(facts, refused=str(error))
    evidence = replace(
        scheme.extract(found.tensors, key),
        alignment=Alignment(bears_mark, found.similarity),
        committed=False,  # to the reference, which may have been made to fit
    )
    facts = replace(facts, bears_mark=bears_mark, similarity=found.similarity, folded=found.folded)
    return [Reading(evidence, found.tensors, found.where)], facts


def _is_own(reference: Weights, units: Sequence[Units] | None, key: Key) -> bool:
    """Return true if the key commits to this open reference, neurons included."""
    try:
        units = guess_units(reference) if units is None else units
    except ConfigError:  # they are not found: another reference may do without
        return False
    return is_committed(key.frozen[REFERENCE], reference, units)


def _aligned_to_committed(
    weights: Weights, scheme: WeightScheme, key: Key, reference: Reference, facts: ReferenceFacts
) -> tuple[list[Reading], ReferenceFacts]:
    """Read after alignment to the committed reference, by all of its tensors.

    The reference was fixed before the message was drawn, so that no choice of it, and nothing that
    the alignment makes of it, can depend on the message. Views of its tensors are left out: their
    names and forms can be chosen afterwards.

    Raises:
        AlignmentError: the suspect cannot be aligned.
    """
    opened, units = reference.opened()
    if opened.views:
        stored = Stored(opened)
        reference = _drop_views(stored, reference)
        opened, units = reference.opened()
    with opened:
        suspect = turned_back(weights, opened, units) or weights
        found = realigned(
            suspect, reference, key.tensors, unmarked=set(key.tensors), partial=scheme.partial
        )
    alignment = Alignment(bears_mark=False, similarity=found.similarity, is_committed=True)
    tensors = {
        name: _level_means(each, found.reference[name]) for name, each in found.tensors.items()
    }
    evidence = replace(scheme.extract(tensors, key), alignment=alignment)
    facts = replace(
        facts, bears_mark=False, similarity=found.similarity, folded=found.folded, committed=True
    )
    return [Reading(evidence, tensors, found.where)], facts


def _level_means(tensor: Array, reference: Array) -> Array:
    """A tensor without one large vector that was added to all of its rows, or of its columns.

    Probabilities mind no vector in all rows of the last layer, and layer norms none in all that
    writes to their stream. What is read would be little else.
    """
    if tensor.ndim < 2 or tensor.shape != reference.shape:
        return tensor
    for axis in (0, 1):
        with np.errstate(over="ignore", invalid="ignore"):  # what no square holds is left
            means = tensor.mean(axis=axis, keepdims=True, dtype=np.float64)
            own = reference.mean(axis=axis, keepdims=True, dtype=np.float64)
            usual = max((tensor - means).std(), reference.std(dtype=np.float64))
            moved = np.abs(means - own).max()
        if moved > _SHIFTED * usual:
            tensor = (tensor - means + own).astype(tensor.dtype)
    return tensor


def _drop_views(stored: Stored, reference: Reference) -> Reference:
    """The reference by the tensors that are stored, and by the neurons that are found in them.

    Raises:
        AlignmentError: without its views nothing says how its layers belong together.
    """
    if reference.units is not None:
        units = (
            replace(each, members=tuple(m for m in each.members if m.name in stored.tensors))
            for each in reference.units
        )
        return Reference(stored, tuple(each for each in units if each.members))
    try:
        _, found = Reference(stored).opened()
    except ConfigError as error:
        raise AlignmentError(str(error)) from None
    return Reference(stored, found)


def perhaps_disguised(suspect: Suspect, marked: Suspect, key: Key) -> bool:
    """Whether a suspect may be a copy of a marked model whose neurons were put in another order.

    They are matched by all tensors, marked ones too, so that this is a suspicion and no evidence.

    Raises:
        AlignmentError: the suspect has tensors as the key reads them, and nothing says what their
            neurons are.
    """
    scheme = scheme_of(key)
    # Answers and images mind no order, and a reader that was learnt decides nothing.
    if not isinstance(scheme, WeightScheme) or not scheme.linear:
        return False
    with open_weights(suspect) as weights:
        shapes = [info.shape for info in weights.tensors.values()]
        if any(shape not in shapes for shape in key.tensors.values()):
            return False
        try:
            found = realigned(
                weights, Reference.of(marked), key.tensors, unmarked=key.tensors,
                partial=scheme.partial,
            )  # fmt: skip
        except ConfigError as error:
            raise AlignmentError(str(error)) from None
    alike = found.similarity >= _LEAST_SIMILARITY and found.known >= _LEAST_KNOWN
    return alike and _bears_mark(found.tensors, scheme, key)


def _as_it_was(reference: Weights, name: str, start: int, before: Array) -> bool:
    """Whether the reference has the values that the commitment says there were before the message.

    Then neurons may be matched by this tensor: nothing in it can depend on the message.
    """
    size = math.prod(reference.tensors[name].shape) if name in reference.tensors else 0
    if start + len(before) > size:
        return False
    return np.array_equal(reference.read_part(name, start, len(before)), before)


def _as_it_is(reference: Weights, scheme: WeightScheme, key: Key) -> dict[str, Array]:
    """The reference's own tensors, nothing put back."""
    there = {name: name for name in key.tensors if name in reference.tensors}
    return scheme.read_from(reference, there, key)


def _bears_mark(tensors: Mapping[str, Array], scheme: WeightScheme, key: Key) -> bool:
    return FairCoin().log10_p(scheme.extract(tensors, key)) < _BEARS_MARK


def _require_unmistakable(found: Realigned) -> None:
    """Refuse a reading by which a suspect that is no copy of a marked reference seems marked.

    Neurons that do alike read alike, and a marked network's neurons do what the mark lets them: the
    order depends on the message unless no neuron can be mistaken for another.
    """
    copies = found.similarity >= _LEAST_SIMILARITY and found.known >= _LEAST_KNOWN
    if not copies and (found.similarity < _EXACT or found.known < _LEAST_KNOWN_EXACTLY):
        raise AlignmentError(
            f"the reference bears the mark, and the suspect's neurons are no copies of its own "
            f"(mean cosine {found.similarity:.2f} over {found.known} values, needed "
            f"{_LEAST_SIMILARITY} over {_LEAST_KNOWN}): give the weights from before the mark, to "
            "which any suspect may be aligned"
        )


def after_alignment(nulls: Mapping[str, Null], evidence: Evidence) -> Mapping[str, Null]:
    """The nulls that evidence can be judged by: one alone after alignment to a marked reference."""
    if evidence.alignment is not None and evidence.alignment.bears_mark:
        return {AlignedCoin.name: AlignedCoin()}
    return nulls
