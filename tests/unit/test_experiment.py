"""Experiments: cells with a hash, results that are computed once, tables that are rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import SMALL

from countermark.errors import ConfigError, DataError
from countermark_lab.experiments import experiment as bench
from countermark_lab.experiments import run as running
from countermark_lab.experiments.cell import compute_host_cell
from countermark_lab.experiments.run import run
from countermark_lab.tables.outlines import outline_experiment
from countermark_lab.tables.pages import render_page

ROOT = Path(__file__).parent.parent.parent
DIGITS = ROOT / "experiments" / "digits.toml"


def test_every_row_at_every_seed_is_a_cell_with_a_name_of_its_own(small: bench.Experiment) -> None:
    cells = list(bench.expand_cells(small))
    assert [(cell.label, cell.seed) for cell in cells] == [
        ("not embedded", 1), ("not embedded", 2), ("marked", 1), ("marked", 2),
    ]  # fmt: skip
    assert len({cell.digest for cell in cells}) == 4


def test_a_title_does_not_change_the_cell(small: bench.Experiment) -> None:
    same = small.model_copy(update={"title": "another title"})
    assert [c.digest for c in bench.expand_cells(same)] == [
        c.digest for c in bench.expand_cells(small)
    ]


def test_a_finished_cell_is_never_computed_again(
    small: bench.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = list(run(small, tmp_path))
    assert all(ended.result for ended in first)

    def refuse(*_: Any) -> dict[str, Any]:
        raise AssertionError("computed again")

    monkeypatch.setattr(running, "compute", refuse)
    assert list(run(small, tmp_path)) == first
    assert not list(tmp_path.rglob("*.checkpoint"))


def test_a_cell_says_what_it_is_and_where_it_was_made(
    small: bench.Experiment, tmp_path: Path
) -> None:
    ended = list(run(small, tmp_path))[-1]
    cell, result = ended.cell, ended.result
    assert result is not None
    specification = result["cell"].copy()
    figures = specification.pop("figures")
    assert bench.Cell.model_validate(specification) == cell
    assert figures["bits"] == 128
    assert [each["fraction"] for each in figures["pruned"]] == [0.5]
    assert set(result["provenance"]) == {
        "countermark", "commit", "torch", "python", "device", "threads", "seconds", "date",
    }  # fmt: skip


def test_a_row_may_ask_for_siblings_of_its_own(small: bench.Experiment) -> None:
    unmarked, marked = small.rows
    more = small.model_copy(update={"rows": (unmarked, marked.model_copy(update={"siblings": 3}))})
    before, after = ([*bench.expand_cells(each)] for each in (small, more))
    assert [each.host.siblings for each in after] == [0, 0, 3, 3]
    same = [one.digest == other.digest for one, other in zip(before, after, strict=True)]
    assert same == [True, True, False, False]


def test_an_outline_has_every_figure(small: bench.Experiment, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the experiment first"):
        outline_experiment(small, tmp_path)
    list(run(small, tmp_path))
    unmarked, marked = outline_experiment(small, tmp_path)
    accuracy = unmarked["accuracy"]
    assert accuracy["least"] <= accuracy["ours"] <= accuracy["most"]
    assert "wrong" not in unmarked
    assert marked["pruned"][0]["fraction"] == 0.5
    assert marked["track"] == "100 digits"


def test_the_page_says_what_is_missing(small: bench.Experiment, tmp_path: Path) -> None:
    paths = [tmp_path / "small.toml"]
    assert "4 cells are missing" in render_page("Small", {}, [], paths, tmp_path / "results")
    list(run(small, tmp_path / "results"))
    assert "After pruning the marked layer" in render_page(
        "Small", {}, [], paths, tmp_path / "results"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("epochs = 1", "epochs = 1\nepoch = 2"), "host.epoch: Extra inputs"),
        (("epochs = 1", ""), "host.epochs: Field required"),
        (('name = "small"', 'name = "../../small"'), "name: String should match"),
        (('name = "small"', "name ="), "expected a TOML file, an experiment"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(*change))
    with pytest.raises(ConfigError, match=said) as caught:
        bench.load_experiment(path)
    assert "\n" not in str(caught.value)


def test_committed_results_of_the_digits_come_out_again() -> None:
    """The smallest committed experiment, at its first seed, on this machine."""
    for cell in bench.expand_cells(bench.load_experiment(DIGITS)):
        if cell.seed != 1:
            continue
        committed = json.loads(bench.get_result_path(cell, ROOT / "results").read_text())["cell"]
        figures = compute_host_cell(cell)
        assert figures["accuracy"] == pytest.approx(committed["figures"]["accuracy"], abs=0.5)
        assert figures.get("wrong") == committed["figures"].get("wrong")
