"""What reports quote is gathered from results, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from countermark.errors import ConfigError
from countermark.report.measured import Measurements, find_measured_form
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.uchida.scheme import Uchida
from countermark_lab.tables.measured import render_measurements

TABLES = Path(__file__).parents[2] / "tables"
CARD = """
title = "t"
intro = ""
[criteria]
robustness = "r"
[[schemes]]
name = "one"
[schemes.scores.robustness]
says = "it [stays](there.md)."
"""
SOURCES = """
[[forms]]
name = "one form"
scheme = "uchida"
fields = { read = "tensor" }
scorecard = "one"
unmarked = [{ experiment = "wang2020/unmarked", row = "AUTO, hardened" }]
"""


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the project, whose experiments and tables are named relative to it."""
    monkeypatch.chdir(TABLES.parent)
    return TABLES.parent


def made(folder: Path, results: Path, sources: str = SOURCES) -> Measurements:
    (folder / "card.toml").write_text(CARD)
    (folder / "sources.toml").write_text(sources)
    text = render_measurements(folder / "sources.toml", folder / "card.toml", results)
    return Measurements.model_validate_json(text)


def test_counts_are_those_of_the_result(root: Path, tmp_path: Path) -> None:
    (form,) = made(tmp_path, root / "results").forms
    assert form.robustness == "it stays."
    for path in (root / "results/wang2020/unmarked").iterdir():
        cell = json.loads(path.read_bytes())["cell"]
        if cell["label"] == "AUTO, hardened":
            groups = cell["figures"]["suspects"]
    assert [each.claims for each in form.unmarked] == [each["claims"] for each in groups]
    assert [each.judged for each in form.unmarked] == [each["hosts"] for each in groups]
    assert form.unmarked[0].source == "wang2020/unmarked, AUTO, hardened"


def test_what_has_no_result_is_left_out(root: Path, tmp_path: Path) -> None:
    (form,) = made(tmp_path, tmp_path / "none").forms
    assert form.unmarked == ()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("AUTO, hardened", "AUTO, softened", "has no row 'AUTO, softened'"),
        ('"one"', '"two"', "the scorecard has no 'two'"),
        ("wang2020/unmarked", "wang2020/unmrked", "unmrked"),
    ],
)
def test_what_does_not_exist_is_named(
    root: Path, tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        made(tmp_path, root / "results", SOURCES.replace(old, new))


def test_a_key_has_the_form_of_its_fields() -> None:
    default = find_measured_form("uchida", Uchida(layer="x", bits=8).to_fields())
    published = Uchida(layer="x", bits=8, key_type="random", regularizer="bce").to_fields()
    other = Uchida(layer="x", bits=8, key_type="direct").to_fields()
    assert default is not None
    assert default.name.endswith("default form")
    assert find_measured_form("uchida", published) != default
    assert find_measured_form("uchida", other) is None
    assert find_measured_form("zhang", {}) is None
    names = set()
    modes: tuple[Literal["auto", "manu"], ...] = ("auto", "manu")
    for mode in modes:
        for as_published in (True, False):
            scheme = IndependentNetwork("x", bits=8, mode=mode, as_published=as_published)
            form = find_measured_form("independent_network", scheme.to_fields())
            assert form is not None
            names.add(form.name)
    assert len(names) == 4
