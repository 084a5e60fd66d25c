"""The null of marks in answers on MNIST, CIFAR-10 and CIFAR-100, with the cached unmarked hosts.

Five tasks of 2, 10 and 100 classes, every form of the trigger schemes, a fresh key for each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from false_claims import FORMS, asked, check, form, keys_of, stego_frozen, stego_keys

from countermark.predictors.base import Predictor, make_module_predictor
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, accuracy, fit, seed_torch
from countermark.training.models import build, recipe
from countermark_lab.hosts.model_zoo import CACHE, HostSpec, train_hosts

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
MNIST, CIFAR10 = str(SHARED / "ylecun" / "mnist"), str(SHARED / "uoft-cs" / "cifar10")
CIFAR100 = str(SHARED / "uoft-cs" / "cifar100")
ROWS = (0, 10_000)
VEHICLES = torch.tensor([0, 1, 8, 9])  # airplane, automobile, ship, truck
PAIRS = 400  # of a form and a task
Suspects = tuple[Dataset, list[Predictor]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # hosts that the cache lacks are trained
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED}"),
]


@cache
def first_rows(name: str) -> Dataset:
    return load_data(name).subset(ROWS[1], 1000)


def of_the_zoo(name: str, least: float, specs: Sequence[HostSpec]) -> Suspects:
    """Hosts that lie in the cache or are trained into it."""
    data, found = first_rows(name), []
    for spec, arrays in train_hosts(specs, ROOT / CACHE):
        model = build(spec.model, dict(spec.arguments))
        model.load_state_dict({each: torch.from_numpy(array) for each, array in arrays.items()})
        assert accuracy(model, data) > least
        found.append(make_module_predictor(model, *data.scale))
    return data, found


def of_two_classes(name: str, first: torch.Tensor, models: dict[str, dict[str, Any]]) -> Suspects:
    """Hosts that tell these classes from the others, which the zoo does not know."""
    whole = first_rows(name)
    train, test = (torch.isin(e, first).long() for e in (whole.train_labels, whole.test_labels))
    data, found = replace(whole, train_labels=train, test_labels=test, classes=2), []
    for seed, (model, arguments) in enumerate(models.items()):
        seed_torch(seed, "unmarked host")
        host = build(model, arguments)
        fit(host, data, recipe(model), Course(2, seed))
        assert accuracy(host, data) > 0.65
        found.append(make_module_predictor(host, *data.scale))
    return data, found


def convolutional(name: str, classes: int, epochs: int) -> list[HostSpec]:
    """A LeNet, a ResNet-18 and a VGG16 for colour images, the last two narrow."""
    models = {"lenet": {"channels": 3}, "resnet18": {"width": 0.125}, "vgg16": {"width": 0.125}}
    return [
        HostSpec(
            name, seed, epochs=epochs, rows=ROWS, model=model,
            arguments=tuple(sorted((arguments | {"classes": classes}).items())),
        )
        for seed, (model, arguments) in enumerate(models.items())
    ]  # fmt: skip


def mnist() -> list[HostSpec]:
    plain = [HostSpec(MNIST, seed, epochs=1 + seed % 3, rows=ROWS) for seed in range(8)]
    lenet = HostSpec(MNIST, 8, epochs=2, rows=ROWS, model="lenet")
    return [*plain, lenet]


TASKS: dict[str, Callable[[], Suspects]] = {
    "MNIST, odd or even": lambda: of_two_classes(
        MNIST, torch.arange(1, 10, 2), {"mlp": {"classes": 2}, "lenet": {"classes": 2}}
    ),
    "CIFAR-10, vehicle or animal": lambda: of_two_classes(
        CIFAR10, VEHICLES,
        {"lenet": {"classes": 2, "channels": 3}, "resnet18": {"classes": 2, "width": 0.125}},
    ),
    "MNIST": lambda: of_the_zoo(MNIST, 0.8, mnist()),
    "CIFAR-10": lambda: of_the_zoo(CIFAR10, 0.25, convolutional(CIFAR10, 10, 3)),
    "CIFAR-100": lambda: of_the_zoo(CIFAR100, 0.04, convolutional(CIFAR100, 100, 6)),
}  # fmt: skip


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> Suspects:
    return TASKS[request.param]()


@pytest.mark.parametrize("name", FORMS)
def test_unmarked_models_get_labels_by_chance(task: Suspects, name: str) -> None:
    data, suspects = task
    scheme = form(name, data)
    if isinstance(scheme, DeepStego):
        keys = stego_keys(scheme, stego_frozen(scheme, data, made=1000))
    else:
        keys = keys_of(scheme, data)
    check(asked(keys, suspects, PAIRS))
