"""Tables: ours beside the paper's, rendered from results; figures stamped with what they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from countermark.errors import ConfigError, DataError
from countermark_lab.experiments.experiment import (
    Experiment,
    expand_cells,
    get_result_path,
    load_experiment,
)
from countermark_lab.experiments.experiment_types import expand_any_cells, load_any_experiment
from countermark_lab.figures import FIGURES, draw_png, find_figure, is_drawn_from
from countermark_lab.tables.pages import render_section
from countermark_lab.tables.tables import (
    correlate_histograms,
    format_table,
    load_table,
    render_table,
)

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "tables").glob("*/*.toml"))

EXPERIMENT = """
name = "small"
title = "Small"
track = "three digits"
seeds = [1, 2]
[host]
model = "mlp"
data = "digits"
epochs = 1
[[rows]]
label = "not embedded"
[[rows]]
label = "marked"
scheme = "uchida"
"""
TABLE = """
name = "small/table1"
title = "Table 1"
source = "nobody"
columns = [
    "unmarked", "accuracy", "bit_accuracy", "false_reads", "after_wrong", "pruned_wrong", "outcome",
]
[[rows]]
label = "ours"
experiment = "small"
cells = "marked"
attack = "fine-tuned"
prune = 0.9
order = "random"
paper = { accuracy = 91.5, after_wrong = 1 }
"""
MARKED: dict[str, Any] = {
    "bits": 128,
    "wrong": 32,
    "outcome": "owned",
    "suspects": [{"hosts": 4, "all_bits": 1}],
    "attacked": [{"label": "pruned", "wrong": 9}, {"label": "fine-tuned", "wrong": 3}],
    "pruned": [
        {"order": order, "fraction": fraction, "wrong": fraction * 10}
        for order in ("ascending", "random")
        for fraction in (0.5, 0.9)
    ],
    "watched": {"histogram": {"first": -1, "counts": [1, 2, 1]}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment with results that were never computed, and a table."""
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    (tmp_path / "table.toml").write_text(TABLE)
    for cell in expand_cells(load_experiment(tmp_path / "small.toml")):
        figures = {"accuracy": 90.0 + cell.seed} | (MARKED if cell.label == "marked" else {})
        path = get_result_path(cell, tmp_path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"cell": {"figures": figures}}))
    return tmp_path


def test_ours_the_papers_and_the_difference(folder: Path) -> None:
    shown = render_table(load_table(folder / "table.toml"), folder, folder)
    (row,) = shown["rows"]
    assert row["seeds"] == 2
    assert row["cells"]["accuracy"] == {
        "ours": 91.5, "least": 91, "most": 92, "paper": 91.5, "difference": 0,
        "track": "three digits",
    }  # fmt: skip
    assert row["cells"]["after_wrong"]["ours"] == 3
    assert row["cells"]["after_wrong"]["difference"] == 2
    assert row["cells"]["pruned_wrong"]["ours"] == 9
    assert row["cells"]["bit_accuracy"]["ours"] == 75
    assert row["cells"]["false_reads"]["ours"] == 25
    assert row["cells"]["unmarked"]["paper"] is row["cells"]["unmarked"]["difference"] is None
    assert row["cells"]["outcome"]["ours"] == {"owned": 2}
    assert set(row["cells"]) == set(shown["columns"])
    text = "\n".join(format_table(shown))
    assert "| ours | 91.50 [91.00, 92.00] | 91.50 [91.00, 92.00] (paper 91.5) | 75.00 |" in text
    assert "2 owned" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"bit_accuracy"', '"bits_accuracy"'), "no column 'bits_accuracy'"),
        (('cells = "marked"', 'cells = "market"'), "small has no row 'market'"),
        (('attack = "fine-tuned"', 'attack = "fined"'), "no cell was measured after"),
        (("prune = 0.9", "prune = 0.8"), "no cell was measured after"),
        (('"outcome"', '"E_R"'), "the cells of 'marked' have no 'E_R'"),
        (('label = "ours"', 'label = "ours"\nlable = 3'), "rows.0.lable: Extra inputs"),
        (('experiment = "small"', 'experiment = "smell"'), "expected a TOML file, an experiment"),
    ],
)
def test_a_wrong_table_is_one_line(folder: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in TABLE
    (folder / "table.toml").write_text(TABLE.replace(*change))
    with pytest.raises((ConfigError, DataError)) as caught:
        render_table(load_table(folder / "table.toml"), folder, folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_result_names_the_way_out(folder: Path) -> None:
    with pytest.raises(DataError, match="run the experiment first"):
        render_table(load_table(folder / "table.toml"), folder / "elsewhere", folder)


def test_histograms_are_correlated_over_the_bins_of_both() -> None:
    one = {"first": -1, "counts": [1, 2, 1]}
    assert correlate_histograms(one, one) == pytest.approx(1)
    shifted = {"first": 2, "counts": [1, 2, 1]}
    # Bins −1 to 4: (1 2 1 0 0 0) and (0 0 0 1 2 1); means 2/3, Eq. (2) by hand.
    assert correlate_histograms(one, shifted) == pytest.approx((0 - 6 * 4 / 9) / (6 - 6 * 4 / 9))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_tables_fit_their_experiments(path: Path) -> None:
    table = load_table(path)
    assert table.name == f"{path.parent.name}/{path.stem}"
    for row in table.rows:
        experiment = load_any_experiment(ROOT / "experiments" / f"{row.experiment}.toml")
        assert row.cells in {each.label for each in expand_any_cells(experiment)}, row.label
        assert set(row.paper) <= {*table.columns, *(each.label for each in table.rows)}
        if isinstance(experiment, Experiment):
            assert not row.attack or row.attack in {each.label for each in experiment.attacks}
        if row.prune is not None:
            assert isinstance(experiment, Experiment)
            assert experiment.prune is not None
            assert row.prune in experiment.prune.fractions


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_tables_have_no_empty_cell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    try:
        shown = render_table(load_table(path), Path("results"))
    except DataError as error:
        pytest.skip(str(error))
    for row in shown["rows"]:
        assert set(row["cells"]) == set(shown["columns"])
        for cell in row["cells"].values():
            assert cell["ours"] is not None
            assert {"paper", "difference", "track"} <= set(cell)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn(name: str, tmp_path: Path) -> None:
    figure = find_figure(name)
    shown = figure.shown(ROOT / "experiments", ROOT / "results")
    if not shown:
        pytest.skip("its experiments have not run to their end")
    draw_png(figure, shown, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert is_drawn_from(shown, tmp_path / "figure.png")
    assert not is_drawn_from({**shown, "more": 1}, tmp_path / "figure.png")


def test_the_matrix_counts_verdicts_before_and_after_alignment(tmp_path: Path) -> None:
    (tmp_path / "robustness").mkdir()
    attacks = '[[attacks]]\nlabel = "permuted"\nsteps = [{ attack = "permute" }]\n[[rows]]'
    file = tmp_path / "robustness" / "mlp.toml"
    file.write_text(EXPERIMENT.replace("[[rows]]", attacks, 1))
    for cell in expand_cells(load_experiment(file)):
        attacked = {"label": "permuted", "accuracy": 88.0, "cost": 0.0}
        if cell.label == "marked":
            attacked |= {"bits": 128, "wrong": 64, "outcome": "not_proven", "log10_p": -0.3}
            outcome = ("owned", "no_verdict")[cell.seed - 1]
            attacked["aligned"] = {"outcome": outcome, "wrong": cell.seed, "log10_p": -30.0}
        more = {"bits": 128, "wrong": 0, "outcome": "owned"} if cell.label == "marked" else {}
        figures = {"accuracy": 90.0, "attacked": [attacked]} | more
        path = get_result_path(cell, tmp_path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"cell": {"figures": figures}}))
    shown = FIGURES["robustness/mlp"].shown(tmp_path, tmp_path)
    assert shown == {
        "attacks": ["permuted"], "schemes": ["marked"], "wrong": [[50.0]], "lost": [[2.0]],
        "verdicts": [["nn"]], "aligned": [["?O"]],
    }  # fmt: skip
    draw_png(FIGURES["robustness/mlp"], shown, tmp_path / "matrix.png")
    lines = render_section(load_experiment(file), tmp_path)
    assert lines[-2].startswith("| marked, permuted | 88.00 | 64.0 | – | -0.3 | 2 not proven | 0 |")
    assert lines[-2].endswith("| 1.5 [1.0, 2.0] | -30.0 | 1 owned, 1 no verdict |")
    assert FIGURES["robustness/mlp"].shown(tmp_path, tmp_path / "elsewhere") == {}


def test_an_unknown_figure_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="wang2020/figure4"):
        find_figure("wang2020/figure44")
