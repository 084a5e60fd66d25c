"""Merkle trees as in RFC 9162 (Certificate Transparency 2.0), section 2.1, over SHA-256.

    MTH({})  = SHA-256()
    MTH({d}) = SHA-256(0x00 ‖ d)
    MTH(D_n) = SHA-256(0x01 ‖ MTH(D[0:k]) ‖ MTH(D[k:n])),  k the largest power of two below n

The code hashes level by level from the leaves: neighbours are paired, and a last digest without a
neighbour rises unchanged, which gives the same tree. A root together with the number of leaves
fixes every leaf and its place; the root alone does not fix the number of leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from countermark.errors import ConfigError

DIGEST_BYTES = 32


def compute_root(leaves: Sequence[bytes]) -> bytes:
    """Compute the Merkle tree hash (32 bytes) of leaves of any length; RFC 9162, section 2.1.1."""
    if not leaves:
        return hashlib.sha256().digest()
    return _hash_levels(leaves)[-1][0]


def prove_inclusion(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return the inclusion path of one leaf; section 2.1.3.1.

    Returns: digests of 32 bytes, lowest first.

    Raises:
        ConfigError: there is no such leaf.
    """
    return prove_inclusions(leaves, [index])[0]


def prove_inclusions(leaves: Sequence[bytes], indices: Sequence[int]) -> list[list[bytes]]:
    """Return the inclusion path of each of several leaves; the tree is hashed once.

    Raises:
        ConfigError: there is no such leaf.
    """
    levels = _hash_levels(leaves) if leaves else []
    return [_collect_path(levels, index, len(leaves)) for index in indices]


def is_under(root: str, leaf: bytes, index: int, size: int, path: Sequence[str]) -> bool:
    """Return true if an inclusion path leads from a leaf to a root.

    Args:
        root: digest in hexadecimal.
        leaf: the leaf itself, not its digest.
        index: place of the leaf, from 0.
        size: how many leaves the tree has.
        path: digests in hexadecimal, as a document holds them, lowest first.
    """
    try:
        # Path, place and size come out of a document that anybody may have written.
        return (
            compute_path_root(leaf, index, size, [bytes.fromhex(each) for each in path]).hex()
            == root
        )
    except (ConfigError, ValueError):
        return False


def compute_path_root(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """Compute the root (32 bytes) that an inclusion path leads to; section 2.1.3.2.

    The leaf is in the tree of `size` leaves if the result is the tree's root, and only then.

    Args:
        leaf: the leaf itself, not its digest.
        index: place of the leaf, from 0.
        size: how many leaves the tree has.
        path: digests of 32 bytes, lowest first.

    Raises:
        ConfigError: no leaf has this place, or no path to it has this form.
    """
    place, last = _require_leaf(index, size), size - 1
    reached = hash_leaf(leaf)
    for digest in path:
        # At `last == 0` (sn in the RFC) the root is reached: further digests belong to no path.
        if len(digest) != DIGEST_BYTES or last == 0:
            raise _make_path_error(index, size, path)
        if place % 2 or place == last:
            reached = hash_node(digest, reached)
            while place % 2 == 0 and place:  # the digest rose without a neighbour
                place, last = place >> 1, last >> 1
        else:
            reached = hash_node(reached, digest)
        place, last = place >> 1, last >> 1
    if last:
        raise _make_path_error(index, size, path)
    return reached


def _hash_levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """Return the digests of the leaves, of their pairs and so on, up to the root."""
    levels = [[hash_leaf(leaf) for leaf in leaves]]
    while len(below := levels[-1]) > 1:
        level = [hash_node(*below[at : at + 2]) for at in range(0, len(below) - 1, 2)]
        # An odd level ends with a digest that has no neighbour; the slice is empty for an even one.
        levels.append(level + below[len(below) - len(below) % 2 :])
    return levels


def _collect_path(levels: Sequence[Sequence[bytes]], index: int, size: int) -> list[bytes]:
    """Return the inclusion path of the leaf at `index`, out of the levels of its tree."""
    place, path = _require_leaf(index, size), []
    for level in levels[:-1]:
        # `place ^ 1` is the neighbour: left and right differ in the last bit.
        if place ^ 1 < len(level):
            path.append(level[place ^ 1])
        place >>= 1
    return path


def _require_leaf(index: int, size: int) -> int:
    """Return the index, or raise `ConfigError` if the tree has no such leaf."""
    if not 0 <= index < size:
        raise ConfigError(f"there is no leaf {index} in a tree of {size}: expected 0 to {size - 1}")
    return index


def _make_path_error(index: int, size: int, path: Sequence[bytes]) -> ConfigError:
    """Return the error for a path that cannot belong to this leaf and tree."""
    return ConfigError(
        f"{len(path)} digests of {sorted({len(each) for each in path})} bytes are no path to leaf "
        f"{index} of {size}: expected the one that was made with the tree"
    )


def hash_leaf(leaf: bytes) -> bytes:
    """Return SHA-256(0x00 ‖ leaf), 32 bytes."""
    # The prefixes 0x00 and 0x01 keep leaves and nodes apart: nobody can show a node as a leaf.
    return hashlib.sha256(b"\x00" + leaf).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 ‖ left ‖ right), 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()
