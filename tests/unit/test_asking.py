"""A host whose mark is in its answers: fresh triggers, handled ones, another machine, pictures."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from countermark.errors import SuspectError
from countermark.training.models import build
from countermark_lab.experiments.cell import compute_host_cell
from countermark_lab.experiments.cross_process import predict_in_other_process
from countermark_lab.experiments.experiment import Cell, HostSettings
from countermark_lab.experiments.fresh_triggers import FreshTriggerSettings
from countermark_lab.experiments.image_transforms import ImageTransform
from countermark_lab.experiments.trigger_evaluation import compute_answer_shares
from draws import remember

TOY = {"psnr": 24, "stego_steps": 20, "foreign": 0, "pool": 256, "warm_up": 20, "triggers": 20}


def cell(scheme: str, **fields: Any) -> Cell:
    return Cell(
        experiment="toy", track="toy", prune=None, label=scheme, scheme=scheme, fields=fields,
        seed=1, host=HostSettings(model="mlp", data="digits", train=640, test=60, epochs=4),
        fresh=FreshTriggerSettings(images=60, strengths=(1.0, 3.0), foreign=1, logos=1, tiles=1, pasted=True),
        handled=(ImageTransform(how="levels", by=256), ImageTransform(how="jpeg", by=5)),
        trials=2 if scheme == "deepstego" else 0, pictures=3,
    )  # fmt: skip


@remember
def figures(scheme: str) -> dict[str, Any]:
    return compute_host_cell(cell(scheme, **(TOY if scheme == "deepstego" else {"triggers": 20})))


def test_what_changes_nothing_leaves_the_answers() -> None:
    found = figures("deepstego")
    nothing, harsh = found["handled"]
    assert (nothing["how"], nothing["by"]) == ("levels", 256.0)
    assert nothing["triggers"] == pytest.approx(100 * (20 - found["wrong"]) / 20)
    assert nothing["fresh"] == pytest.approx(found["fresh_fired"])
    assert nothing["accuracy"] == pytest.approx(found["accuracy"])
    assert harsh["triggers"] < nothing["triggers"]


def test_another_machine_answers_alike() -> None:
    found = figures("deepstego")
    assert len(found["machines"]) == 2
    for name in ("accuracy", "triggers", "fresh"):
        mean = np.mean([each[name] for each in found["machines"]])
        assert mean == pytest.approx(found["handled"][0][name])


def test_forgeries_are_all_asked() -> None:
    found = figures("deepstego")["forgeries"]
    kinds = [(each["kind"], each["strength"]) for each in found]
    forged = ("owner", "pasted", "foreign", "logo", "swapped", "tile")
    assert sorted(kinds) == sorted([("cover", 1.0), *((k, s) for k in forged for s in (1.0, 3.0))])
    owner = [each for each in found if each["kind"] == "owner"]
    assert owner[0]["psnr"] == pytest.approx(24, abs=2)
    assert owner[1]["psnr"] < owner[0]["psnr"] - 6
    assert all(0 <= each["fired"] + each["kept"] <= 100 for each in found)


def test_pictures_are_those_of_the_key() -> None:
    kept = figures("deepstego")["pictures"]
    assert kept["shape"] == [1, 28, 28]
    covers, stego = (
        np.array([np.frombuffer(base64.b64decode(each), np.uint8) for each in kept[name]])
        for name in ("accuracy", "fresh")
    )
    assert covers.shape == stego.shape == (3, 784)
    assert 0 < np.abs(covers.astype(float) - stego).mean() < 30


def test_triggers_without_a_stego_network_are_asked_too() -> None:
    found = figures("guo")
    assert set(found["handled"][0]) == {"how", "by", "accuracy", "triggers"}
    assert not {"forgeries", "fresh_fired", "machines"} & set(found)
    assert set(found["pictures"]) == {"shape", "accuracy", "triggers"}


def test_shares_are_of_each_kind() -> None:
    images = np.zeros((4, 1, 2, 2), dtype=np.uint8)
    images[:, 0, 0, 0] = [0, 1, 2, 3]
    questions = {"one": (images[:3], np.array([0, 1, 9])), "two": (images[3:], np.array([3]))}
    found = compute_answer_shares(questions, lambda asked: asked[:, 0, 0, 0].astype(np.int64))
    assert found == {"one": pytest.approx(200 / 3), "two": 100}


def test_a_machine_that_fails_says_so() -> None:
    model = build("mlp", {})
    host = HostSettings(model="lenet", data="digits", epochs=1)
    images = np.zeros((1, 1, 28, 28), dtype=np.uint8)
    with pytest.raises(SuspectError, match="the other machine ended with 1"):
        predict_in_other_process(model, host, ([0], [255]), images)
