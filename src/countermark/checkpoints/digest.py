"""Compute the digest of a whole model: the root of a Merkle tree over its tensors.

    leaf = frame(name, dtype, shape, SHA-256(bytes)),  the leaves sorted by name
    root = the tree hash of RFC 9162 over the leaves

The same tensors give the same root whether they come from a safetensors file, a torch file or a
live module, and an owner can show that one tensor belongs to a model without showing the others. A
leaf holds a digest in place of the bytes, so a tensor of any size is hashed piece by piece.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from countermark._internal import merkle
from countermark._internal.progress import show_progress
from countermark.checkpoints.base import Weights
from countermark.checkpoints.dtypes import get_dtype_word
from countermark.errors import SuspectError, make_printable
from countermark.keys.streams import frame


@dataclass(frozen=True)
class ModelDigest:
    """The digest by which a claim or a key names a model.

    Attributes:
        root: root of the Merkle tree over the model's tensors, 64 hexadecimal digits.
        tensors: number of tensors; a root alone does not fix their number.
    """

    root: str
    tensors: int

    def to_array(self) -> NDArray[np.uint8]:
        """Return the digest as uint8 (40,) for a key: the root, then the number, little-endian."""
        content = bytes.fromhex(self.root) + self.tensors.to_bytes(8, "little")
        return np.frombuffer(content, dtype=np.uint8)


def compute_model_digest(weights: Weights) -> ModelDigest:
    """Compute the digest of all tensors of a model. Reads the whole model, one piece at a time.

    Raises:
        SuspectError: the model has no tensors, or a tensor has no bytes of its own.
    """
    # A view repeats values of stored tensors, and another format may not offer the same views.
    names = sorted(weights.tensors.keys() - weights.views)
    if not names:
        raise SuspectError(f"{weights.name} holds no tensors: expected the weights of a model")
    with show_progress("model digest", len(names)) as advance:
        leaves = []
        for name in names:
            leaves.append(make_tensor_leaf(weights, name))
            advance(1)
    return ModelDigest(merkle.compute_root(leaves).hex(), len(names))


def make_tensor_leaf(weights: Weights, name: str) -> bytes:
    """Return the leaf of one tensor: its name, dtype as safetensors spells it, shape and digest.

    Raises:
        SuspectError: safetensors has no word for the dtype.
    """
    info, digest = weights.tensors[name], hashlib.sha256()
    for piece in weights.read_pieces(name):
        digest.update(piece)
    # All formats must agree on one spelling, or the same tensors would give different roots.
    word = get_dtype_word(info.dtype)
    if not word.isascii() or word != word.upper():
        raise SuspectError(
            f"{weights.name}: {make_printable(name, 200)} has dtype {make_printable(info.dtype, 40)}, which "
            "has no word in safetensors: expected weights that could be saved there"
        )
    shape = ",".join(map(str, info.shape))
    return frame(name.encode(), word.encode(), shape.encode(), digest.digest())
