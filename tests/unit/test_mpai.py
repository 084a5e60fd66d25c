"""The evaluation of MPAI-NNW counts what it says, on as many networks as it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from countermark.errors import ConfigError
from countermark_lab.mpai import run
from countermark_lab.mpai.classifiers import ClassifierTechnology
from countermark_lab.mpai.images import ImageTechnology
from countermark_lab.mpai.page import render_evaluation
from countermark_lab.mpai.trial import Trial

TINY: dict[str, Any] = {"train": 600, "epochs": 3}
FIELDS = {"layer": "2.weight", "bits": 128, "strength": 1.0}


@pytest.fixture(scope="module")
def done() -> dict[str, Any]:
    chosen = [("noise", {"std": 0.1}), ("permute", {}), ("prune", {"fraction": 1.0})]
    return run(
        Trial("uchida", FIELDS, networks=2, payloads=2, modifications=chosen, alpha=1e-3, **TINY)
    )


def test_every_network_is_modified_and_judged(done: dict[str, Any]) -> None:
    rows = {row["modification"]: row for row in done["robustness"]}
    assert list(rows) == ["none", "noise", "permute", "prune"]
    assert all(row["networks"] == 6 and row["false_positives"] == 0 for row in rows.values())
    assert [rows[name]["false_negatives"] for name in rows] == [0, 0, 4, 4]
    assert rows["none"]["symbol_error_rate"] < 0.2
    assert 0.35 < rows["permute"]["symbol_error_rate"] < 0.65
    assert rows["permute"]["accuracy"] == pytest.approx(rows["none"]["accuracy"], abs=0.3)
    assert rows["prune"]["accuracy"] < 20 < done["imperceptibility"]["accuracy_marked"]
    assert all(done["cost"][name] > 0 for name in done["cost"])
    assert done["trial"]["modifications"][0] == {"attack": "noise", "std": 0.1}


def test_the_page_has_a_line_for_each_modification(done: dict[str, Any]) -> None:
    lines = render_evaluation(done).splitlines()
    made = done["provenance"]
    assert lines[1].endswith(f"torch {made['torch']}, {made['device']}, {made['date']}.")
    assert len(lines) == 5 + 4
    assert "× the CPU time of the unmarked training" in lines[1]
    assert lines[-1].startswith("| prune fraction 1.0 | 0 of 2 | 4 of 4 | ")


def test_a_scheme_that_needs_siblings_gets_them() -> None:
    fields = {"layer": "2.weight", "bits": 128, "hidden": 32, "settling": 20}
    trial = Trial(
        "independent_network", fields, networks=1, payloads=1, siblings=3, alpha=1e-2,
        modifications=[("noise", {"std": 0.1})], **TINY,
    )  # fmt: skip
    done = run(trial)
    assert [row["networks"] for row in done["robustness"]] == [2, 2]
    assert done["robustness"][0]["symbol_error_rate"] < 0.1


OF_IMAGES = {"bits": 100, "side": 32, "sizes": "tiny", "steps": 3, "batch": 4, "task": "denoise"}


def of_images(**more: Any) -> Trial:
    return Trial(
        "deep_watermarking", OF_IMAGES | more, train=32, epochs=1, networks=1, payloads=2,
        siblings=2, alpha=1e-3,
    )  # fmt: skip


def test_networks_that_make_images_are_judged_by_their_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("countermark_lab.mpai.images._TEST", 20)
    done = run(of_images(), ["prune", "fine_tune", "imitate"])
    names = [row["modification"] for row in done["robustness"]]
    assert names == ["none", "prune", "prune", "fine_tune", "imitate"]
    for row in done["robustness"]:
        assert (row["networks"], row["false_positives"]) == (3, 0)
        assert 0.2 < row["symbol_error_rate"] < 0.8  # nobody learns anything in 2 steps
        assert 5 < row["psnr"] < 60
    assert (done["trial"]["model"], done["trial"]["data"]) == ("unet", "drawn")
    assert "| imitate epochs 3 | 0 of 1 | " in render_evaluation(done)
    assert render_evaluation(done).splitlines()[1].startswith("PSNR ")


def test_a_thief_of_images_works_on_a_copy() -> None:
    trial = replace(of_images(), model="unet", data="drawn")
    technology = ImageTechnology(trial)
    network = technology.mark_network(0)
    one, other = network.marked
    assert network.keys[0].c0 != network.keys[1].c0
    before = {name: each.clone() for name, each in one.state_dict().items()}
    pruned = technology.modify_network(one, "prune", {"fraction": 1.0})
    tuned = technology.modify_network(one, "fine_tune", {"epochs": 1})
    copied = technology.modify_network(one, "imitate", {"epochs": 1})
    assert all(torch.equal(each, before[name]) for name, each in one.state_dict().items())
    assert not any(each.any() for each in pruned.parameters() if each.dim() > 1)
    weights = [next(each.parameters()) for each in (one, other, tuned, copied, network.plain)]
    for at, each in enumerate(weights):
        assert not any(torch.equal(each, more) for more in weights[:at])
    again = technology.modify_network(one, "fine_tune", {"epochs": 1})
    assert torch.equal(next(again.parameters()), weights[2])


def test_what_cannot_be_evaluated_is_said() -> None:
    with pytest.raises(ConfigError, match="at least one network"):
        run(Trial("uchida", FIELDS, networks=0))
    assert {name for name, _ in ClassifierTechnology.modifications} >= {
        "noise",
        "prune",
        "quantise",
    }
    with pytest.raises(ConfigError, match="--only melt: expected noise, quantise"):
        run(of_images(), ["melt"])
    with pytest.raises(ConfigError, match="what shall the network do"):
        run(of_images(task=""))
    with pytest.raises(ConfigError, match="evaluated in unet"):
        run(replace(of_images(), model="mlp"))
