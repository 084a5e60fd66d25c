"""Overwriting puts the thief's marks into the copy; retraining makes another model of it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from countermark.attacks.overwrite import Overwrite
from countermark.attacks.retrain import Retrain
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import VerificationOptions
from countermark.schemes.uchida.scheme import Uchida
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, accuracy, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.verification.verify import examine, read_suspect

MARK = {"layer": "2.weight", "bits": 128, "strength": 1.0}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits").subset(train=2000)


@pytest.fixture(scope="module")
def marked(digits: Dataset) -> tuple[nn.Module, Key]:
    """An owner's model; no test may change it."""
    seed_torch(1, "init")
    model = build("mlp", {})
    material = KeyMaterial.from_test_seed(1)
    with Uchida("2.weight", 256).embed(model, owner="ACME Inc.", material=material) as mark:
        fit(model, digits, recipe("mlp"), Course(6, seed=1, device="cpu"), mark=mark)
    return model, mark.key


@pytest.mark.parametrize("times", [1, 3])
def test_the_thief_reads_his_last_mark(
    marked: tuple[nn.Module, Key], digits: Dataset, times: int
) -> None:
    model, owners = marked
    stolen = copy.deepcopy(model)
    attack = Overwrite(lr=0.003, epochs=2, mark=MARK, times=times)
    keys, share = attack.embed_marks(stolen, digits)
    assert share == 1.0
    assert len({key.commitment for key in keys}) == times
    assert read_suspect(stolen, keys[-1]).match_count == 128
    assert read_suspect(model, keys[-1]).match_count < 100  # and not before
    assert all(key.owner == "thief" and key.test_key for key in keys)
    terms = VerificationOptions(assume_dated=True, allow_test_key=True)
    assert examine(stolen, owners, terms).matched <= examine(model, owners, terms).matched


def test_an_attack_is_repeated_exactly(marked: tuple[nn.Module, Key], digits: Dataset) -> None:
    attack = Overwrite(rows=500, mark=MARK)
    one, two = (attack.run(marked[0], digits) for _ in range(2))
    other = replace(attack, seed=1).run(marked[0], digits)
    assert one.cost.epochs == 1
    assert one.cost.data_share == 0.25
    weights = [each.model.get_parameter("2.weight") for each in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_thief_can_take_another_scheme(marked: tuple[nn.Module, Key], digits: Dataset) -> None:
    fields = {"layer": "2.weight", "bits": 128, "as_published": True}
    attack = Overwrite(epochs=4, scheme="independent_network", mark=fields)
    stolen = copy.deepcopy(marked[0])
    (key,), _ = attack.embed_marks(stolen, digits)
    assert read_suspect(stolen, key).match_count == 128


def test_what_does_not_fit_is_one_line(marked: tuple[nn.Module, Key], digits: Dataset) -> None:
    with pytest.raises(ConfigError, match="overwrite needs 'mark'"):
        Overwrite.from_fields({})
    for mark in ({"layer": "7.weight"}, {"layer": "2.weight", "bit": 3}):
        with pytest.raises(ConfigError) as caught:
            Overwrite(mark=mark).run(marked[0], digits)
        assert "\n" not in str(caught.value)


def test_retraining_wins(marked: tuple[nn.Module, Key], digits: Dataset) -> None:
    model, key = marked
    flipped = replace(
        digits, train_images=digits.train_images.flip(2), test_images=digits.test_images.flip(2)
    )
    retrained = Retrain(lr=0.03, epochs=12).run(model, flipped)
    assert accuracy(retrained.model, flipped) > accuracy(model, flipped) + 0.15
    assert retrained.cost.epochs == 12
    moved = retrained.model.get_parameter("2.weight") - model.get_parameter("2.weight")
    assert moved.norm() > model.get_parameter("2.weight").norm()
    terms = VerificationOptions(assume_dated=True, allow_test_key=True)
    before, after = (examine(each, key, terms) for each in (model, retrained.model))
    assert before.owned
    assert (after.matched or 0) < (before.matched or 0)
