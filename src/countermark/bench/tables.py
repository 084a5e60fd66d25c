"""Tables of results: rendered from `results/`, never typed. Ours, the paper's, the difference.

A table file says which cells of which experiments a row shows, and what the paper prints there.
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

from countermark.bench.columns import COLUMNS, Figures
from countermark.bench.experiment import EXPERIMENTS, Experiment, read_toml, result_path
from countermark.bench.kinds import AnyExperiment, every_cell, load_any
from countermark.bench.strict import Strict
from countermark.errors import ConfigError, DataError, suggest_nearest

TABLES = Path("tables")


class TableRow(Strict):
    """One row: the cells of one row of an experiment, before or after one of its attacks.

    Attributes:
        label: what the row is called.
        experiment: name of the experiment; `cells` the label of its row.
        attack: label of an attack whose figures the columns `after …` show.
        prune: the share of the marked layer whose figures the columns `pruned …` show, and the
            order in which it was pruned.
        forgery: kind, number and strength of the images that the columns `forged …` show.
        handled: how images are handled, and by how much, where the columns `handled …` show it.
        paper: what the paper prints, by column.
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


class Table(Strict):
    """A table file. `histograms` correlates the watched weights of each row with those of all."""

    name: str
    title: str
    source: str
    note: str = ""
    kind: Literal["figures", "histograms"] = "figures"
    columns: tuple[str, ...] = ()
    rows: tuple[TableRow, ...]


def in_order(path: Path) -> tuple[int, str]:
    """A key to sort table files by: table2 before table10."""
    return len(path.stem), path.stem


def load_table(path: Path) -> Table:
    """Read a table file.

    Raises:
        ConfigError: it cannot be read, has an unknown, missing or wrong field or column.
    """
    table = read_toml(path, Table)
    for column in table.columns:
        if column not in COLUMNS:
            raise ConfigError(f"{path}: no column {column!r}: {suggest_nearest(column, COLUMNS)}")
    return table


def rendered(table: Table, results: Path, experiments: Path = EXPERIMENTS) -> dict[str, Any]:
    """A table as JSON values.

    Returns: name, title, source, note, `columns` (name to heading) and `rows`; a row has its label,
        the number of seeds and `cells` by column: `ours` (mean over the seeds), `least`, `most`,
        `paper`, `difference` (None where the paper prints nothing), `track`. Verdicts are counts
        by outcome.

    Raises:
        DataError: a cell has no result yet, or no such figure.
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
        "rows": [_row(table, row, results, experiments) for row in table.rows],
    }


def _row(table: Table, row: TableRow, results: Path, experiments: Path) -> dict[str, Any]:
    experiment = load_any(experiments / f"{row.experiment}.toml")
    own = figures_of(experiment, row.cells, results)
    if table.kind == "histograms":
        shown = {
            other.label: _correlations(
                own,
                figures_of(
                    load_any(experiments / f"{other.experiment}.toml"), other.cells, results
                ),
            )
            for other in table.rows
        }
    else:
        shown = {name: _values(name, row, own, experiment, results) for name in table.columns}
    return {
        "label": row.label,
        "seeds": len(own),
        "cells": {
            name: summary(values, row.paper.get(name)) | {"track": experiment.track}
            for name, values in shown.items()
        },
    }


def _values(
    name: str, row: TableRow, own: list[Figures], experiment: AnyExperiment, results: Path
) -> list[Any]:
    """One figure a seed."""
    sources = own
    if name == "unmarked":
        sources = [
            figures
            for each in (experiment.rows if isinstance(experiment, Experiment) else ())
            if each.scheme == "none"
            for figures in figures_of(experiment, each.label, results)
        ]
    elif name.startswith("after_"):
        sources = [_one(each.get("attacked", []), label=row.attack) for each in own]
    elif name.startswith("pruned_"):
        where = {"fraction": row.prune} | ({"order": row.order} if row.order else {})
        sources = [_one(each.get("pruned", []), **where) for each in own]
    elif name.startswith("forged_"):
        sources = [_one(each.get("forgeries", []), **row.forgery) for each in own]
    elif name.startswith("handled_"):
        sources = [_one(each.get("handled", []), **row.handled) for each in own]
    elif name.startswith("machines_"):
        sources = [_means(each.get("machines", [])) for each in own]
    try:
        return [COLUMNS[name].read(each) for each in sources]
    except (KeyError, IndexError):
        raise DataError(
            f"{experiment.name}: the cells of {row.cells!r} have no {name!r}: leave the column "
            "out, or let the experiment measure it"
        ) from None


def _one(measured: Sequence[Figures], **where: object) -> Figures:
    for each in measured:
        if all(each.get(name) == value for name, value in where.items()):
            return each
    raise ConfigError(f"no cell was measured after {where}")


def _means(trials: Sequence[Figures]) -> Figures:
    """The mean of each figure over the trials."""
    return {name: statistics.mean(each[name] for each in trials) for name in trials[0]}


def summary(values: Sequence[Any], paper: float | None = None) -> dict[str, Any]:
    """Ours over the seeds, the paper's, the difference; of verdicts, how often each was given."""
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


def figures_of(experiment: AnyExperiment, label: str, results: Path) -> list[Figures]:
    """The figures of one row of an experiment, a seed each.

    Raises:
        ConfigError: it has no such row.
        DataError: a cell has no result yet.
    """
    found = [cell for cell in every_cell(experiment) if cell.label == label]
    if not found:
        known = suggest_nearest(label, {cell.label: None for cell in every_cell(experiment)})
        raise ConfigError(f"{experiment.name} has no row {label!r}: {known}")
    return [_figures(result_path(cell, results)) for cell in found]


@lru_cache(maxsize=1024)
def _figures(path: Path) -> Figures:
    if not path.exists():
        raise DataError(f"{path} is missing: run the experiment first (countermark bench run)")
    figures: Figures = json.loads(path.read_text())["cell"]["figures"]
    return figures


def _correlations(own: list[Figures], other: list[Figures]) -> list[float]:
    return [
        correlation(a["watched"]["histogram"], b["watched"]["histogram"])
        for a, b in zip(own, other, strict=True)
    ]


def correlation(one: Figures, other: Figures) -> float:
    """Eq. (2) of Wang et al. 2020: correlation of two histograms over the bins of both."""
    first = min(one["first"], other["first"])
    last = max(each["first"] + len(each["counts"]) for each in (one, other))
    counts = np.zeros((2, last - first))
    for row, each in zip(counts, (one, other), strict=True):
        at = each["first"] - first
        row[at : at + len(each["counts"])] = each["counts"]
    return float(np.corrcoef(counts)[0, 1])


def as_markdown(shown: Mapping[str, Any]) -> list[str]:
    """A rendered table as lines of Markdown."""
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
        *(_line(row) for row in shown["rows"]),
        "",
    ]


def _line(row: Mapping[str, Any]) -> str:
    cells = " | ".join(shown_cell(name, cell) for name, cell in row["cells"].items())
    return f"| {row['label']} | {cells} |"


def shown_cell(column: str, cell: Mapping[str, Any], *, paper: bool = True) -> str:
    """A cell as text: ours, least and most over the seeds, the paper's."""
    if isinstance(cell["ours"], dict):
        return counted(cell["ours"])
    decimals = COLUMNS[column].decimals if column in COLUMNS else 4
    least, ours, most = (_number(cell[name], decimals) for name in ("least", "ours", "most"))
    text = ours if least == most else f"{ours} [{least}, {most}]"
    return f"{text} (paper {cell['paper']:g})" if paper and cell["paper"] is not None else text


def counted(outcomes: Mapping[str, int]) -> str:
    """How often each verdict was given, as text."""
    return ", ".join(f"{n} {outcome.replace('_', ' ')}" for outcome, n in outcomes.items())


def _number(value: float, decimals: int) -> str:
    """Small losses in scientific notation."""
    if decimals == 4 and 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{decimals}f}"
