"""A Merkle tree (RFC 9162) that grows leaf by leaf, and whose proofs need few of its nodes.

Only the nodes over complete subtrees are stored: node (level, index) is the tree hash of the leaves
index·2^level … (index + 1)·2^level − 1 and never changes. Roots, inclusion proofs and consistency
proofs at every size follow from O(log n) of these nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from countermark._internal.merkle import DIGEST_BYTES, compute_root, hash_leaf, hash_node
from countermark.errors import ClaimError

Node: TypeAlias = "tuple[int, int]"
"""Level and index of a complete subtree."""
Nodes: TypeAlias = "Callable[[int, int], bytes]"
"""Level and index of a complete subtree to its hash (32 bytes)."""


def compute_new_nodes(leaf: bytes, size: int, nodes: Nodes) -> dict[Node, bytes]:
    """Compute the nodes that one more leaf adds to a tree: its own, and each that it completes.

    Args:
        leaf: the content of the leaf.
        size: the number of leaves before.
        nodes: the stored nodes.
    """
    level, index, digest = 0, size, hash_leaf(leaf)
    made = {(level, index): digest}
    # A leaf with an odd index is a right child: it completes the subtree with its left sibling.
    while index % 2:
        digest = hash_node(nodes(level, index - 1), digest)
        level, index = level + 1, index // 2
        made[level, index] = digest
    return made


def compute_root_at(size: int, nodes: Nodes) -> bytes:
    """Compute the root (32 bytes) over the first `size` leaves."""
    return _hash_leaves(0, size, nodes) if size else compute_root([])


def make_inclusion_path(index: int, size: int, nodes: Nodes) -> list[bytes]:
    """Compute the path from a leaf to the root over the first `size` leaves; section 2.1.3.1.

    Returns:
        Digests of 32 bytes, lowest first.
    """
    path: list[bytes] = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _find_split(high - low)
        if index < middle:
            path.append(_hash_leaves(middle, high, nodes))
            high = middle
        else:
            path.append(_hash_leaves(low, middle, nodes))
            low = middle
    return path[::-1]


def make_consistency_path(old: int, size: int, nodes: Nodes) -> list[bytes]:
    """Prove that the first `old` of `size` leaves are the old tree; section 2.1.4.1.

    Returns:
        Digests of 32 bytes, in the order in which `is_consistent` uses them.
    """
    path: list[bytes] = []
    low, high, left = 0, size, True  # left: the verifier knows the old tree's root
    while old not in (0, high):
        middle = low + _find_split(high - low)
        if old <= middle:
            path.append(_hash_leaves(middle, high, nodes))
            high = middle
        else:
            path.append(_hash_leaves(low, middle, nodes))
            low, left = middle, False
    return ([] if left else [_hash_leaves(low, high, nodes)]) + path[::-1]


def is_consistent(old: tuple[int, bytes], new: tuple[int, bytes], path: Sequence[bytes]) -> bool:
    """Return true if a proof shows that a new tree only adds leaves to an old one; section 2.1.4.2.

    Args:
        old: size and root of the old tree.
        new: size and root of the new tree.
        path: the proof, as `make_consistency_path` gives it.

    Raises:
        ClaimError: the old tree is larger, or a digest of the proof does not have 32 bytes.
    """
    (old_size, old_root), (size, new_root) = old, new
    if old_size > size or any(len(each) != DIGEST_BYTES for each in path):
        raise ClaimError(
            f"there is no proof that {size} claims only add to {old_size}: expected digests of 32 "
            "bytes, and the smaller tree first"
        )
    # Nothing was added, or the old tree was empty: the proof has no digests.
    if old_size in (0, size):
        return not path and (old_root == new_root if old_size else old_root == compute_root([]))
    # An old tree with a power of two of leaves is a node of the new tree, which the proof leaves
    # out.
    if old_size & (old_size - 1) == 0:
        path = [old_root, *path]
    place, last = old_size - 1, size - 1
    while place % 2:
        place, last = place >> 1, last >> 1
    if not path:
        return False
    reached_old = reached_new = path[0]
    for digest in path[1:]:
        if last == 0:
            return False
        if place % 2 or place == last:
            reached_old = hash_node(digest, reached_old)
            reached_new = hash_node(digest, reached_new)
            # Skip the levels at which the last node has no sibling and rises unchanged.
            while place % 2 == 0 and place:
                place, last = place >> 1, last >> 1
        else:
            reached_new = hash_node(reached_new, digest)
        place, last = place >> 1, last >> 1
    return (reached_old, reached_new, last) == (old_root, new_root, 0)


class GrowingTree:
    """The root over a list of leaves while the list is read; it holds log n digests in memory.

    Attributes:
        size: the number of leaves so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[tuple[int, bytes]] = []  # (level, hash), largest first

    def add_leaf(self, leaf: bytes) -> dict[Node, bytes]:
        """Add one leaf and return the nodes that it adds."""
        peaks = dict(self._peaks)
        made = compute_new_nodes(leaf, self.size, lambda level, _: peaks[level])
        # The highest new node covers the smaller complete subtrees, which are not needed any more.
        top = max(made)
        self._peaks = [each for each in self._peaks if each[0] > top[0]] + [(top[0], made[top])]
        self.size += 1
        return made

    @property
    def current_root(self) -> bytes:
        """The root over the leaves so far."""
        if not self._peaks:
            return compute_root([])
        *others, (_, reached) = self._peaks
        for _, peak in reversed(others):
            reached = hash_node(peak, reached)
        return reached


def _find_split(size: int) -> int:
    """Return k of RFC 9162, section 2.1.1: the largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def _hash_leaves(low: int, high: int, nodes: Nodes) -> bytes:
    """Compute the tree hash of the leaves low … high − 1.

    `low` must be a multiple of the smallest power of two that is at least high − low.
    """
    size = high - low
    if size & (size - 1) == 0:
        level = size.bit_length() - 1
        return nodes(level, low >> level)
    middle = low + _find_split(size)
    return hash_node(_hash_leaves(low, middle, nodes), _hash_leaves(middle, high, nodes))
