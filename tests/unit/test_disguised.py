"""Verdicts on suspects that are aligned to a reference before they are read."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from countermark.alignment import Reference, SuspectWithReference
from countermark.attacks.fine_tune import FineTune
from countermark.attacks.invariants import Dummies, Permute, Rescale
from countermark.checkpoints import save_weights
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import VerificationOptions
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.uchida.scheme import Uchida
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.verification.verify import examine, verify

TERMS = VerificationOptions(assume_dated=True, allow_test_key=True)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits").subset(train=1500)


@pytest.fixture(scope="module")
def hosts(digits: Dataset) -> dict[str, tuple[nn.Module, nn.Module, Key]]:
    """The weights that the mark began with, the marked model, the key; no test may change them."""
    found = {}
    for layer in ("0.weight", "2.weight"):
        seed_torch(1, "init")
        model = build("mlp", {})
        fit(model, digits, recipe("mlp"), Course(1, seed=1, device="cpu"))
        start, material = copy.deepcopy(model), KeyMaterial.from_test_seed(1)
        with Uchida(layer, 256, strength=0.5).embed(model, owner="A", material=material) as mark:
            fit(model, digits, recipe("mlp"), Course(4, seed=2, device="cpu"), mark=mark)
        found[layer] = (start, model.eval(), mark.key)
    return found


def disguised(model: nn.Module) -> nn.Module:
    for attack in (Dummies("split"), Dummies("clique", seed=1), Rescale(), Permute()):
        model = attack.run(model).model
    return model


@pytest.mark.parametrize("layer", ["0.weight", "2.weight"])
@pytest.mark.parametrize("marked_reference", [True, False], ids=["marked", "before the mark"])
def test_with_a_reference_every_bit_is_back(
    hosts: dict[str, tuple[nn.Module, nn.Module, Key]], layer: str, marked_reference: bool
) -> None:
    start, model, key = hosts[layer]
    suspect, reference = disguised(model), model if marked_reference else start
    lost = examine(Permute().run(Rescale().run(model).model).model, key, TERMS)
    assert 0.33 < (lost.ber or 0) < 0.6  # one or two of 64 units stay where they are
    assert examine(suspect, key, TERMS).outcome == "no_verdict"  # its shapes are gone, too
    verdict = examine(SuspectWithReference(suspect, reference), key, TERMS)
    assert verdict.owned, verdict.explain()
    there = examine(model, key, TERMS).matched or 0
    assert there > 240
    assert (verdict.matched or 0) >= (there if marked_reference else there - 5)
    assert verdict.null == ("aligned_coin" if marked_reference else "fair_coin")
    assert verdict.test_count == 1
    assert verdict.subject.reference.bears_mark is marked_reference
    assert any("put into the order and scale" in limit for limit in verdict.limits)


def test_a_reference_is_one_more_test_and_needs_a_date(
    hosts: dict[str, tuple[nn.Module, nn.Module, Key]], tmp_path: Path
) -> None:
    _, model, key = hosts["2.weight"]
    suspect = Permute().run(Rescale().run(model).model).model
    save_weights(model.state_dict(), tmp_path / "mine.safetensors")
    undated = examine(
        SuspectWithReference(suspect, tmp_path / "mine.safetensors"),
        key,
        VerificationOptions(allow_test_key=True),
    )
    assert undated.outcome == "no_verdict"
    assert "a reference can be made afterwards" in undated.reason
    assert (undated.test_count, undated.forgery_bits) == (2, 0.0)
    assert undated.matched == examine(model, key, TERMS).matched
    assert len(undated.subject.reference.sha256) == 64
    assert undated.subject.reference.sha256 in undated.explain()
    plain = examine(
        SuspectWithReference(model, model), key, VerificationOptions(allow_test_key=True)
    )
    assert plain.owned  # as it is, the suspect is read well enough: no reference was needed
    assert (plain.null, plain.test_count) == ("fair_coin", 2)


def test_a_reference_that_does_not_fit_is_said_and_counted(
    hosts: dict[str, tuple[nn.Module, nn.Module, Key]],
) -> None:
    _, model, key = hosts["2.weight"]
    verdict = examine(SuspectWithReference(model, build("lenet", {})), key, TERMS)
    assert verdict.owned
    assert verdict.test_count == 2
    assert any("could not be aligned" in each for each in verdict.limits)
    nothing = examine(SuspectWithReference(build("lenet", {}), model), key, TERMS)
    assert nothing.outcome == "no_verdict"
    assert "aligned: " in nothing.reason


def test_unmarked_models_are_not_claimed(
    hosts: dict[str, tuple[nn.Module, nn.Module, Key]],
) -> None:
    for layer, (start, model, key) in hosts.items():
        for reference in (start, model):
            torch.manual_seed(7)
            verdict = examine(SuspectWithReference(build("mlp", {}), reference), key, TERMS)
            assert verdict.outcome == "not_proven", (layer, verdict.explain())


def test_keys_that_are_not_linear_have_no_use_for_one() -> None:
    scheme = IndependentNetwork("2.weight", 64, units=(1,))
    with pytest.warns(UserWarning, match="64 bits"):
        key = scheme.generate_key({"2.weight": (10, 64)}, owner="A")
    with pytest.raises(ConfigError, match="a reference is for keys that read bits"):
        verify(SuspectWithReference(build("mlp", {}), build("mlp", {})), key)


def test_every_reference_of_a_chain_is_read_without_torch_modules(
    hosts: dict[str, tuple[nn.Module, nn.Module, Key]], tmp_path: Path
) -> None:
    _, model, key = hosts["2.weight"]
    for name, each in (("mine", model), ("suspect", disguised(model))):
        save_weights(each.state_dict(), tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("suspect", "mine")]
    by_name = examine(SuspectWithReference(files[0], files[1]), key, TERMS)
    traced = examine(
        SuspectWithReference(files[0], Reference.from_module(model, files[1])), key, TERMS
    )
    assert by_name.to_json() == traced.to_json()
    assert by_name.owned
    assert np.isclose(by_name.subject.reference.similarity, 1)


def test_few_values_that_differ_are_no_proof_of_a_copy(
    hosts: dict[str, tuple[nn.Module, nn.Module, Key]], digits: Dataset
) -> None:
    """Neurons before a marked first layer are known by 11 values each: copies to the digit only."""
    _, model, key = hosts["0.weight"]
    exact = examine(SuspectWithReference(disguised(model), model), key, TERMS)
    assert exact.owned
    tuned = FineTune(0.01, rows=500).run(model, digits).model
    refused = examine(SuspectWithReference(Permute().run(tuned).model, model), key, TERMS)
    assert "over 11 values" in refused.subject.reference.refused
    assert refused.outcome == "not_proven"
