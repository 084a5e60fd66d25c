"""A program that renders `results/` as JSON values and figures, which the server shows.

The server runs it as a process of its own, because drawing and tables may load torch:

    python -m countermark.web.rendering RESULTS OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from countermark._internal.files import write_bytes
from countermark.bench.experiment import Experiment
from countermark.bench.figures import FIGURES, draw_png, is_drawn_from
from countermark.bench.kinds import is_experiment, load_any_experiment
from countermark.bench.outlines import outline_experiment
from countermark.bench.tables import (
    format_cell,
    format_counts,
    load_table,
    render_table,
    sort_by_number,
)
from countermark.errors import CountermarkError, DataError, MissingExtraError
from countermark.web.results import INDEX, digest_results

_NOT_YET = "not measured yet"


def render_results(results: Path, out: Path) -> None:
    """Write the tables, heat maps and figures of all papers and other groups of experiments.

    Args:
        results: the folder of the results, with `tables` and `experiments` beside it.
        out: the folder to write to.
    """
    # Taken before rendering: results that change meanwhile are then rendered again next time.
    stamp = digest_results(results)
    folders = (results.parent / "tables", results.parent / "experiments")
    names = sorted({each.name for part in folders for each in part.iterdir() if each.is_dir()})
    papers = {name: _render_paper(name, results, out) for name in names}
    # The index goes last, so that it never names a figure that is not there.
    write_bytes(out / INDEX, json.dumps({"stamp": stamp, "papers": papers}).encode())


def _render_paper(name: str, results: Path, out: Path) -> dict[str, Any]:
    """Render one paper, and return its title, tables, heat maps and figures as JSON values."""
    tables = sorted((results.parent / "tables" / name).glob("*.toml"), key=sort_by_number)
    return {
        # Folders are named after author and year, such as wang2020.
        "title": (f"{name[:-4]} {name[-4:]}" if name[-4:].isdigit() else name).capitalize(),
        "tables": [_render_table(path, results) for path in tables],
        "heat_maps": list(_make_heat_maps(results.parent / "experiments" / name, results)),
        "figures": list(_draw_figures(name, results, out)),
    }


def _render_table(path: Path, results: Path) -> dict[str, Any]:
    """Return a table as texts, ours beside the paper's; without rows if cells are missing."""
    table = load_table(path)
    about = {"name": table.name, "title": table.title, "source": table.source, "note": table.note}
    try:
        shown = render_table(table, results, results.parent / "experiments")
    except DataError:
        return about | {"columns": [], "rows": [], "tracks": [], "missing": _NOT_YET}
    return about | {
        "columns": list(shown["columns"].values()),
        "rows": [
            {
                "label": row["label"], "seeds": row["seeds"],
                "cells": [format_cell(column, cell) for column, cell in row["cells"].items()],
            }
            for row in shown["rows"]
        ],
        "tracks": sorted({c["track"] for row in shown["rows"] for c in row["cells"].values()}),
        "missing": None,
    }  # fmt: skip


def _make_heat_maps(experiments: Path, results: Path) -> Iterator[dict[str, Any]]:
    """Yield, for each experiment with attacks, how often each mark is found after each attack."""
    for path in sorted(experiments.glob("*.toml")):
        experiment = load_any_experiment(path) if is_experiment(path) else None
        if not isinstance(experiment, Experiment):
            continue
        try:
            rows = [row for row in outline_experiment(experiment, results) if row["attacked"]]
        except DataError:
            continue
        attacks = list(dict.fromkeys(each["label"] for row in rows for each in row["attacked"]))
        if attacks:
            yield {
                "name": experiment.name, "track": experiment.track, "columns": attacks,
                "rows": [{"label": row["label"], "cells": _make_heat_row(row, attacks)} for row in rows],
            }  # fmt: skip


def _make_heat_row(row: Mapping[str, Any], attacks: list[str]) -> list[dict[str, Any] | None]:
    """Return a cell for each attack, or None if the row did not measure the attack.

    Args:
        row: a row of an outline, with its attacked models.
        attacks: the labels of the columns.

    Returns: cells with the share of `owned` verdicts in fifths, and all verdicts in words.
    """
    by_label = {each["label"]: each["outcomes"] for each in row["attacked"]}
    cells: list[dict[str, Any] | None] = []
    for attack in attacks:
        outcomes = by_label.get(attack)
        if not outcomes:
            cells.append(None)
            continue
        share = outcomes.get("owned", 0) / sum(outcomes.values())
        # Fifths, because the style sheet has six shades, for 0 to 5.
        cells.append({"fifths": round(5 * share), "says": format_counts(outcomes)})
    return cells


def _draw_figures(paper: str, results: Path, out: Path) -> Iterator[dict[str, str]]:
    """Draw the figures of a paper that have results, and yield their names and captions."""
    for name, drawing in FIGURES.items():
        if name.partition("/")[0] != paper:
            continue
        try:
            shown, path = (
                drawing.shown(results.parent / "experiments", results),
                out / f"{name}.png",
            )
            if not shown:
                continue
            # Drawing is slow: keep a file that was drawn from the same values.
            if not is_drawn_from(shown, path):
                draw_png(drawing, shown, path)
        # Without matplotlib there are no figures at all; a missing result costs one figure.
        except MissingExtraError:
            return
        except CountermarkError:
            continue
        yield {"name": name, "caption": drawing.caption}


if __name__ == "__main__":
    render_results(Path(sys.argv[1]), Path(sys.argv[2]))
