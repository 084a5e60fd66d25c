"""Keys that are consistent in themselves, and that no scheme ever made: refused when used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keys import SHAPE, known_key, one_line
from safetensors.numpy import save

from countermark.checkpoints import SafetensorsWeights
from countermark.errors import ConfigError, CountermarkError
from countermark.keys.key import Key
from countermark.schemes import load_scheme
from countermark.verification.verify import read_suspect, verify

KEY = known_key()


@pytest.fixture(scope="module")
def suspect(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suspect") / "s.safetensors"
    path.write_bytes(save({"fc.weight": np.ones(SHAPE, dtype=np.float32)}))
    return path


def fields(**changes: object) -> dict[str, object]:
    return {**KEY.fields, **changes}


WITHOUT_BITS = {name: value for name, value in KEY.fields.items() if name != "bits"}


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "uchidb"},
        {"fields": {}},
        {"fields": WITHOUT_BITS},
        {"fields": fields(colour="red\n")},
        {"fields": fields(bits="256")},
        {"fields": fields(bits=None)},
        {"fields": fields(bits=0)},
        {"fields": fields(bits=-1)},
        {"fields": fields(bits=1025)},
        {"fields": fields(bits=1 << 40, over_capacity=True)},
        {"fields": fields(key_type="direct", bits=513)},
        {"fields": fields(key_type="diff", bits=257)},
        {"fields": fields(key_type="direct", over_capacity=True)},
        {"fields": fields(key_type="none")},
        {"fields": fields(strength=-1)},
        {"fields": fields(strength="0.01")},
        {"fields": fields(read=["tensor"])},
        {"fields": fields(layer=[1, {}])},
        {"fields": fields(over_capacity=True), "tensors": {}},
        {"tensors": {}},
        {"fields": fields(read="filter_mean"), "tensors": {"fc.weight": (512,)}},
        {"frozen": {"mask.fc.weight": np.zeros(512, dtype=np.uint8)}},
        {
            "fields": fields(over_capacity=True),
            "frozen": {"mask.fc.weight": np.zeros(512, dtype=np.uint8)},
        },
        {"frozen": {"mask.fc.weight": np.ones(511, dtype=np.uint8)}},
        {"frozen": {"mask.fc.weight": np.ones((16, 32), dtype=np.uint8)}},
    ],
    ids=range(25),
)
def test_a_key_that_no_scheme_made_is_refused_when_used(
    tmp_path: Path, suspect: Path, change: dict[str, Any]
) -> None:
    replace(KEY, **change).save(tmp_path / "a.key")
    key = Key.load(tmp_path / "a.key")
    with pytest.raises(ConfigError) as caught:
        verify(suspect, key)
    one_line(caught.value)
    with SafetensorsWeights(suspect) as weights, pytest.raises(CountermarkError):
        read_suspect(weights, key)


def test_a_mask_may_select_nothing_of_one_of_two_tensors() -> None:
    masks = {
        "mask.a": np.zeros(512, dtype=np.uint8),
        "mask.b": np.ones(512, dtype=np.uint8),
    }
    ones = {name: np.ones(SHAPE, dtype=np.float32) for name in ("a", "b")}
    for key_type in ("sign", "random", "direct", "diff"):
        key = replace(
            KEY,
            fields=fields(key_type=key_type, select="converged"),
            tensors=dict.fromkeys(ones, SHAPE),
            frozen=masks,
        )
        assert load_scheme(key).extract(ones, key).bits == 256
