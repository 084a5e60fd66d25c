"""Alignment of convolutional hosts: disguised copies are read in full, strangers are not claimed.

Eight disjoint pairs for each architecture, shortened: an eighth of the width, 400 digits, 3 epochs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
from false_claims import Pairs
from torch import nn

from countermark.alignment import Reference, SuspectWithReference, realign_suspect
from countermark.attacks.fold import Fold
from countermark.attacks.invariants import Dummies, Permute, Rescale
from countermark.checkpoints import ModuleWeights
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import VerificationOptions
from countermark.schemes.uchida.scheme import Uchida
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.verification.verify import examine

PAIRS, T = 8, 256
LAYERS = {"vgg16": "features.24.weight", "resnet18": "layer4.1.conv2.weight"}
TERMS = VerificationOptions(assume_dated=True, allow_test_key=True)
ARGUMENTS = {"width": 0.125, "channels": 1}


@dataclass(frozen=True)
class Pair:
    """A marked host, what it began with, its key, and a stranger; in eval mode."""

    start: nn.Module
    marked: nn.Module
    key: Key
    stranger: nn.Module


def host(name: str, seed: int) -> nn.Module:
    seed_torch(seed, "init")
    return build(name, ARGUMENTS)


def made(name: str, seed: int, data: Dataset) -> Pair:
    model, stranger = host(name, seed), host(name, seed + 100)
    start, how = copy.deepcopy(model).eval(), recipe(name, {"batch_size": 50, "augment": False})
    scheme, material = Uchida(LAYERS[name], T, strength=0.1), KeyMaterial.from_test_seed(seed)
    with scheme.embed(model, owner="pairs", material=material) as mark:
        fit(model, data, how, Course(3, seed, device="cpu"), mark=mark)
    fit(stranger, data, how, Course(3, seed + 100, device="cpu"))
    return Pair(start, model.eval(), mark.key, stranger.eval())


@pytest.fixture(scope="module", params=LAYERS)
def pairs(request: pytest.FixtureRequest) -> list[Pair]:
    data = load_data("digits").subset(train=400)
    return [made(request.param, seed, data) for seed in range(PAIRS)]


@pytest.mark.slow
def test_without_a_reference_the_mark_is_lost_and_with_one_every_bit_is_back(
    pairs: list[Pair],
) -> None:
    rates = []
    for pair in pairs:
        there = examine(pair.marked, pair.key, TERMS)
        worn = Permute().run(Rescale().run(pair.marked).model).model
        lost = examine(worn, pair.key, TERMS)
        assert there.owned
        assert lost.outcome == "not_proven"
        rates.append(lost.ber or 0)
        for suspect in (worn, Permute().run(Dummies("split").run(worn).model).model,
                        Fold().run(worn).model):  # fmt: skip
            back = examine(SuspectWithReference(suspect, pair.marked), pair.key, TERMS)
            assert back.owned, back.explain()
            assert back.matched == there.matched
    assert 0.45 < np.mean(rates) < 0.55
    assert 0.35 < min(rates) < max(rates) < 0.65


@pytest.mark.slow
def test_strangers_are_refused_by_a_marked_reference_and_read_like_a_coin_by_the_start(
    pairs: list[Pair],
) -> None:
    matched = []
    for pair in pairs:
        verdict = examine(SuspectWithReference(pair.stranger, pair.marked), pair.key, TERMS)
        assert verdict.outcome == "not_proven"
        assert "no copies of its own" in verdict.subject.reference.refused
        reference, scheme = Reference.from_module(pair.start), Uchida.from_fields(pair.key.fields)
        found = realign_suspect(ModuleWeights(pair.stranger), reference, pair.key.tensors)
        matched.append(scheme.extract(found.tensors, pair.key).match_count)
        assert not examine(SuspectWithReference(pair.stranger, pair.start), pair.key, TERMS).owned
    k = Pairs(np.array(matched), T, 0.5)
    assert k.claims(1e-3) == 0
    assert abs(k.k.mean() - T / 2) < 3 * np.sqrt(T / 4 / PAIRS)


@pytest.mark.slow
def test_the_start_brings_disguised_marks_back(pairs: list[Pair]) -> None:
    """Batch norms have no history there: what they say of scale is learnt."""
    for pair in pairs:
        worn = Permute().run(pair.marked).model
        back = examine(SuspectWithReference(worn, pair.start), pair.key, TERMS)
        assert back.owned, back.explain()
        assert back.null == "fair_coin"
