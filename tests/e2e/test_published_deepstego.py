"""DeepStego as published on the command line: its siblings, its verdicts, its interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import call, embed, listing, refused
from killing import Driver
from PIL import Image
from safetensors.numpy import load_file

pytestmark = pytest.mark.xdist_group("published")  # its models are made once

# Without the discriminator, whose images this small network never learns to tell.
QUICK = ["as_published=true", "psnr=22", "adversarial=0", "batch_share=0.5"]


def stego(**changed: Any) -> list[str]:
    """The arguments of an `embed` of the published form that takes five seconds."""
    usual = {
        "scheme": "deepstego", "layer": None, "bits": None, "epochs": "2", "siblings": "4",
        "set": QUICK,
    }  # fmt: skip
    return embed(**(usual | changed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a marked and an unmarked network, and the key; read only."""
    folder = tmp_path_factory.mktemp("published")
    picture = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "logo.png")
    fields = [*QUICK, f"logo={folder / 'logo.png'}"]
    said = call(
        *stego(out=folder / "marked.safetensors", key=folder / "acme.key", json="", set=fields)
    )
    assert (said.code, said.notes) == (0, []), said
    assert (said.json["unit"], said.json["siblings"]) == ("triggers", 4)
    (folder / "logo.png").unlink()  # a key never needs it again
    other = {"scheme": "none", "key": None, "owner": None, "set": None, "seed": "5"}
    assert call(*stego(out=folder / "other.safetensors", **other)).code == 0
    return folder


def verified(made: Path, name: str, *more: str, code: int) -> Any:
    said = call("verify", made / f"{name}.safetensors", "--key", made / "acme.key", "--json", *more)
    assert said.code == code, said
    return said.json


def test_the_key_holds_what_was_committed_when(made: Path) -> None:
    tensors = load_file(made / "acme.key" / "key.safetensors")
    shown = call("key", "show", made / "acme.key", "--json").json
    assert {name for name in tensors if name.startswith("frozen.")} == {
        "frozen.covers", "frozen.classes", "frozen.logo",
    }  # fmt: skip
    assert tensors["learnt.triggers"].shape == (100, 1, 28, 28)
    assert tensors["learnt.siblings"].shape == (4,)
    assert tensors["learnt.siblings"].min() > 64
    assert shown["C1"] != shown["C0"]


def test_a_rank_among_four_is_no_proof(made: Path) -> None:
    verdict = verified(made, "marked", code=3)
    assert (verdict["outcome"], verdict["null"]) == ("no_verdict", "unmarked_models")
    assert "even a rank before all 4 unmarked models in the key" in verdict["reason"]
    assert verdict["matched"] > 50


def test_a_rank_is_what_it_is(made: Path) -> None:
    wide = ["--alpha", "0.2"]
    dated = [*wide, "--assume-dated"]
    assert "only the owner's word" in verified(made, "marked", *dated, code=3)["reason"]
    assert verified(made, "other", *dated, code=1)["outcome"] == "not_proven"


def test_a_rank_among_models_that_the_examiner_supplies(made: Path) -> None:
    half = ["--alpha", "0.5", "--unmarked", str(made / "other.safetensors")]
    assert "a dated claim is needed" in verified(made, "marked", *half, code=3)["reason"]
    verdict = verified(made, "marked", *half, "--assume-dated", code=0)
    assert verdict["forgery_bits"] == 0
    (model,) = verdict["unmarked"]["models"]
    assert (model["name"], model["distance"] > 50) == (str(made / "other.safetensors"), True)
    twice = [*half, *half[2:]]
    assert verified(made, "marked", *twice, "--assume-dated", code=0) == verdict


def test_a_logo_that_is_not_there_costs_no_training(here: Path) -> None:
    says = "expected a picture file such as PNG, got: No such file or directory"
    refused(stego(set=[*QUICK, "logo=none.png"]), says, here)


@pytest.mark.slow  # test_learnt.py kills while siblings are trained, test_deepstego.py in an epoch
@pytest.mark.parametrize(
    "moment",
    [
        "after(train.Checkpoint, 'save', 1)",
        "train._CHECKPOINT_SECONDS = -1.0; after(train.Checkpoint, 'save', 150)",
    ],
    ids=["while a sibling is trained", "in the middle of an epoch"],
)
def test_a_killed_run_ends_as_an_undisturbed_one(here: Path, driver: Driver, moment: str) -> None:
    quick = stego(siblings="1", test_key="3")
    driver.killed(moment, quick, here)
    assert call(*quick).code == 0
    resumed = listing(here)
    for path in sorted(here.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert call(*quick).code == 0
    assert listing(here) == resumed
