"""Tables of results: rendered from `results/`, never typed. Ours, the paper's, the difference."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from countermark.bench.experiment import Experiment, Row, cells, load_experiment, result_path
from countermark.errors import DataError

COLUMNS = ("accuracy", "wrong", "E_R", "log10_p")
_DECIMALS = {"accuracy": 2, "wrong": 1, "E_R": 4, "log10_p": 1}


def table(experiment: Experiment, results: Path) -> list[dict[str, Any]]:
    """The rows of one experiment as JSON values.

    Returns: per row its label and seeds, and per column `ours` (mean over seeds), `least`, `most`,
        `paper` and `difference`; pruned fractions in `pruned`. A row that measured nothing in a
        column has no such column; what the paper does not print is None.

    Raises:
        DataError: a cell has no result yet.
    """
    return [_row(experiment, row, results) for row in experiment.rows]


def _row(experiment: Experiment, row: Row, results: Path) -> dict[str, Any]:
    figures = [
        _figures(result_path(cell, results))
        for cell in cells(experiment)
        if cell.label == row.label
    ]
    pruned = [
        {"fraction": thinned[0]["fraction"]}
        | _columns(thinned, {"wrong": row.paper_pruned.get(str(thinned[0]["fraction"]))})
        for thinned in zip(*(each.get("pruned", []) for each in figures), strict=True)
    ]
    return {
        "label": row.label,
        "seeds": len(figures),
        "bits": figures[0].get("bits"),
        **_columns(figures, row.paper),
        "pruned": pruned,
    }


def _figures(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path} is missing: run the experiment first (countermark bench run)")
    figures: dict[str, Any] = json.loads(path.read_text())["cell"]["figures"]
    return figures


def _columns(
    figures: Sequence[Mapping[str, Any]], paper: Mapping[str, float | None]
) -> dict[str, Any]:
    columns = {}
    for column in COLUMNS:
        values = [each[column] for each in figures if each.get(column) is not None]
        if not values:
            continue
        ours, printed = statistics.mean(values), paper.get(column)
        columns[column] = {
            "ours": ours,
            "least": min(values),
            "most": max(values),
            "paper": printed,
            "difference": None if printed is None else ours - printed,
        }
    return columns


def page(experiments: Sequence[Path], results: Path) -> str:
    """The documentation page of all experiments, in Markdown."""
    head = [
        "# Results",
        "",
        "Rendered from `results/` by `make tables`; every file there holds one cell with its",
        "specification, seed, versions, device and commit. Accuracy is in percent of the test",
        "images, *wrong* the number of wrong bits, E_R the cross-entropy per bit in nats. Figures",
        "over several seeds are means, with the least and the most in brackets; (paper …) is what",
        "the source in the heading prints.",
    ]
    parts = [_section(load_experiment(path), results) for path in sorted(experiments)]
    return "\n".join([*head, *(line for part in parts for line in part), ""])


def _section(experiment: Experiment, results: Path) -> list[str]:
    seeds = ", ".join(str(seed) for seed in experiment.seeds)
    head = [
        "",
        f"## {experiment.title}",
        "",
        f"`{experiment.name}`. Track: {experiment.track}.",
        f"Printed figures: {experiment.source}. Seeds: {seeds}.",
        "",
    ]
    missing = [c for c in cells(experiment) if not result_path(c, results).exists()]
    if missing:
        return [*head, f"Not run to the end yet: {len(missing)} cells are missing."]
    rows = table(experiment, results)
    lines = [
        *head,
        "| | accuracy % | wrong bits | E_R | log10 p |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        shown = " | ".join(_shown(row, column) for column in COLUMNS)
        lines.append(f"| {row['label']} | {shown} |")
    return lines + _pruned(rows)


def _pruned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Wrong bits and accuracy against the pruned share of the marked layer."""
    fractions = [each["fraction"] for each in rows[0]["pruned"]]
    if not fractions:
        return []
    lines = [
        "",
        "Wrong bits after pruning the smallest weights of the marked layer (accuracy below):",
        "",
        "| | " + " | ".join(f"{100 * fraction:g} %" for fraction in fractions) + " |",
        "|---" * (len(fractions) + 1) + "|",
    ]
    for column, needed in (("wrong", "wrong"), ("accuracy", "accuracy")):
        lines += [
            f"| {row['label']}, {needed} | "
            + " | ".join(_shown(each, column) for each in row["pruned"])
            + " |"
            for row in rows
            if column in row["pruned"][0]
        ]
    return lines


def _shown(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        return "–"
    figures, decimals = row[column], _DECIMALS[column]
    text = f"{figures['ours']:.{decimals}f}"
    if figures["least"] != figures["most"]:
        text += f" [{figures['least']:.{decimals}f}, {figures['most']:.{decimals}f}]"
    if figures["paper"] is not None:
        text += f" (paper {figures['paper']:g})"
    return text
