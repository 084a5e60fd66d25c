"""An `embed` that cannot be right ends with exit 2, one line that says why, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from cli_calls import embed, refused

EMBED: list[tuple[dict[str, Any], str]] = [
    # names
    ({"layer": "2.weigth"}, "nearest is '2.weight'"),
    ({"scheme": "uchda"}, "nearest is 'uchida'"),
    ({"model": "mpl"}, "nearest is 'mlp'"),
    ({"model": "no_such_module:build"}, "cannot import 'no_such_module'"),
    ({"model": "json:dumsp"}, "module 'json' has no factory 'dumsp'"),
    ({"model": "json:dumps"}, "json:dumps"),
    ({"data": "digit"}, "no data directory 'digit'"),
    ({"set": "strenght=1"}, "nearest is 'strength'"),
    ({"model_arg": "depth=3"}, "it takes in_features, hidden, classes"),
    ({"precision": "fp16"}, "expected fp32 or bf16"),
    ({"device": "gpu"}, "expected auto, cpu, cuda"),
    # values
    ({"set": "strength"}, "expected NAME=VALUE"),
    ({"set": "=1"}, "expected NAME=VALUE"),
    ({"set": ["strength=1", "strength=2"]}, "each name once"),
    ({"set": "strength=-1"}, "greater than 0"),
    ({"set": "strength=NaN"}, "field strength is nan"),
    ({"set": "key_type=gaussian"}, "field key_type is 'gaussian'"),
    ({"bits": "0"}, "expected 1 to 1,048,576"),
    ({"set": "strength=1e38"}, "expected above 0 to 1,000,000,000"),
    ({"bits": "many"}, "'--bits'"),
    ({"epochs": "0"}, "'--epochs'"),
    # what does not fit
    ({"bits": "1281"}, "at most 1280"),
    ({"bits": "641", "set": "key_type=direct"}, "at most 640"),
    ({"bits": "321", "set": "key_type=diff"}, "at most 320"),
    ({"model_arg": "classes=5"}, "digits has 10 classes"),
    ({"model_arg": "in_features=100"}, "does not take images of shape (1, 28, 28)"),
    ({"start": "narrow.safetensors"}, "0.weight needs shape [64, 784], found [8, 784]"),
    ({"teacher": "narrow.safetensors"}, "narrow.safetensors does not fit the model"),
    ({"start": "absent.safetensors"}, "absent.safetensors cannot be read"),
    ({"start": "cut.safetensors"}, "cut.safetensors is damaged"),
    # what is missing or in the way
    ({"owner": None}, "a mark needs an owner"),
    ({"key": None}, "a mark needs a place for its key"),
    ({"layer": None}, "uchida needs 'layer'"),
    ({"out": None}, "Missing option '--out'"),
    ({"key": "acme.key"}, "acme.key exists, and a key is never overwritten"),
    ({"out": "m.safetensors"}, "m.safetensors exists"),
    ({"out": "new.pt"}, "what is written is safetensors"),
    ({"bits": "64", "set": "bits=32"}, "--bits and --set bits: give one"),
    ({"out": "same", "key": "same"}, "a key never lies there"),
    ({"out": "m", "key": "m/k.key"}, "a key never lies there"),
    ({"key": "m.safetensors/k"}, "is no folder"),
    ({"out": "empty/new.safetensors"}, "empty"),
    ({"out": "folder"}, "belongs to no interrupted run"),
    ({"encrypt": ""}, "--encrypt needs a passphrase"),
    # what shows only while it trains: the resume folder goes as well
    ({"set": "strength=1e-9"}, "bits are in the model"),
    ({"set": "select=converged"}, "the mark never began"),
    (
        {
            "epochs": "3",
            "set": [
                "select=converged", "start_epoch=2", "convergence_epochs=2", "convergence_std=1e-12"
            ],
        },
        "256 bits do not fit",  # into the few weights that stand still
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "says"), EMBED, ids=[says for _, says in EMBED])
def test_embed_refuses(stocked: Path, changed: dict[str, Any], says: str) -> None:
    refused(embed(**changed), says, stocked)


# --- data and hosts that do not fit each other


def pictures(folder: Path, *shape: int) -> str:
    """A folder of 8 training and 2 test images of this shape, in two classes."""
    draw = np.random.default_rng(3)
    for split, count in (("train", 4), ("test", 1)):
        for name in ("ant", "bee"):
            place = folder / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, shape, dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(place / f"{number}.png")
    return str(folder / "data")


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((28, 28, 3), "does not take images of shape (3, 28, 28)"),
        ((28, 28), "8 training images: expected at least one batch of 32"),
    ],
)
def test_a_data_set_must_fit_the_host(
    here: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    says: str,
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    refused(embed(data=pictures(here, *shape)), says, here)


FOREIGN = """
from torch import nn

class Answers(nn.Linear):
    def forward(self, images):
        return {"scores": super().forward(images.flatten(1))}

class Trips(nn.Linear):
    def forward(self, images):
        raise KeyError("logits")

def answers():
    return Answers(784, 10)

def trips():
    return Trips(784, 10)
"""


@pytest.mark.parametrize(
    ("factory", "says"), [("answers", "answers with a dict"), ("trips", "does not take images")]
)
def test_a_foreign_model_must_answer_with_scores(
    here: Path, monkeypatch: pytest.MonkeyPatch, factory: str, says: str
) -> None:
    (here / "foreign_models.py").write_text(FOREIGN, encoding="utf-8")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.syspath_prepend(here)
    refused(embed(model=f"foreign_models:{factory}", layer="weight"), says, here)
