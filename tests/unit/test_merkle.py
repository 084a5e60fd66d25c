"""Merkle trees: known answers of Certificate Transparency, the definition itself, forgeries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keys import one_line

from countermark._internal.merkle import (
    compute_path_root,
    compute_root,
    prove_inclusion,
    prove_inclusions,
)
from countermark.errors import ConfigError

# Leaves and roots of Certificate Transparency's test data; RFC 6962 and RFC 9162 hash alike.
LEAVES = [
    bytes.fromhex(each)
    for each in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
                 "606162636465666768696a6b6c6d6e6f")
]  # fmt: skip
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
SIZES = range(1, 41)


def recursive(leaves: Sequence[bytes]) -> bytes:
    """The definition of RFC 9162, section 2.1.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + recursive(leaves[:k]) + recursive(leaves[k:])).digest()


def recursive_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The definition of section 2.1.3.1."""
    if len(leaves) == 1:
        return []
    k = 1 << (len(leaves) - 1).bit_length() - 1
    if index < k:
        return [*recursive_path(leaves[:k], index), recursive(leaves[k:])]
    return [*recursive_path(leaves[k:], index - k), recursive(leaves[:k])]


def some_leaves(size: int) -> list[bytes]:
    return [b"leaf %d" % each for each in range(size)]


def test_known_roots() -> None:
    assert compute_root([]).hex() == EMPTY
    assert [compute_root(LEAVES[:size]).hex() for size in range(1, 9)] == ROOTS


@pytest.mark.parametrize("size", [*SIZES, 64, 65, 127, 1000])
def test_trees_are_those_of_the_definition(size: int) -> None:
    leaves = some_leaves(size)
    assert compute_root(leaves) == recursive(leaves)
    for index in range(0, size, max(1, size // 40)):
        assert prove_inclusion(leaves, index) == recursive_path(leaves, index)


@pytest.mark.parametrize("size", SIZES)
def test_every_path_leads_to_the_root(size: int) -> None:
    leaves = some_leaves(size)
    for index, path in enumerate(prove_inclusions(leaves, range(size))):
        assert compute_path_root(leaves[index], index, size, path) == compute_root(leaves)


def led(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that was reached; None where it is refused, in one line."""
    try:
        return compute_path_root(leaf, index, size, path)
    except ConfigError as error:
        one_line(error)
        return None


@st.composite
def placed(draw: st.DrawFn) -> tuple[int, int]:
    """A size and an index."""
    size = draw(st.sampled_from(SIZES))
    return size, draw(st.integers(0, size - 1))


@given(placed(), st.data())
def test_another_leaf_index_or_path_never_leads_there(
    where: tuple[int, int], data: st.DataObject
) -> None:
    size, index = where
    leaves = some_leaves(size)
    path, top = prove_inclusion(leaves, index), compute_root(leaves)
    changed = bytearray(leaves[index])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    assert led(bytes(changed), index, size, path) != top
    for other in {*range(size), -1, size, 1 << 40} - {index}:
        assert led(leaves[index], other, size, path) != top
    if path:
        at, byte = data.draw(st.integers(0, len(path) - 1)), data.draw(st.integers(0, 31))
        digest = bytearray(path[at])
        digest[byte] ^= data.draw(st.integers(1, 255))
        assert led(leaves[index], index, size, [*path[:at], bytes(digest), *path[at + 1 :]]) != top
        assert led(leaves[index], index, size, path[:-1]) != top
        assert led(leaves[index], index, size, [*path[:-1], path[-1][:31]]) is None
        assert led(leaves[index], index, size, [*path[:-1], path[-1] + b"\0"]) is None
    assert led(leaves[index], index, size, [*path, bytes(32)]) is None


@given(placed(), st.sampled_from(range(1, 100)))
def test_another_size_leads_there_only_where_the_path_has_the_same_turns(
    where: tuple[int, int], other: int
) -> None:
    """A root alone does not say how many leaves there are: whoever checks must know the number."""
    size, index = where
    leaves = some_leaves(size)
    path = prove_inclusion(leaves, index)
    if other == size or index >= other:
        return
    turns = turns_to(index, size)
    reached = led(leaves[index], index, other, path)
    assert (reached == compute_root(leaves)) == (turns_to(index, other) == turns)


def turns_to(index: int, size: int) -> list[bool]:
    """For each digest of a path, lowest first: does it stand on the left?"""
    if size == 1:
        return []
    k = 1 << (size - 1).bit_length() - 1
    if index < k:
        return [*turns_to(index, k), False]
    return [*turns_to(index - k, size - k), True]


def test_an_inner_node_is_no_leaf() -> None:
    """A leaf that is made of two digests has another prefix than the node above these two."""
    leaves = some_leaves(4)
    left = b"".join(hashlib.sha256(b"\0" + each).digest() for each in leaves[:2])
    assert led(left, 0, 2, prove_inclusion(leaves, 0)[1:]) != compute_root(leaves)


@pytest.mark.parametrize(("index", "size"), [(0, 0), (3, 3), (-1, 3), (7, 3)])
def test_a_leaf_that_is_not_there_is_one_line(index: int, size: int) -> None:
    for act in (
        lambda: prove_inclusion(some_leaves(size), index),
        lambda: compute_path_root(b"", index, size, []),
    ):
        with pytest.raises(ConfigError) as caught:
            act()
        assert f"there is no leaf {index} in a tree of {size}" in one_line(caught.value)
