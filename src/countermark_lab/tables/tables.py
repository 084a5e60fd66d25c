"""Tables of results, rendered from `results/` and never typed: ours, the paper's, the difference.

A table file says which cells of which experiments a row shows, and which figures the paper prints.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from countermark.errors import ConfigError, DataError, suggest_nearest
from countermark_lab.experiments.experiment import (
    EXPERIMENTS,
    Experiment,
    get_result_path,
    read_toml,
)
from countermark_lab.experiments.experiment_types import (
    AnyExperiment,
    expand_any_cells,
    load_any_experiment,
)
from countermark_lab.experiments.spec import SpecModel
from countermark_lab.tables.columns import COLUMNS, Figures

TABLES = Path("tables")


class TableRow(SpecModel):
    """One row: the cells of one row of an experiment, before or after one of its attacks.

    Attributes:
        label: heading of the row.
        experiment: name of the experiment.
        cells: label of the experiment's row.
        attack: label of an attack whose figures the columns `after …` show.
        prune: pruned share of the marked layer, for the columns `pruned …`.
        order: order of the pruning, for the columns `pruned …`.
        forgery: kind, number and strength of the images that the columns `forged …` show.
        handled: transform of the images and its strength, for the columns `handled …`.
        paper: figures that the paper prints, by column.
    """

    label: str
    experiment: str
    cells: str
    attack: str = ""
    prune: float | None = None
    order: str = ""
    forgery: dict[str, str | int | float] = Field(default={})
    handled: dict[str, str | float] = Field(default={})
    paper: dict[str, float] = Field(default={})


class Table(SpecModel):
    """Content of a table file.

    A table of kind `histograms` correlates the watched weights of each row with those of all rows.
    """

    name: str
    title: str
    source: str
    note: str = ""
    kind: Literal["figures", "histograms"] = "figures"
    columns: tuple[str, ...] = ()
    rows: tuple[TableRow, ...]


def sort_by_number(path: Path) -> tuple[int, str]:
    """Return a sort key for table files: table2 goes before table10."""
    return len(path.stem), path.stem


def load_table(path: Path) -> Table:
    """Read a table file.

    Raises:
        ConfigError: the file cannot be read, or has an unknown, missing or wrong field or column.
    """
    table = read_toml(path, Table)
    for column in table.columns:
        if column not in COLUMNS:
            raise ConfigError(f"{path}: no column {column!r}: {suggest_nearest(column, COLUMNS)}")
    return table


def render_table(table: Table, results: Path, experiments: Path = EXPERIMENTS) -> dict[str, Any]:
    """Render a table as JSON values.

    Returns: name, title, source, note, `columns` (name to heading) and `rows`; a row has its label,
        the number of seeds and `cells` by column: `ours` (mean over the seeds), `least`, `most`,
        `paper`, `difference` (None if the paper prints nothing), `track`. Verdicts are counts
        by outcome.

    Raises:
        DataError: a cell has no result yet, or lacks a figure that a column shows.
        ConfigError: an experiment, a row or an attack of that name does not exist.
    """
    columns = {name: COLUMNS[name].title for name in table.columns}
    if table.kind == "histograms":
        columns = {row.label: row.label for row in table.rows}
    return {
        "name": table.name,
        "title": table.title,
        "source": table.source,
        "note": table.note,
        "columns": columns,
        "rows": [_render_row(table, row, results, experiments) for row in table.rows],
    }


def _render_row(table: Table, row: TableRow, results: Path, experiments: Path) -> dict[str, Any]:
    """Render one row: its label, number of seeds and cells."""
    experiment = load_any_experiment(experiments / f"{row.experiment}.toml")
    own = load_row_figures(experiment, row.cells, results)
    if table.kind == "histograms":
        shown = {
            other.label: _correlate_rows(
                own,
                load_row_figures(
                    load_any_experiment(experiments / f"{other.experiment}.toml"),
                    other.cells,
                    results,
                ),
            )
            for other in table.rows
        }
    else:
        shown = {name: _read_column(name, row, own, experiment, results) for name in table.columns}
    return {
        "label": row.label,
        "seeds": len(own),
        "cells": {
            name: summarise_values(values, row.paper.get(name)) | {"track": experiment.track}
            for name, values in shown.items()
        },
    }


def _read_column(
    name: str, row: TableRow, own: list[Figures], experiment: AnyExperiment, results: Path
) -> list[Any]:
    """Return the values of one column in one row, one value for each seed."""
    sources = own
    # The prefix of a column names the part of a cell in which its figure lies.
    if name == "unmarked":
        sources = [
            figures
            # Unmarked accuracy is a figure of the row with scheme "none", not of the marked row.
            for each in (experiment.rows if isinstance(experiment, Experiment) else ())
            if each.scheme == "none"
            for figures in load_row_figures(experiment, each.label, results)
        ]
    elif name.startswith("after_"):
        sources = [_find_figures(each.get("attacked", []), label=row.attack) for each in own]
    elif name.startswith("pruned_"):
        where = {"fraction": row.prune} | ({"order": row.order} if row.order else {})
        sources = [_find_figures(each.get("pruned", []), **where) for each in own]
    elif name.startswith("forged_"):
        sources = [_find_figures(each.get("forgeries", []), **row.forgery) for each in own]
    elif name.startswith("handled_"):
        sources = [_find_figures(each.get("handled", []), **row.handled) for each in own]
    elif name.startswith("machines_"):
        sources = [_average_trials(each.get("machines", [])) for each in own]
    try:
        return [COLUMNS[name].read(each) for each in sources]
    except (KeyError, IndexError):
        raise DataError(
            f"{experiment.name}: the cells of {row.cells!r} have no {name!r}: leave the column "
            "out, or let the experiment measure it"
        ) from None


def _find_figures(measured: Sequence[Figures], **where: object) -> Figures:
    """Return the first figures whose fields equal `where`; raise `ConfigError` without any."""
    for each in measured:
        if all(each.get(name) == value for name, value in where.items()):
            return each
    raise ConfigError(f"no cell was measured after {where}")


def _average_trials(trials: Sequence[Figures]) -> Figures:
    """Return the mean of each figure over the trials."""
    # Every trial measures the same figures.
    return {name: statistics.mean(each[name] for each in trials) for name in trials[0]}


def summarise_values(values: Sequence[Any], paper: float | None = None) -> dict[str, Any]:
    """Summarise a figure over the seeds.

    Returns: `ours` (the mean), `least`, `most`, `paper` and `difference`; for verdicts `ours`
        counts each outcome.
    """
    # Strings are outcomes of verdicts: a mean does not exist.
    if isinstance(values[0], str):
        return {"ours": dict(Counter(values)), "paper": None, "difference": None}
    ours = statistics.mean(values)
    return {
        "ours": ours,
        "least": min(values),
        "most": max(values),
        "paper": paper,
        "difference": None if paper is None else ours - paper,
    }


def load_row_figures(experiment: AnyExperiment, label: str, results: Path) -> list[Figures]:
    """Read the figures of one row of an experiment, one element for each seed.

    Raises:
        ConfigError: the experiment has no such row.
        DataError: a cell has no result yet.
    """
    found = [cell for cell in expand_any_cells(experiment) if cell.label == label]
    if not found:
        # Labels repeat for each seed; a dictionary keeps each once, in order.
        known = suggest_nearest(label, {cell.label: None for cell in expand_any_cells(experiment)})
        raise ConfigError(f"{experiment.name} has no row {label!r}: {known}")
    return [_load_figures(get_result_path(cell, results)) for cell in found]


@lru_cache(maxsize=1024)
def _load_figures(path: Path) -> Figures:
    """Read the figures of one result file; raise `DataError` if it is missing."""
    if not path.exists():
        raise DataError(
            f"{path} is missing: run the experiment first (python -m countermark_lab run)"
        )
    # Results never change once they are written, so that a cached file stays right.
    figures: Figures = json.loads(path.read_text())["cell"]["figures"]
    return figures


def _correlate_rows(own: list[Figures], other: list[Figures]) -> list[float]:
    """Correlate the histograms of two rows, seed by seed."""
    return [
        correlate_histograms(a["watched"]["histogram"], b["watched"]["histogram"])
        for a, b in zip(own, other, strict=True)
    ]


def correlate_histograms(one: Figures, other: Figures) -> float:
    """Correlate two histograms over the bins of both: Eq. (2) of Wang et al. 2020."""
    first = min(one["first"], other["first"])
    last = max(each["first"] + len(each["counts"]) for each in (one, other))
    counts = np.zeros((2, last - first))
    # Histograms begin at different bins; missing bins count as zero.
    for row, each in zip(counts, (one, other), strict=True):
        at = each["first"] - first
        row[at : at + len(each["counts"])] = each["counts"]
    return float(np.corrcoef(counts)[0, 1])


def format_table(shown: Mapping[str, Any]) -> list[str]:
    """Format a rendered table as lines of Markdown."""
    # Rows of several experiments can differ in track; each is named once.
    tracks = dict.fromkeys(c["track"] for row in shown["rows"] for c in row["cells"].values())
    seeds = ", ".join(sorted({str(row["seeds"]) for row in shown["rows"]}))
    head = f"`{shown['name']}`. Printed figures: {shown['source']}. Seeds of a row: {seeds}."
    return [
        f"## {shown['title']}",
        "",
        head,
        *(f"Track: {track}." for track in tracks),
        *(["", shown["note"].strip()] if shown["note"] else []),
        "",
        f"| | {' | '.join(shown['columns'].values())} |",
        "|---" * (len(shown["columns"]) + 1) + "|",
        *(_format_row(row) for row in shown["rows"]),
        "",
    ]


def _format_row(row: Mapping[str, Any]) -> str:
    """Format one rendered row as a line of Markdown."""
    cells = " | ".join(format_cell(name, cell) for name, cell in row["cells"].items())
    return f"| {row['label']} | {cells} |"


def format_cell(column: str, cell: Mapping[str, Any], *, paper: bool = True) -> str:
    """Format a cell as text: ours, least and most over the seeds, the paper's figure."""
    if isinstance(cell["ours"], dict):
        return format_counts(cell["ours"])
    # Columns of a histogram table are row labels, which COLUMNS lacks: 4 decimals.
    decimals = COLUMNS[column].decimals if column in COLUMNS else 4
    least, ours, most = (_format_number(cell[name], decimals) for name in ("least", "ours", "most"))
    text = ours if least == most else f"{ours} [{least}, {most}]"
    return f"{text} (paper {cell['paper']:g})" if paper and cell["paper"] is not None else text


def format_counts(outcomes: Mapping[str, int]) -> str:
    """Format the counts of verdicts as text."""
    return ", ".join(f"{n} {outcome.replace('_', ' ')}" for outcome, n in outcomes.items())


def _format_number(value: float, decimals: int) -> str:
    """Format a number, small losses in scientific notation."""
    # Losses and error rates have four decimals; a small value would be rounded to 0.
    if decimals == 4 and 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{decimals}f}"
