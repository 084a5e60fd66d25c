"""Undo reordered, rescaled, flipped and added neurons of a suspect before its mark is read.

    reference   the model that a suspect is aligned to, and its permutation groups
    committing  what a key commits to of a model before the mark
    naming      find the reference's tensors in a suspect that renamed them
    folding     a reference without batch norms, for a suspect that was exported without them
    reducing    join or drop neurons that were added without effect
    assigning   the best assignment (scipy)
    matching    match the suspect's neurons to the reference's and undo their scale
    rotation    undo a rotation of the residual stream, by a committed reference
    reading     all steps together: a suspect's tensors as the key expects them

Neurons are matched by tensors that the key does not read, so that the order found does not depend
on the message. The package needs numpy; scipy.optimize is loaded when neurons are assigned.
"""

from __future__ import annotations

from countermark.alignment.committing import commit_reference, is_committed
from countermark.alignment.matching import align_tensors
from countermark.alignment.reading import RealignedTensors, realign_suspect
from countermark.alignment.reference import Reference, SuspectWithReference
from countermark.alignment.rotation import undo_rotation

__all__ = [
    "RealignedTensors",
    "Reference",
    "SuspectWithReference",
    "align_tensors",
    "commit_reference",
    "is_committed",
    "realign_suspect",
    "undo_rotation",
]  # fmt: skip
