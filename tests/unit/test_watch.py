"""What is watched of the weights: trajectories, convergence, the gate beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.training.data import load_data
from countermark.training.loop import Checkpoint, Course, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.training.weight_history import TensorWatch


def watched(*epochs: list[float]) -> TensorWatch:
    layer = nn.Linear(len(epochs[0]), 1)
    watch = TensorWatch("weight")
    for values in epochs:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([values]))
        watch.end_epoch(layer)
    return watch


def test_a_histogram_has_bins_of_a_tenth() -> None:
    figures = watched([-0.25, -0.05, 0.05, 0.06, 0.19]).summarise_epochs(None)
    # Bins −3, −1, 0, 0, 1: that of −.2 to −.1 is empty.
    assert figures["histogram"] == {"first": -3, "counts": [1, 0, 1, 2, 1]}


def test_a_weight_converges_when_its_last_five_values_hardly_differ() -> None:
    steps = [[0.0, 0.001 * epoch, 0.1 * epoch, float(epoch == 0)] for epoch in range(7)]
    figures = watched(*steps).summarise_epochs(None)
    assert figures["converged"] == [0.5, 0.75, 0.75]  # after 5, 6 and 7 epochs
    assert figures["trajectories"][0] == [0.0] * 7
    assert "gate" not in figures


@pytest.fixture(scope="module")
def key() -> Key:
    return trained(TensorWatch("2.weight"))[1]


def trained(watch: TensorWatch, checkpoint: Checkpoint | None = None) -> tuple[nn.Module, Key]:
    data = load_data("digits").subset(train=320)
    seed_torch(1, "init")
    model = build("mlp", {})
    scheme = IndependentNetwork("2.weight", 128, as_published=True)
    with scheme.embed(model, owner="A", material=KeyMaterial.from_test_seed(1)) as mark:
        course = Course(7, seed=1, device="cpu", watch=watch)
        fit(model, data, recipe("mlp"), course, mark=mark, checkpoint=checkpoint)
    assert mark.drawn_key is not None
    return model, mark.drawn_key


def test_the_gate_stands_beside_the_deviations() -> None:
    watch = TensorWatch("2.weight")
    model, key = trained(watch)
    figures = watch.summarise_epochs(key)
    assert figures["gate"] == pytest.approx(np.abs(key.learnt["reader.gate"]), rel=1e-3)
    seen = torch.stack(watch.get_state()).double()  # (7, 640)
    assert torch.equal(seen[-1].float(), model.get_parameter("2.weight").flatten())
    assert figures["late"] == pytest.approx(seen[2:7].std(0).numpy(), rel=1e-3, abs=1e-9)
    assert figures["early"] == pytest.approx(seen[1:6].std(0).numpy(), rel=1e-3, abs=1e-9)


def test_a_frozen_gate_is_not_shown(key: Key) -> None:
    watch = watched(*[[0.1, 0.2]] * 7)
    assert "gate" not in watch.summarise_epochs(
        replace(key, frozen={"mask.2.weight": np.ones(640, "u1")})
    )


def test_an_interrupted_watch_goes_on() -> None:
    whole = watched([0.1, 0.2], [0.2, 0.2], [0.3, 0.2])
    first = watched([0.1, 0.2], [0.2, 0.2])
    second = watched([0.3, 0.2])
    second.restore([*first.get_state(), *second.get_state()])
    assert second.summarise_epochs(None) == whole.summarise_epochs(None)
