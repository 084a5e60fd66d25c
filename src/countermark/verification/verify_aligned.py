"""Read a suspect's weights a second time, after alignment to a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from countermark.alignment import (
    RealignedTensors,
    Reference,
    is_committed,
    realign_suspect,
    undo_rotation,
)
from countermark.alignment.reference import guess_permutation_groups
from countermark.alignment.symmetries import PermutationGroup
from countermark.checkpoints import (
    Array,
    PatchedWeights,
    StoredWeights,
    Suspect,
    Weights,
    derive_tensors,
    open_weights,
    renumber_blocks,
)
from countermark.errors import AlignmentError, ConfigError
from countermark.keys.key import REFERENCE, Key
from countermark.results.null_hypotheses import AlignedCoin, FairCoin, NullHypothesis
from countermark.results.reading import Alignment, Reading
from countermark.results.subject import ReferenceFacts
from countermark.schemes import load_scheme
from countermark.schemes.triggers import FreshTriggers
from countermark.schemes.weights import WeightScheme
from countermark.verification.disclosure import TriggerDisclosure

# A weak threshold on purpose: a reference wrongly taken for marked only makes judging stricter.
_BEARS_MARK = -2.0  # log10 p, below which a reference is taken for marked
_LEAST_SIMILARITY, _LEAST_KNOWN = 0.75, 64  # of a suspect, for a marked reference
_SHIFTED = 1.0  # standard deviations; training moves a mean by less
_EXACT, _LEAST_KNOWN_EXACTLY = 0.999, 8  # of a suspect with fewer known values


@dataclass(frozen=True)
class WeightReading:
    """A reading of weights, with the tensors that were read.

    Attributes:
        evidence: the bits that were read, and the expected bits.
        tensors: the tensors, by the key's names.
        where: for each of the key's names the name in the suspect.
    """

    evidence: Reading
    tensors: dict[str, Array]
    where: dict[str, str]


def prepare_reference(
    reference: Reference | Suspect, key: Key | TriggerDisclosure | FreshTriggers
) -> Reference:
    """Return the reference for a key that can use one.

    Raises:
        ConfigError: the key does not read bits from weights by a linear rule.
    """
    scheme = load_scheme(key) if isinstance(key, Key) else None
    if not isinstance(scheme, WeightScheme) or not scheme.linear:
        raise ConfigError(
            "a reference is for keys that read bits from weights by a linear rule: a rank among "
            "permuted neurons says nothing once they are in order, and triggers need none"
        )
    return Reference.from_source(reference)


def read_aligned(
    weights: Weights, scheme: WeightScheme, key: Key, reference: Reference
) -> tuple[list[WeightReading], ReferenceFacts]:
    """Read a suspect after alignment to a reference.

    Args:
        weights: the suspect, opened.
        scheme: the key's scheme.
        key: the key that reads.
        reference: the model that the suspect is aligned to.

    Returns: the reading in a list, and the facts about the reference; an empty list if the suspect
        cannot be aligned, with the reason in the facts.
    """
    # The reference's facts are recorded even if alignment is refused: the verdict names the file.
    with open_weights(reference.weights) as opened:
        shapes = {name: each.shape for name, each in opened.tensors.items()}
        # Alignment itself tells added neurons from those that the reference has.
        weights = derive_tensors(weights, shapes, padded=False)
        facts = ReferenceFacts(name=opened.name, sha256=opened.compute_file_digest())
        try:
            if REFERENCE in key.frozen and _is_committed_reference(opened, reference.units, key):
                return _read_aligned_to_committed(weights, scheme, key, reference, facts)
            before = scheme.get_original_values(key)
            # Neurons may be matched only by tensors that cannot depend on the message.
            unmarked = {
                name for name, kept in before.items() if _has_pre_mark_values(opened, name, *kept)
            }
            if before:
                reference = replace(reference, weights=PatchedWeights(opened, before))
                facts = replace(facts, restored=tuple(sorted(before)))
            # Restored values do not suffice: the other tensors were trained together with the mark.
            bears_mark = bool(before) and _has_mark(
                _read_as_stored(opened, scheme, key), scheme, key
            )
            found = realign_suspect(
                weights, reference, key.tensors, unmarked=unmarked, partial=scheme.partial
            )
            # The check above covers the file as stored; this one the values used for alignment.
            bears_mark = bears_mark or _has_mark(found.reference, scheme, key)
            if bears_mark:
                _require_unmistakable_copy(found)
        except AlignmentError as error:
            return [], replace(facts, refused=str(error))
    evidence = replace(
        scheme.extract(found.tensors, key),
        alignment=Alignment(bears_mark, found.similarity),
        committed=False,  # the reference may have been made to fit
    )
    facts = replace(facts, bears_mark=bears_mark, similarity=found.similarity, folded=found.folded)
    where = {name: weights.describe_source(other) for name, other in found.where.items()}
    return [WeightReading(evidence, found.tensors, where)], facts


def _is_committed_reference(
    reference: Weights, units: Sequence[PermutationGroup] | None, key: Key
) -> bool:
    """Return true if the key commits to this open reference, neurons included."""
    try:
        units = guess_permutation_groups(reference) if units is None else units
    except ConfigError:  # without neurons it is not the committed reference
        return False
    return is_committed(key.frozen[REFERENCE], reference, units)


def _read_aligned_to_committed(
    weights: Weights, scheme: WeightScheme, key: Key, reference: Reference, facts: ReferenceFacts
) -> tuple[list[WeightReading], ReferenceFacts]:
    """Read a suspect after alignment to the committed reference, by all of its tensors.

    The reference was fixed before the message was drawn, so neither its choice nor the result of
    the alignment can depend on the message. Views of its tensors are left out, because their names
    and forms can be chosen afterwards.

    Raises:
        AlignmentError: the suspect cannot be aligned.
    """
    opened, units = reference.open_reference()
    # Digests of a model do not cover views, so the commitment does not hold them.
    if opened.views:
        stored = StoredWeights(opened)
        reference = _drop_views(stored, reference)
        opened, units = reference.open_reference()
    with opened:
        # Blocks are found by all values of the reference, which is older than the message.
        suspect = renumber_blocks(weights, opened)
        # Rotated channels match no reordering of channels, and no block: the rotation is undone.
        if turned := undo_rotation(suspect, opened, units):
            suspect = renumber_blocks(turned, opened)
        found = realign_suspect(
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
    where = {name: suspect.describe_source(other) for name, other in found.where.items()}
    return [WeightReading(evidence, tensors, where)], facts


def _level_means(tensor: Array, reference: Array) -> Array:
    """Return a tensor after removing a large vector that was added to all rows or all columns.

    A common vector in all rows of the last layer does not change probabilities, and layer norms
    cancel a common vector in all weights that write to their residual stream. A thief can therefore
    add a vector so large that it would decide most of the bits that are read.

    Args:
        tensor: a tensor of the suspect, of any number of axes.
        reference: the tensor of the reference; a tensor of another shape is returned unchanged.
    """
    if tensor.ndim < 2 or tensor.shape != reference.shape:
        return tensor
    # Axis 0 and axis 1: the common vector may lie in the rows or in the columns.
    for axis in (0, 1):
        with np.errstate(over="ignore", invalid="ignore"):  # values too large to square stay
            means = tensor.mean(axis=axis, keepdims=True, dtype=np.float64)
            own = reference.mean(axis=axis, keepdims=True, dtype=np.float64)
            usual = max((tensor - means).std(), reference.std(dtype=np.float64))
            moved = np.abs(means - own).max()
        if moved > _SHIFTED * usual:
            tensor = (tensor - means + own).astype(tensor.dtype)
    return tensor


def _drop_views(stored: StoredWeights, reference: Reference) -> Reference:
    """Return the reference with stored tensors only, and the neurons found in them.

    Raises:
        AlignmentError: without the views it cannot be determined how the layers connect.
    """
    if reference.units is not None:
        units = (
            replace(each, members=tuple(m for m in each.members if m.name in stored.tensors))
            for each in reference.units
        )
        return Reference(stored, tuple(each for each in units if each.members))
    try:
        _, found = Reference(stored).open_reference()
    except ConfigError as error:
        raise AlignmentError(str(error)) from None
    return Reference(stored, found)


def is_possible_reordered_copy(suspect: Suspect, marked: Suspect, key: Key) -> bool:
    """Return true if a suspect may be a copy of a marked model with reordered neurons.

    Neurons are matched by all tensors, marked tensors too, so the result is a suspicion and no
    evidence.

    Raises:
        AlignmentError: the suspect has tensors of the shapes that the key reads, but the neurons of
            the marked model cannot be determined.
    """
    scheme = load_scheme(key)
    # Reordered neurons change neither answers nor images, and learnt readers are never aligned.
    if not isinstance(scheme, WeightScheme) or not scheme.linear:
        return False
    # Without tensors of the right shapes there is nothing to align, and no suspicion.
    with open_weights(suspect) as weights:
        shapes = [info.shape for info in weights.tensors.values()]
        if any(shape not in shapes for shape in key.tensors.values()):
            return False
        try:
            found = realign_suspect(
                weights, Reference.from_source(marked), key.tensors, unmarked=key.tensors,
                partial=scheme.partial,
            )  # fmt: skip
        except ConfigError as error:
            raise AlignmentError(str(error)) from None
    alike = found.similarity >= _LEAST_SIMILARITY and found.known >= _LEAST_KNOWN
    return alike and _has_mark(found.tensors, scheme, key)


def _has_pre_mark_values(reference: Weights, name: str, start: int, before: Array) -> bool:
    """Return true if the reference still has the values from before the mark.

    The key's commitment holds these values. Neurons may then be matched by this tensor, because
    nothing in it can depend on the message.

    Args:
        reference: the reference, opened.
        name: name of a tensor.
        start: first position of the values in the flattened tensor.
        before: the values (n,) from before the mark.
    """
    # A reference is a file of anybody's: it may lack the tensor or hold a shorter one.
    size = math.prod(reference.tensors[name].shape) if name in reference.tensors else 0
    if start + len(before) > size:
        return False
    return np.array_equal(reference.read_part(name, start, len(before)), before)


def _read_as_stored(reference: Weights, scheme: WeightScheme, key: Key) -> dict[str, Array]:
    """Read the key's tensors from the reference as stored, without restored values."""
    there = {name: name for name in key.tensors if name in reference.tensors}
    return scheme.read_suspect_tensors(reference, there, key)


def _has_mark(tensors: Mapping[str, Array], scheme: WeightScheme, key: Key) -> bool:
    """Return true if the key matches more bits of these tensors than chance explains."""
    return FairCoin().compute_log10_p(scheme.extract(tensors, key)) < _BEARS_MARK


def _require_unmistakable_copy(found: RealignedTensors) -> None:
    """Refuse a reading in which a suspect that is no copy of a marked reference seems marked.

    Neurons with similar functions have similar weights, and the mark shapes the neurons of a marked
    network. The order found therefore depends on the message unless every neuron is unmistakable.

    Raises:
        AlignmentError: the reference bears the mark and the suspect's neurons are no copies of it.
    """
    # Few known values make a high cosine likely by chance: fewer values need a higher cosine.
    copies = found.similarity >= _LEAST_SIMILARITY and found.known >= _LEAST_KNOWN
    if not copies and (found.similarity < _EXACT or found.known < _LEAST_KNOWN_EXACTLY):
        raise AlignmentError(
            f"the reference bears the mark, and the suspect's neurons are no copies of its own "
            f"(mean cosine {found.similarity:.2f} over {found.known} values, needed "
            f"{_LEAST_SIMILARITY} over {_LEAST_KNOWN}): give the weights from before the mark, to "
            "which any suspect may be aligned"
        )


def select_nulls_after_alignment(
    nulls: Mapping[str, NullHypothesis], evidence: Reading
) -> Mapping[str, NullHypothesis]:
    """Return the nulls for a reading: only `AlignedCoin` after alignment to a marked reference."""
    if evidence.alignment is not None and evidence.alignment.bears_mark:
        return {AlignedCoin.name: AlignedCoin()}
    return nulls
