"""Where a key's tensors may lie in a suspect: by name, else by shape; each way counts as a test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from keys import SHAPE, InMemory, known_key
from numpy.typing import NDArray

from countermark.checkpoints import MOST_CANDIDATES, find_assignments
from countermark.errors import SuspectError
from countermark.results.verdict import VerificationOptions
from countermark.schemes import load_scheme
from countermark.verification.verify import examine, verify

TRUSTING = VerificationOptions(allow_test_key=True)


def shaped(shapes: Mapping[str, tuple[int, ...]]) -> InMemory:
    return InMemory({name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()})


def found(
    suspect: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[dict[str, str]]:
    return list(find_assignments(shaped(suspect), wanted))


def test_a_name_with_its_shape_is_taken() -> None:
    suspect = {"x": (2, 3), "w": (2, 3), "v": (3, 2)}
    assert found(suspect, {"w": (2, 3)}) == [{"w": "w"}]
    assert found(suspect, {"v": (3, 2), "w": (2, 3)}) == [{"v": "v", "w": "w"}]


def test_a_renamed_tensor_is_sought_by_shape_and_every_way_counts() -> None:
    suspect = {"a": (2, 3), "b": (2, 3), "c": (3, 2), "w": (3, 2)}
    assert found(suspect, {"w": (2, 3)}) == [{"w": "a"}, {"w": "b"}]
    assert found(suspect, {"c": (2, 3), "w": (2, 3)}) == [
        {"c": "a", "w": "b"},
        {"c": "b", "w": "a"},
    ]


def test_what_has_its_own_name_is_not_given_to_another() -> None:
    suspect = {"w": (2,), "a": (2,)}
    assert found(suspect, {"w": (2,), "v": (2,)}) == [{"w": "w", "v": "a"}]
    assert found({"w": (2,)}, {"w": (2,), "v": (2,)}) == []


def test_another_beginning_of_all_names_is_one_way() -> None:
    wanted = {"h.0.w": (2, 3), "h.1.w": (2, 3)}
    more = {"x": (2, 3), "y": (2, 3)}
    put = {"module.h.0.w": (2, 3), "module.h.1.w": (2, 3)}
    assert found(put | more, wanted) == [{"h.0.w": "module.h.0.w", "h.1.w": "module.h.1.w"}]
    off = {"0.w": (2, 3), "1.w": (2, 3)}
    assert found(off | more, wanted) == [{"h.0.w": "0.w", "h.1.w": "1.w"}]
    assert len(found(put | off, wanted)) == 2  # each is a test
    assert found(put | {"h.0.w": (2, 3), "h.1.w": (2, 3)}, wanted) == [{n: n for n in wanted}]
    assert len(found({**put, "module.h.1.w": (3, 2), **more}, wanted)) == 6  # by shape
    assert len(found({"module.w": (2,), "a": (2,)}, {"w": (2,)})) == 2  # one name says too little


@pytest.mark.parametrize(
    "wrapped",
    [
        "{0}._orig_mod.{1}", "_fsdp_wrapped_module.{0}._checkpoint_wrapped_module.{1}",
        "{0}.module.{1}", "model.{0}._orig_mod.base_layer.{1}",
    ],
)  # fmt: skip
def test_names_of_wrappers_inside_are_left_out(wrapped: str) -> None:
    wanted = {f"h.{n}.w": (2, 3) for n in range(3)}
    names = {name: wrapped.format(*name.rsplit(".", 1)) for name in wanted}
    put = dict.fromkeys(names.values(), (2, 3))
    assert found(put | {"x": (2, 3)}, wanted) == [names]
    # A key may have been made of a wrapped model.
    assert found(wanted | {"x": (2, 3)}, put) == [{other: name for name, other in names.items()}]
    assert found(put | wanted, wanted) == [{name: name for name in wanted}]
    assert found(dict.fromkeys(put, (3, 2)), wanted) == []


def test_names_that_become_one_without_wrappers_are_both_tried() -> None:
    wanted = {"h.0.w": (2, 3), "h.1.w": (2, 3)}
    forms = ("h.{}.module.w", "h.{}._orig_mod.w")
    both = {each.format(n): (2, 3) for each in forms for n in (0, 1)}
    assert found(both, wanted) == [{f"h.{n}.w": each.format(n) for n in (0, 1)} for each in forms]


def test_half_of_the_names_may_do_without_wrappers() -> None:
    wanted = {f"h.{n}.w": (2, 3) for n in range(4)}
    suspect = shaped({f"h.{n}._orig_mod.w": (2, 3) for n in (0, 1, 3)} | {"h.2.w": (9,)})
    assert list(find_assignments(suspect, wanted, partial=True)) == [
        {f"h.{n}.w": f"h.{n}._orig_mod.w" for n in (0, 1, 3)}
    ]


def test_half_of_the_names_may_do() -> None:
    wanted = {f"h.{n}.w": (2, 3) for n in range(4)}

    def parts(*numbers: int, before: str = "") -> list[dict[str, str]]:
        suspect = shaped({f"{before}h.{n}.w": (2, 3) for n in numbers} | {"other": (9,)})
        return list(find_assignments(suspect, wanted, partial=True))

    assert parts(0, 2, 3) == [{f"h.{n}.w": f"h.{n}.w" for n in (0, 2, 3)}]
    assert parts(1, 2, before="m.") == [{f"h.{n}.w": f"m.h.{n}.w" for n in (1, 2)}]
    assert parts(1) == []
    assert found({"h.0.w": (2, 3), "h.1.w": (2, 3)}, wanted) == []  # unless it is allowed
    many = {f"x.{n}": (2, 3) for n in range(9)} | {"h.0.w": (2, 3)}
    assert (
        len(list(find_assignments(shaped(many), wanted, partial=True))) == 9 * 8 * 7
    )  # by shape first


def test_nothing_of_a_shape_is_no_way() -> None:
    assert found({}, {"w": (2,)}) == []
    assert found({"w": (2, 1), "a": (1, 2)}, {"w": (2,)}) == []
    assert found({"a": (2,), "b": (3,)}, {"v": (2,), "w": (2,)}) == []
    assert found({"a": (2,)}, {}) == [{}]


def test_scalars_and_the_order_of_the_key_are_kept() -> None:
    ways = found({"s": (), "b": (2,), "a": (2,)}, {"z": (), "a": (2,), "y": (2,)})
    assert ways == [{"z": "s", "a": "a", "y": "b"}]
    assert list(ways[0]) == ["z", "a", "y"]


def reference(
    suspect: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> set[tuple[str, ...]]:
    """Every injective map that keeps shapes and exact names, by trying them all."""
    ways: list[tuple[str, ...]] = [()]
    exact = {name for name, shape in wanted.items() if suspect.get(name) == shape}
    for name, shape in wanted.items():
        near = [
            other for other, its in suspect.items()
            if its == shape and (other == name if name in exact else other not in exact)
        ]  # fmt: skip
        ways = [(*way, other) for way in ways for other in near if other not in way]
    return set(ways)


shapes = st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from([(), (2,), (2, 3)]))


@settings(deadline=None, derandomize=True)
@given(suspect=shapes, wanted=shapes)
def test_all_ways_are_found_once(
    suspect: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    ways = [tuple(way.values()) for way in islice(find_assignments(shaped(suspect), wanted), 2000)]
    expected = reference(suspect, wanted)
    assert len(ways) == len(set(ways))
    assert set(ways) == expected if len(expected) <= MOST_CANDIDATES else ways


@pytest.mark.parametrize("there", [59, 60, 61])
def test_many_layers_of_one_shape_do_not_take_for_ever(there: int) -> None:
    """60! ways are counted as too many at once, and 59 tensors for 60 names as none."""
    suspect = {f"renamed.{i}": (4, 4) for i in range(there)}
    wanted = {f"layer.{i}": (4, 4) for i in range(60)}
    ways = list(islice(find_assignments(shaped(suspect), wanted), MOST_CANDIDATES + 1))
    assert len(ways) == (0 if there < 60 else MOST_CANDIDATES + 1)
    assert all(len(set(way.values())) == 60 for way in ways)


# --- what verify makes of it


@cache
def marked() -> NDArray[np.float32]:
    """Weights that the known key reads without an error: the least w with X·w = ±1."""
    key = known_key()
    rows = np.concatenate(list(load_scheme(key).generate_row_blocks(key))).astype(np.float64)
    w = rows.T @ np.linalg.solve(rows @ rows.T, 2.0 * key.message - 1.0)
    return w.reshape(SHAPE).astype(np.float32)


def innocent(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize("others", [0, 1, 9, 999])
def test_a_renamed_tensor_is_found_and_p_is_multiplied(others: int) -> None:
    key = known_key()
    tensors = {f"other.{i}": innocent(i) for i in range(others)} | {"renamed": marked()}
    verdict = examine(InMemory(tensors), key, TRUSTING)
    exact = examine(InMemory({"fc.weight": marked()}), key, TRUSTING)
    assert (verdict.outcome, verdict.test_count, verdict.matched) == ("owned", others + 1, 256)
    assert exact.log10_p is not None
    assert verdict.log10_p == pytest.approx(exact.log10_p + math.log10(others + 1))
    assert verdict.forgery_bits == pytest.approx(256 - math.log2(others + 1))
    assert verdict.subject.tensors == {"fc.weight": "renamed"}
    assert any("by shape, not by name" in limit for limit in verdict.limits)
    assert not any("by shape" in limit for limit in exact.limits)


def test_a_tensor_of_the_right_name_is_read_although_another_would_fit_better() -> None:
    key = known_key()
    suspect = InMemory({"fc.weight": innocent(0), "renamed": marked()})
    verdict = examine(suspect, key, TRUSTING)
    assert (verdict.outcome, verdict.test_count) == ("not_proven", 1)


def test_what_a_reader_found_wrong_with_a_file_is_a_caveat() -> None:
    suspect = InMemory({"fc.weight": marked()})
    assert examine(suspect, known_key(), TRUSTING).to_json()["suspect"].get("notes") is None
    suspect.notes = ("the index does not fit its files",)
    verdict = examine(suspect, known_key(), TRUSTING)
    assert suspect.notes[0] in verdict.limits
    assert verdict.to_json()["suspect"]["notes"] == [*suspect.notes]
    suspect = InMemory({"v": np.zeros(3)})
    suspect.form = "a program of torch.export"
    with pytest.raises(SuspectError, match=r"is a program of torch\.export, .*folded"):
        examine(suspect, known_key(), TRUSTING)


def test_too_many_ways_are_no_verdict() -> None:
    key = known_key()
    tensors = {f"other.{i}": innocent(0) for i in range(MOST_CANDIDATES)}
    verdict = examine(InMemory({**tensors, "renamed": marked()}), key, TRUSTING)
    assert (verdict.outcome, verdict.exit_code, verdict.matched) == ("no_verdict", 3, None)
    assert "more than 1000 ways" in verdict.reason


@pytest.mark.parametrize(
    "tensors", [{}, {"fc.weight": innocent(0).reshape(8, 64)}, {"fc.bias": np.zeros(16)}]
)
def test_a_missing_shape_is_no_verdict(tensors: Mapping[str, NDArray[Any]]) -> None:
    verdict = examine(InMemory(tensors), known_key(), TRUSTING)
    assert (verdict.outcome, verdict.exit_code, verdict.test_count) == ("no_verdict", 3, 0)
    assert "fc.weight [16, 32]" in verdict.reason
    assert verdict.to_json()["log10_p"] is None


def test_a_test_key_is_no_verdict_to_everybody_but_benchmarks() -> None:
    key = known_key()
    module = torch.nn.Module()
    module.fc = torch.nn.Linear(32, 16)
    with torch.no_grad():
        module.fc.weight.copy_(torch.from_numpy(marked()))
    for options in ({}, {"assume_dated": True}, {"alpha": 0.5}):
        verdict = verify(module, key, **options)  # type: ignore[arg-type]
        assert verdict.outcome == "no_verdict"
        assert "test key" in verdict.reason
    assert examine(module, key, TRUSTING).outcome == "owned"
