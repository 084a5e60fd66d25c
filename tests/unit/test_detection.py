"""Experiments in steganalysis: cells like others, of embedders and of schemes' triggers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from countermark.errors import ConfigError
from countermark_lab.experiments.detection import (
    DetectionCell,
    DetectionRow,
    DetectionSettings,
    check_detection_cell,
    compute_detection_cell,
    expand_detection_cells,
)
from countermark_lab.experiments.experiment import get_result_path
from countermark_lab.experiments.experiment_types import find_experiment, load_any_experiment
from countermark_lab.experiments.run import run
from countermark_lab.tables.outlines import outline_experiment
from countermark_lab.tables.pages import render_section

SOUGHT = DetectionSettings(data="digits", images=60, training=60, network=128)
TEXT = """
name = "toy/hidden"
title = "Toy"
track = "60 digits"
seeds = [1, 2]
[sought]
data = "digits"
images = 60
training = 60
[[rows]]
label = "noise"
embedder = "uniform_noise"
"""


def cell(**fields: object) -> DetectionCell:
    given = {"label": "row", "experiment": "toy", "track": "toy", "sought": SOUGHT, "seed": 1}
    return DetectionCell.model_validate(given | fields)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "hidden.toml"
    file.write_text(TEXT)
    return file


def test_a_run_leaves_results_that_pages_show(path: Path, tmp_path: Path) -> None:
    experiment = load_any_experiment(path)
    ended = list(run(experiment, tmp_path / "results"))
    assert [each.failure for each in ended] == [None, None]
    rates = json.loads(get_result_path(ended[0].cell, tmp_path / "results").read_text())
    ats = rates["cell"]["figures"]["ats"]
    assert ats["low"] <= ats["detection"] <= ats["high"]
    assert (ats["images"], ats["features"]) == (60, [500, 686])
    assert rates["cell"]["figures"]["supervised"]["detection"] > 90  # noise on a black ground
    (row,) = outline_experiment(experiment, tmp_path / "results")
    assert len(row["figures"]) == 2
    assert sum(
        line.startswith("| noise |") for line in render_section(experiment, tmp_path / "results")
    )
    assert next(iter(run(experiment, tmp_path / "results"))).result == ended[0].result


def test_drawn_triggers_are_found() -> None:
    assert compute_detection_cell(cell(scheme="guo"))["supervised"]["detection"] > 80


def test_a_stego_network_can_be_known_or_not() -> None:
    toy = {"psnr": 24, "stego_steps": 5}
    known = cell(scheme="deepstego", fields=toy)
    unknown = cell(scheme="deepstego", fields=toy, weights="unknown")
    assert known.digest != unknown.digest
    found = [compute_detection_cell(each)["supervised"] for each in (known, unknown)]
    assert all(each["images"] == 60 for each in found)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "either an embedder or a scheme"),
        ({"embedder": "wow", "scheme": "guo"}, "either an embedder or a scheme"),
        ({"embedder": "wov"}, "wow"),
        ({"scheme": "deepstego", "fields": {"psnr": 3}}, "psnr"),
    ],
)
def test_what_cannot_be_computed_is_refused_before(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_detection_cell(cell(**fields))


def test_a_scheme_without_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="makes no images"):
        compute_detection_cell(cell(scheme="uchida", fields={"layer": "0.weight"}))


def test_an_unknown_field_is_one_line(path: Path) -> None:
    path.write_text(TEXT.replace("training", "trainings"))
    with pytest.raises(ConfigError, match=r"sought\.training"):
        find_experiment(str(path))


def test_every_row_at_every_seed_is_a_cell(path: Path) -> None:
    found = expand_detection_cells(load_any_experiment(path))  # type: ignore[arg-type]
    assert [each.seed for each in found] == [1, 2]
    assert len({each.digest for each in found}) == 2
    assert isinstance(found[0], DetectionRow)
