"""The forms of schemes under contract, one row of facts each. A new scheme adds its rows here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn

from countermark.bench.data import load_data
from countermark.bench.models import build
from countermark.bench.train import seeded
from countermark.schemes.base import WeightScheme
from countermark.schemes.uchida import Uchida


@dataclass(frozen=True)
class Facts:
    """What the contract needs to know of one form of a scheme."""

    id: str
    scheme: WeightScheme
    epochs: int = 4
    accuracy_lost: float = 0.01  # share of test images, on 6,000 training digits
    other: Mapping[str, Any] = field(default_factory=lambda: {"strength": 0.02})


PUBLISHED: dict[str, Any] = {"regularizer": "bce", "strength": 0.1}

SCHEMES_UNDER_CONTRACT = [
    Facts("uchida-default", Uchida("2.weight", 256)),
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
]  # fmt: skip

every_form = pytest.mark.parametrize("facts", SCHEMES_UNDER_CONTRACT, ids=lambda facts: facts.id)


DATA = load_data("digits")
OWNER = "ACME Inc."


def fresh_host(seed: int = 1) -> nn.Module:
    """The host that everything here is embedded into, before training."""
    seeded(seed, "init")
    return build("mlp", {})
