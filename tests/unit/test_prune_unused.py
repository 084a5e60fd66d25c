"""Pruning by use removes what no image of the thief's makes use of, and no answer with it."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import nn

from countermark.attacks.prune_unused import PruneUnused
from countermark.errors import ConfigError
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import build, recipe

DEAD = [3, 40]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits").subset(train=1000)


@pytest.fixture(scope="module")
def model(digits: Dataset) -> nn.Module:
    """An MLP of 64 hidden units, two of which never fire; no test may change it."""
    seed_torch(1, "init")
    built = build("mlp", {})
    fit(built, digits, recipe("mlp"), Course(4, seed=1, device="cpu"))
    with torch.no_grad():
        built.get_parameter("0.bias")[DEAD] = -1000.0
        built.get_parameter("2.weight")[:, DEAD] = 100.0  # what a mark could do there
    return built


def test_units_that_never_fire_go_and_every_answer_stays(model: nn.Module, digits: Dataset) -> None:
    before = copy.deepcopy(model.state_dict())
    attacked = PruneUnused().run(model, digits)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    images = digits.normalised(digits.train_images)
    with torch.no_grad():
        assert torch.allclose(attacked.model(images), model(images), atol=1e-5)
        fires = (cast(nn.Sequential, model)[:2](images) > 0).any(dim=0)  # (64,)
    incoming, outgoing = (attacked.model.get_parameter(f"{at}.weight") for at in (0, 2))
    assert not fires[DEAD].any()
    assert torch.equal((incoming != 0).any(dim=1), fires)
    assert torch.equal((outgoing != 0).any(dim=0), fires)
    assert (attacked.cost.epochs, attacked.cost.data_share) == (0.0, 1.0)


def test_the_least_used_go_first(digits: Dataset) -> None:
    seed_torch(2, "init")
    layer = nn.Linear(784, 10)
    attacked = PruneUnused(0.5, batch_size=1, rows=50).run(
        nn.Sequential(nn.Flatten(), layer), digits
    )
    images = digits.normalised(digits.train_images[:50]).flatten(1)
    use = layer.weight.detach().square() * images.square().sum(dim=0)  # (10, 784)
    gone = attacked.model.get_parameter("1.weight") == 0
    assert gone.sum() == 3920
    assert use[gone].max() <= use[~gone].min() * (1 + 1e-5)


def test_only_the_named_layers_change(model: nn.Module, digits: Dataset) -> None:
    attacked = PruneUnused(0.3, layers=("2.weight",)).run(model, digits).model
    assert torch.equal(attacked.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert not attacked.get_parameter("2.weight")[:, DEAD].any()


def test_it_is_repeated_exactly(model: nn.Module, digits: Dataset) -> None:
    one, two = (PruneUnused(0.5, rows=300).run(model, digits) for _ in range(2))
    assert one.cost.data_share == 0.3
    for name, each in one.model.state_dict().items():
        assert torch.equal(each, two.model.state_dict()[name])


def test_a_model_of_other_classes_can_be_pruned(digits: Dataset) -> None:
    assert PruneUnused(rows=100).run(nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), digits).model


def test_what_does_not_fit_is_one_line(model: nn.Module, digits: Dataset) -> None:
    with pytest.raises(ConfigError, match="rows is 5000, the data have 1000"):
        PruneUnused(rows=5000).run(model, digits)
    with pytest.raises(ConfigError, match=r"no tensor '2\.wieght'"):
        PruneUnused(layers=("2.wieght",)).run(model, digits)
    with pytest.raises(ConfigError, match="does not take images"):
        PruneUnused().run(nn.Linear(3, 3), digits)
    with pytest.raises(ConfigError, match="prune_unused trains and needs data"):
        PruneUnused().run(model)
