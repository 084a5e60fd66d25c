"""Reading through disguises: undo reordered, rescaled, flipped and added neurons, then read.

    reference   what a suspect is aligned to, and which of its neurons belong together
    committing  what a key commits to of a model before the mark
    naming      a reference's tensors among those of a suspect that renamed them
    folding     a reference without batch norms, as an exported suspect is
    reducing    neurons that were added without effect
    assigning   the best assignment (scipy)
    matching    which of the suspect's neurons is which, and by how much each was scaled
    rotation    a residual stream that was rotated, turned back by a committed reference
    reading     all of it: a suspect's tensors as the key expects them

Neurons are matched by tensors that the key does not read, so that the order found does not depend
on the message. numpy; scipy.optimize is loaded where neurons are assigned.
"""

from __future__ import annotations

from countermark.alignment.committing import commit_reference, is_committed
from countermark.alignment.matching import align
from countermark.alignment.reading import Realigned, realigned
from countermark.alignment.reference import Disguised, Reference
from countermark.alignment.rotation import turned_back

__all__ = [
    "Disguised", "Realigned", "Reference", "align", "commit_reference", "is_committed", "realigned",
    "turned_back",
]  # fmt: skip
