"""Commit a key to the model before the mark, so that this model can be a reference later.

    root of the model's digest (32 bytes), number of tensors (8),
    digest of the permutation groups by file (32), of the groups by trace (32)

The permutation groups tell which axes of which tensors are reordered together. The commitment
includes them, because a person who could choose them after the message was drawn could choose how
an alignment changes a suspect. The groups by file follow from the names, shapes and configuration
of a file; the groups by trace are found by tracing a live model. A digest of zeros stands for
groups that were not found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.reference import guess_permutation_groups
from countermark.alignment.symmetries import PermutationGroup
from countermark.checkpoints import Weights, compute_model_digest
from countermark.errors import CountermarkError

_DIGEST, _NOTHING = 40, bytes(32)


def commit_reference(
    weights: Weights, traced: Sequence[PermutationGroup] | None = None
) -> NDArray[np.uint8]:
    """Return the digest of a model before the mark, uint8 (104,), for a key to commit to.

    Args:
        weights: the model, open. All of it is read.
        traced: the permutation groups of the live model, if it could be traced.

    Raises:
        SuspectError: a tensor has no bytes of its own.
    """
    try:
        guessed = _digest_groups(guess_permutation_groups(weights))
    except CountermarkError:  # the layers are neither a chain nor a transformer
        guessed = _NOTHING
    found = _NOTHING if traced is None else _digest_groups(traced)
    units = np.frombuffer(guessed + found, dtype=np.uint8)
    return np.concatenate([compute_model_digest(weights).to_array(), units])


def is_committed(
    kept: NDArray[np.uint8] | None, reference: Weights, units: Sequence[PermutationGroup]
) -> bool:
    """Return true if a key committed to this model and these groups before its message was drawn.

    Args:
        kept: the commitment in the key; None if the key has no commitment.
        reference: the model, open.
        units: the permutation groups by which a suspect is aligned to the model.
    """
    if kept is None or kept.dtype != np.uint8 or kept.shape != (_DIGEST + 64,):
        return False
    # The groups are compared before the model, because hashing a model takes long.
    content, digest = kept.tobytes()[_DIGEST:], _digest_groups(units)
    # Groups guessed from a file and groups traced from a live model may differ; both were
    # committed.
    if digest not in (content[:32], content[32:]):
        return False
    return np.array_equal(kept[:_DIGEST], compute_model_digest(reference).to_array())


def _digest_groups(units: Sequence[PermutationGroup]) -> bytes:
    """Compute the SHA-256 of permutation groups (32 bytes), from their fields as sorted JSON."""
    # The prefix separates this digest from digests of other content (domain separation).
    told = json.dumps([asdict(each) for each in units], sort_keys=True)
    return hashlib.sha256(b"countermark/units/v1" + told.encode()).digest()
