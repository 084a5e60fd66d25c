"""What a key commits to of the model before the mark, so that it can be a reference later.

    root of the model's digest (32 bytes), number of tensors (8),
    digest of the neurons by file (32), of the neurons by trace (32)

The neurons, that is which axes of which tensors are reordered together, enter it as well: whoever
could choose them after the message was drawn could choose what an alignment makes of a suspect.
They are those that the names, shapes and configuration of a file say, and those that a live model
is traced to; a digest of zeros stands for neurons that were not found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from countermark.alignment.reference import guess_units
from countermark.errors import CountermarkError
from countermark.units import Units
from countermark.weights import Weights, model_digest

_DIGEST, _NOTHING = 40, bytes(32)


def commit_reference(weights: Weights, traced: Sequence[Units] | None = None) -> NDArray[np.uint8]:
    """Digest a model as it is before the mark, uint8 (104,), for a key to freeze.

    Args:
        weights: the model, open. All of it is read.
        traced: its neurons, where a live model could be traced.

    Raises:
        SuspectError: it has a tensor without bytes of its own.
    """
    try:
        guessed = _digest_units(guess_units(weights))
    except CountermarkError:  # no chain, and no transformer
        guessed = _NOTHING
    found = _NOTHING if traced is None else _digest_units(traced)
    units = np.frombuffer(guessed + found, dtype=np.uint8)
    return np.concatenate([model_digest(weights).to_array(), units])


def is_committed(
    kept: NDArray[np.uint8] | None, reference: Weights, units: Sequence[Units]
) -> bool:
    """Return true if a key froze this very model with these neurons before its message was drawn.

    Args:
        kept: what the key froze; None where it froze nothing.
        reference: the model, open.
        units: the neurons by which a suspect is aligned to it.
    """
    if kept is None or kept.dtype != np.uint8 or kept.shape != (_DIGEST + 64,):
        return False
    content, digest = kept.tobytes()[_DIGEST:], _digest_units(units)
    if digest not in (content[:32], content[32:]):
        return False
    return np.array_equal(kept[:_DIGEST], model_digest(reference).to_array())


def _digest_units(units: Sequence[Units]) -> bytes:
    told = json.dumps([asdict(each) for each in units], sort_keys=True)
    return hashlib.sha256(b"countermark/units/v1" + told.encode()).digest()
