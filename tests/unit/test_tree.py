"""Growing Merkle trees against `merkle` and the definitions of RFC 9162, word by word."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keys import one_line

from countermark._internal import merkle
from countermark.claims.tree import (
    GrowingTree,
    Node,
    compute_new_nodes,
    compute_root_at,
    is_consistent,
    make_consistency_path,
    make_inclusion_path,
)
from countermark.errors import ClaimError

SIZES = range(34)
LEAVES = [b"leaf %d" % each for each in SIZES]


def kept(size: int) -> dict[Node, bytes]:
    """All nodes of a tree, grown leaf by leaf."""
    nodes: dict[Node, bytes] = {}

    def there(level: int, index: int) -> bytes:
        return nodes[level, index]

    for each in range(size):
        nodes |= compute_new_nodes(LEAVES[each], each, there)
    return nodes


NODES = kept(33)


def node(level: int, index: int) -> bytes:
    return NODES[level, index]


def subproof(old: int, leaves: Sequence[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of section 2.1.4.1, word by word."""
    if old == len(leaves):
        return [] if whole else [merkle.compute_root(leaves)]
    k = 1 << (len(leaves) - 1).bit_length() - 1
    if old <= k:
        return [*subproof(old, leaves[:k], whole), merkle.compute_root(leaves[k:])]
    return [*subproof(old - k, leaves[k:], False), merkle.compute_root(leaves[:k])]


@pytest.mark.parametrize("size", SIZES)
def test_roots_and_paths_are_those_of_the_definition(size: int) -> None:
    if size > 33:
        return
    leaves = LEAVES[:size]
    assert compute_root_at(size, node) == merkle.compute_root(leaves)
    for index in range(size):
        assert make_inclusion_path(index, size, node) == merkle.prove_inclusion(leaves, index)
    for old in range(1, size + 1):
        assert make_consistency_path(old, size, node) == subproof(old, leaves, True)


def test_the_root_while_reading() -> None:
    growing, made = GrowingTree(), {}
    for size, leaf in enumerate(LEAVES[:33]):
        assert growing.current_root == merkle.compute_root(LEAVES[:size])
        made |= growing.add_leaf(leaf)
    assert made == NODES


def test_a_node_once_there_never_changes() -> None:
    for size in range(1, 33):
        before = kept(size)
        assert before == {each: NODES[each] for each in before}


@pytest.mark.parametrize("size", SIZES[:33])
def test_every_older_tree_is_consistent_and_no_other(size: int) -> None:
    new = size, compute_root_at(size, node)
    for old in range(size + 1):
        path = make_consistency_path(old, size, node)
        assert is_consistent((old, compute_root_at(old, node)), new, path)
        assert not is_consistent((old, bytes(32)), new, path)
        assert (
            not is_consistent((old, compute_root_at(old, node)), (size, bytes(32)), path)
            or old == 0
        )
        assert not is_consistent((old, compute_root_at(old, node)), new, [*path, bytes(32)])
        if path:
            assert not is_consistent((old, compute_root_at(old, node)), new, path[:-1])


@given(st.integers(2, 32), st.data())
def test_a_changed_proof_is_none(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size - 1))
    path = make_consistency_path(old, size, node)
    at = data.draw(st.integers(0, len(path) - 1))
    changed = bytearray(path[at])
    changed[data.draw(st.integers(0, 31))] ^= data.draw(st.integers(1, 255))
    forged = [*path[:at], bytes(changed), *path[at + 1 :]]
    assert not is_consistent(
        (old, compute_root_at(old, node)), (size, compute_root_at(size, node)), forged
    )


@given(st.integers(1, 32), st.integers(1, 32), st.lists(st.binary(min_size=32, max_size=32)))
def test_no_random_proof_joins_different_trees(old: int, size: int, path: list[bytes]) -> None:
    if old < size:
        other = merkle.compute_root([b"other", *LEAVES[1:old]])
        assert not is_consistent((old, other), (size, compute_root_at(size, node)), path)


def test_what_is_no_proof_is_one_line() -> None:
    for old, size, path in ((3, 2, []), (1, 2, [b"short"])):
        with pytest.raises(ClaimError) as caught:
            is_consistent((old, bytes(32)), (size, bytes(32)), path)
        assert "expected digests of 32 bytes" in one_line(caught.value)
