"""Copies are known by their neurons; networks that were trained apart are not copies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from countermark.attacks import find_attack
from countermark.attacks.base import NamedTensors
from countermark.training.data import load_data
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.verification.copies import LARGEST_LOG10_P, CopyComparison, compare_units
from tiny_transformers import tiny

DATA = load_data("digits").subset(train=1000, test=100)
HOSTS: dict[str, dict[str, Any]] = {"mlp": {}, "resnet18": {"width": 0.125, "channels": 1}}


def trained(name: str, seed: int) -> nn.Module:
    seed_torch(seed, "copies")
    model = build(name, HOSTS[name])
    fit(model, DATA, replace(recipe(name), batch_size=32), Course(2, device="cpu"))
    return model.eval()


@pytest.fixture(scope="module")
def hosts() -> dict[str, list[nn.Module]]:
    """Two networks of each kind that were trained apart, on the same data."""
    return {name: [trained(name, seed) for seed in range(2)] for name in HOSTS}


ATTACKS: list[tuple[str, dict[str, Any]]] = [
    ("fine_tune", {"lr": 0.001}), ("noise", {}), ("quantise", {"bits": 4}), ("prune", {}),
    ("dead_units", {"fraction": 0.2}), ("dead_units", {"fraction": 0.2, "side": "incoming"}),
    ("rescale", {}), ("shift_logits", {}), ("reorder_classes", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), ATTACKS, ids=str)
@pytest.mark.parametrize("host", list(HOSTS))
def test_a_copy_is_known_after_what_removes_marks(
    host: str, name: str, fields: dict[str, Any], hosts: dict[str, list[nn.Module]]
) -> None:
    own, other = hosts[host]
    copied = find_attack(name).from_fields(fields).run(own, DATA).model
    assert compare_units(copied, own).is_copy
    assert not compare_units(copied, other).is_copy


def test_both_sides_of_dead_units_together_and_another_order_hide_no_copy(
    hosts: dict[str, list[nn.Module]],
) -> None:
    own, other = hosts["mlp"]
    dead = find_attack("dead_units")
    both = dead.from_fields({"side": "incoming"}).run(own).model
    both = dead.from_fields({"fraction": 0.1}).run(both).model
    assert compare_units(both, own).is_copy
    permuted = find_attack("permute").from_fields({})
    found = compare_units(permuted.run(both).model, own)
    assert found.is_copy
    assert found.aligned
    assert "once they are put into its order" in str(found)
    assert not compare_units(permuted.run(other).model, own).is_copy


def test_networks_that_were_trained_apart_are_nothing_like_copies(
    hosts: dict[str, list[nn.Module]],
) -> None:
    for one, other in (
        *hosts.values(),
        *([tiny(name, 1), tiny(name, 2)] for name in ("gpt", "llama")),
    ):
        found = compare_units(one, other)
        assert found.compared > 50
        assert found.alike < 0.05 * found.compared
        assert found.log10_p > -1


def test_the_bound_holds_for_units_in_an_order_of_their_own() -> None:
    """Even for the same network: with its units in a random order, k in their places is 1/k!."""
    drawn = np.random.default_rng(3)
    own = drawn.normal(size=(64, 40)).astype(np.float32)
    in_place = []
    for _ in range(300):
        other = NamedTensors({"w": torch.from_numpy(own[drawn.permutation(64)].copy())})
        found = compare_units(other, NamedTensors({"w": torch.from_numpy(own.copy())}))
        in_place.append(found.alike)
        assert found.aligned or found.log10_p > LARGEST_LOG10_P
        assert not found.is_copy
    assert 0.7 < float(np.mean(in_place)) < 1.3  # as many as a random order leaves, one


def test_what_comes_of_one_base_is_told_apart_by_what_was_changed(
    hosts: dict[str, list[nn.Module]],
) -> None:
    base = hosts["mlp"][0]
    odd = replace(DATA, train_labels=9 - DATA.train_labels)
    tune = find_attack("fine_tune").from_fields({"lr": 0.001})
    one, other = tune.run(base, DATA).model, tune.run(base, odd).model
    assert compare_units(one, other).is_copy
    assert not compare_units(one, other, base).is_copy
    copied = find_attack("noise").from_fields({"std": 0.01}).run(one).model
    assert compare_units(copied, one, base).is_copy


def test_nothing_in_common_is_no_copy() -> None:
    one = NamedTensors({"a": torch.randn(20, 20), "b": torch.randn(20)})
    for other in (
        NamedTensors({"c": torch.randn(20, 20)}), NamedTensors({"a": torch.randn(20, 21)}),
        NamedTensors({"a": torch.zeros(20, 20)}), NamedTensors({"b": torch.randn(20)}),
    ):  # fmt: skip
        assert not compare_units(one, other).is_copy
    assert not CopyComparison().is_copy
    assert not CopyComparison(5, 1000, -100.0).is_copy  # too small a part
    table = torch.sin(torch.outer(torch.arange(50.0), torch.rand(40)))
    chosen = torch.arange(49.0).outer(torch.arange(50.0) + 1)
    for name, same in (("embed_positions.weight", table), ("index", chosen)):
        two = [NamedTensors({name: same, "a": torch.randn(20, 20)}) for _ in range(2)]
        assert not compare_units(*two).is_copy  # computed alike, and trained apart
    wide = NamedTensors({"a": torch.zeros(2, (1 << 20) + 1)})
    assert not compare_units(wide, wide).is_copy
