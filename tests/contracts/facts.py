"""The forms of schemes under contract, one row of facts each. A new scheme adds its rows here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pytest
from torch import nn

from countermark.keys.key import Key, KeyMaterial
from countermark.schemes import load_scheme
from countermark.schemes.hash_filter.scheme import HashFilter
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.weights import WeightScheme
from countermark.training.data import load_data
from countermark.training.loop import seed_torch
from countermark.training.models import build

_Way = TypeVar("_Way")


@dataclass(frozen=True)
class Facts:
    """What the contract needs to know of one form of a scheme."""

    id: str
    scheme: WeightScheme
    epochs: int = 4
    accuracy_lost: float = 0.01  # share of test images, on 6,000 training digits
    other: Mapping[str, Any] = field(default_factory=lambda: {"strength": 0.02})
    outcome: str = "owned"  # of the marked model itself

    @property
    def learnt(self) -> bool:
        """Whether a reader is trained; its null costs 1/alpha readings, so tests ask for less."""
        return not self.scheme.linear

    @property
    def terms(self) -> dict[str, Any]:
        return {"alpha": 1e-3, "assume_dated": True} if self.learnt else {}


PUBLISHED: dict[str, Any] = {"regularizer": "bce", "strength": 0.1}
EARLY_MANU: dict[str, Any] = {
    "mode": "manu", "convergence_std": 0.03, "convergence_epochs": 2, "start_epoch": 2,
}  # fmt: skip

SCHEMES_UNDER_CONTRACT = [
    Facts("uchida-default", Uchida("2.weight", 256), accuracy_lost=0.02),
    Facts("uchida-bce", Uchida("2.weight", 256, regularizer="bce"), accuracy_lost=0.03),
    Facts("uchida-random", Uchida("2.weight", 256, key_type="random", **PUBLISHED), 4, 0.03),
    Facts("uchida-direct", Uchida("2.weight", 256, key_type="direct", **PUBLISHED), 4, 0.03),
    Facts("uchida-diff", Uchida("2.weight", 256, key_type="diff", **PUBLISHED), 4, 0.03),
    Facts("uchida-filter-mean", Uchida("0.weight", 256, read="filter_mean")),
    Facts("uchida-two-layers", Uchida(("0.weight", "2.weight"), 256)),
    Facts(
        "uchida-converged",
        Uchida(
            "2.weight", 128, select="converged", convergence_std=0.03, convergence_epochs=2,
            start_epoch=2,
        ),
        epochs=6,
        other={"convergence_std": 0.029},
    ),
    Facts("stamp", Stamp("0.weight", 256, margin=3.0)),
    Facts("hash-filter", HashFilter("0.weight", 256), other={"rounds": 3}),
    Facts("network-auto", IndependentNetwork("2.weight", 256), epochs=6),
    Facts("network-manu", IndependentNetwork("2.weight", 256, **EARLY_MANU), epochs=8),
    # Same-seed twins read as well as the marked host itself: nothing tells them apart.
    Facts(
        "network-auto-published", IndependentNetwork("2.weight", 256, as_published=True),
        outcome="no_verdict",
    ),
    Facts(
        "network-manu-published",
        IndependentNetwork("2.weight", 256, as_published=True, **EARLY_MANU), epochs=8,
        outcome="no_verdict",
    ),
]  # fmt: skip

every_form = pytest.mark.parametrize("facts", SCHEMES_UNDER_CONTRACT, ids=lambda facts: facts.id)


DATA = load_data("digits")
OWNER = "ACME Inc."


def fresh_host(seed: int = 1) -> nn.Module:
    """The host that everything here is embedded into, before training."""
    seed_torch(seed, "init")
    return build("mlp", {})


def material_of(facts: Facts) -> KeyMaterial:
    """A secret that is the same in every run, of a key that counts as a real one."""
    drawn = hashlib.sha512(facts.id.encode()).digest()
    return KeyMaterial(drawn[:32], drawn[32:48])


def foreign_key(facts: Facts, key: Key, number: int) -> Key:
    """A key of the same form and frozen tensors with another secret; its reader is untrained."""
    scheme = load_scheme(key)
    material = KeyMaterial.from_test_seed(number)
    other = scheme.generate_key(key.tensors, owner=OWNER, material=material, frozen=key.frozen)
    start = {name: np.zeros(shape, np.float32) for name, shape in key.tensors.items()}
    return replace(
        other,
        learnt=scheme.load_training_class()(scheme, other, [start]).export_post_commit_tensors(),
    )


def covering(ways: Sequence[_Way]) -> list[tuple[Facts, _Way]]:
    """Every form once and every way once; the first form in every way."""
    return [
        (facts, way)
        for at, facts in enumerate(SCHEMES_UNDER_CONTRACT)
        for number, way in enumerate(ways)
        if at == 0 or number == at % len(ways)
    ]
