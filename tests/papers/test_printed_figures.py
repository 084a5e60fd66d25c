"""What the committed tables have to show beside the printed figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from countermark.errors import DataError
from countermark_lab.tables.tables import TableRow, load_table, render_table

ROOT = Path(__file__).parents[2]
MLP = ("wang2020/mlp", "wang2020/mlp_capacity")


def rows(name: str, wanted: Callable[[TableRow], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and cells of some rows of a committed table."""
    table = load_table(ROOT / "tables" / f"{name}.toml")
    chosen = tuple(row for row in table.rows if wanted(row))
    assert chosen
    try:
        shown = render_table(
            table.model_copy(update={"rows": chosen}), ROOT / "results", ROOT / "experiments"
        )
    except DataError as error:
        pytest.skip(str(error))
    yield from ((row["label"], row["cells"]) for row in shown["rows"])


@pytest.mark.parametrize("name", ["table1", "table3", "table5"])
def test_accuracies_of_the_mlp_are_the_papers(name: str) -> None:
    for label, cells in rows(f"wang2020/{name}", lambda row: row.experiment in MLP):
        for column in ("unmarked", "accuracy"):
            if column in cells and cells[column]["paper"] is not None:
                assert abs(cells[column]["difference"]) <= 0.5, (label, column)


def test_column_7_is_not_beaten_by_being_run_badly() -> None:
    for label, cells in rows("wang2020/table5", lambda row: "as Wang ran it" in row.label):
        assert cells["bit_accuracy"]["difference"] >= -2, label


def hardened(row: TableRow) -> bool:
    """AUTO only: a mark of MANU can hang on three units, and no rank of these reaches 1e-6."""
    attacks = ("90 % pruned", "fine-tuned, same", "fine-tuned, different")
    return row.cells == "AUTO, hardened" and row.attack.startswith(attacks)


@pytest.mark.parametrize("host", MLP[:1])
@pytest.mark.parametrize("name", ["table4", "robustness"])
def test_the_hardened_form_outlives_the_papers_attacks(host: str, name: str) -> None:
    for label, cells in rows(f"wang2020/{name}", lambda r: r.experiment == host and hardened(r)):
        assert cells["after_E_R"]["most"] <= 0.1, label
        assert set(cells["after_outcome"]["ours"]) == {"owned"}, label


def test_the_published_reader_finds_its_bits_in_unmarked_models() -> None:
    for label, cells in rows("wang2020/unmarked", lambda row: "published" in row.label):
        assert cells["false_reads"]["ours"] > 5, label


def test_uchidas_mark_remains_at_65_per_cent() -> None:
    for label, cells in rows("uchida2017/pruning", lambda row: row.label.startswith("random, 65")):
        assert cells["pruned_wrong"]["most"] == 0, label
        assert cells["pruned_outcome"]["ours"] == {"owned": 1}, label
