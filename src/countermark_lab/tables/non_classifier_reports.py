"""Pages of experiments that train no classifier: detection rates, and networks of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from countermark_lab.experiments.detection import Detection
from countermark_lab.experiments.experiment_types import expand_any_cells
from countermark_lab.image_models.experiment import ImagingExperiment
from countermark_lab.tables.tables import (
    format_cell,
    format_counts,
    load_row_figures,
    summarise_values,
)

_IMAGING = ("psnr", "wrong", "nc", "log10_p")


def outline_hostless(
    experiment: Detection | ImagingExperiment, results: Path, labels: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of an experiment without hosts as JSON values.

    Args:
        experiment: the experiment.
        results: folder of the results.
        labels: labels of the rows to return; None for all rows.

    Returns: for each row its label, track and number of seeds. A row of a detection experiment
        also has the `figures` of each seed; a row of an imaging experiment a summary of each
        column, and `outcomes`, counts of verdicts.

    Raises:
        DataError: a cell has no result yet.
    """
    rows = []
    # Cells of one row differ in the seed only; a dictionary keeps the order of the file.
    for label in dict.fromkeys(cell.label for cell in expand_any_cells(experiment)):
        if labels is not None and label not in labels:
            continue
        figures = load_row_figures(experiment, label, results)
        row: dict[str, Any] = {"label": label, "track": experiment.track, "seeds": len(figures)}
        if isinstance(experiment, Detection):
            row["figures"] = figures
        else:
            row |= {name: summarise_values([each[name] for each in figures]) for name in _IMAGING}
            row["outcomes"] = dict(Counter(each["outcome"] for each in figures))
        rows.append(row)
    return rows


def format_hostless(
    experiment: Detection | ImagingExperiment, rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Format the rows of `outline_hostless` as lines of Markdown."""
    return _format_rates(rows) if isinstance(experiment, Detection) else _format_image_rows(rows)


def _format_rates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format detection rates with their intervals, one line for each row and seed."""
    # Seeds are not averaged: the intervals hold for one detector on one set of images.
    return [
        "Detection in percent of N images of which half are stego images; 95 % in brackets.",
        "",
        "| | ATS | of covers | supervised | of covers | N | features |",
        "|---" * 7 + "|",
        *(
            f"| {row['label']} | {_format_rate(found['ats'])} | {_format_rate(found['supervised'])} | "
            f"{found['ats']['images']} | {' of '.join(map(str, found['ats']['features']))} |"
            for row in rows
            for found in row["figures"]
        ),
    ]


def _format_rate(found: Mapping[str, Any]) -> str:
    """Format one detection rate, its interval and the false positives as two table cells."""
    low, high = found["low"], found["high"]
    wrongly = f"{found['false_positives']:.1f} called stego"
    return f"{found['detection']:.1f} [{low:.1f}, {high:.1f}] | {wrongly}"


def _format_image_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format the readings of keys in images, one line for each row."""
    # Lines are rows of the experiment, which summarise all seeds.
    return [
        "| | PSNR dB | wrong bits or images | NC | log10 p | verdict |",
        "|---" * 6 + "|",
        *(
            f"| {row['label']} | {' | '.join(format_cell(name, row[name]) for name in _IMAGING)} | "
            f"{format_counts(row['outcomes'])} |"
            for row in rows
        ),
    ]
