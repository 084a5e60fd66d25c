"""A process of its own: `results/` as JSON values and figures, which the server shows.

python -m countermark.web.rendering RESULTS OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from countermark.bench.experiment import Experiment
from countermark.bench.figures import FIGURES, draw, is_drawn_from
from countermark.bench.kinds import is_experiment, load_any
from countermark.bench.outlines import outline
from countermark.bench.tables import counted, in_order, load_table, rendered, shown_cell
from countermark.errors import CountermarkError, DataError, MissingExtraError
from countermark.files import write_bytes
from countermark.web.results import INDEX, stamp_of

_NOT_YET = "not measured yet"


def render(results: Path, out: Path) -> None:
    """Write what is to be shown of all papers, and of what was measured beside them.

    Args:
        results: the folder of the results, with `tables` and `experiments` beside it.
        out: the folder to write to.
    """
    stamp = stamp_of(results)
    folders = (results.parent / "tables", results.parent / "experiments")
    names = sorted({each.name for part in folders for each in part.iterdir() if each.is_dir()})
    papers = {name: _paper(name, results, out) for name in names}
    write_bytes(out / INDEX, json.dumps({"stamp": stamp, "papers": papers}).encode())


def _paper(name: str, results: Path, out: Path) -> dict[str, Any]:
    tables = sorted((results.parent / "tables" / name).glob("*.toml"), key=in_order)
    return {
        "title": (f"{name[:-4]} {name[-4:]}" if name[-4:].isdigit() else name).capitalize(),
        "tables": [_table(path, results) for path in tables],
        "heat_maps": list(_heat_maps(results.parent / "experiments" / name, results)),
        "figures": list(_figures(name, results, out)),
    }


def _table(path: Path, results: Path) -> dict[str, Any]:
    """A table as texts, ours beside the paper's; without rows where cells are missing."""
    table = load_table(path)
    about = {"name": table.name, "title": table.title, "source": table.source, "note": table.note}
    try:
        shown = rendered(table, results, results.parent / "experiments")
    except DataError:
        return about | {"columns": [], "rows": [], "tracks": [], "missing": _NOT_YET}
    return about | {
        "columns": list(shown["columns"].values()),
        "rows": [
            {
                "label": row["label"], "seeds": row["seeds"],
                "cells": [shown_cell(column, cell) for column, cell in row["cells"].items()],
            }
            for row in shown["rows"]
        ],
        "tracks": sorted({c["track"] for row in shown["rows"] for c in row["cells"].values()}),
        "missing": None,
    }  # fmt: skip


def _heat_maps(experiments: Path, results: Path) -> Iterator[dict[str, Any]]:
    """Of each experiment with attacks: how often each form of the mark is found after each."""
    for path in sorted(experiments.glob("*.toml")):
        experiment = load_any(path) if is_experiment(path) else None
        if not isinstance(experiment, Experiment):
            continue
        try:
            rows = [row for row in outline(experiment, results) if row["attacked"]]
        except DataError:
            continue
        attacks = list(dict.fromkeys(each["label"] for row in rows for each in row["attacked"]))
        if attacks:
            yield {
                "name": experiment.name, "track": experiment.track, "columns": attacks,
                "rows": [{"label": row["label"], "cells": _heat(row, attacks)} for row in rows],
            }  # fmt: skip


def _heat(row: Mapping[str, Any], attacks: list[str]) -> list[dict[str, Any] | None]:
    """For each attack the share of verdicts that say owned, in fifths, and all of them in words."""
    by_label = {each["label"]: each["outcomes"] for each in row["attacked"]}
    cells: list[dict[str, Any] | None] = []
    for attack in attacks:
        outcomes = by_label.get(attack)
        if not outcomes:
            cells.append(None)
            continue
        share = outcomes.get("owned", 0) / sum(outcomes.values())
        cells.append({"fifths": round(5 * share), "says": counted(outcomes)})
    return cells


def _figures(paper: str, results: Path, out: Path) -> Iterator[dict[str, str]]:
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
            if not is_drawn_from(shown, path):
                draw(drawing, shown, path)
        except MissingExtraError:
            return
        except CountermarkError:
            continue
        yield {"name": name, "caption": drawing.caption}


if __name__ == "__main__":
    render(Path(sys.argv[1]), Path(sys.argv[2]))
