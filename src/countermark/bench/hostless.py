"""Pages of the experiments that train no classifier: detection rates, and images made of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from countermark.bench.detection import Detection
from countermark.bench.imaging.experiment import ImagingExperiment
from countermark.bench.kinds import every_cell
from countermark.bench.tables import counted, figures_of, shown_cell, summary

_IMAGING = ("psnr", "wrong", "nc", "log10_p")


def hostless_outline(
    experiment: Detection | ImagingExperiment, results: Path, labels: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of one such experiment as JSON values.

    Args:
        experiment: which.
        results: folder of the results.
        labels: of its rows; None for all.

    Returns: label, track and, of stego images that are sought, the `figures` of each seed; of
        images the number of seeds, a summary of each column, and `outcomes`, counts of verdicts.

    Raises:
        DataError: a cell has no result yet.
    """
    rows = []
    for label in dict.fromkeys(cell.label for cell in every_cell(experiment)):
        if labels is not None and label not in labels:
            continue
        figures = figures_of(experiment, label, results)
        row: dict[str, Any] = {"label": label, "track": experiment.track, "seeds": len(figures)}
        if isinstance(experiment, Detection):
            row["figures"] = figures
        else:
            row |= {name: summary([each[name] for each in figures]) for name in _IMAGING}
            row["outcomes"] = dict(Counter(each["outcome"] for each in figures))
        rows.append(row)
    return rows


def hostless_lines(
    experiment: Detection | ImagingExperiment, rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The same as lines of Markdown."""
    return _rates(rows) if isinstance(experiment, Detection) else _images(rows)


def _rates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Detection rates with their intervals; a line for each row and seed."""
    return [
        "Detection in percent of N images of which half are stego images; 95 % in brackets.",
        "",
        "| | ATS | of covers | supervised | of covers | N | features |",
        "|---" * 7 + "|",
        *(
            f"| {row['label']} | {_rate(found['ats'])} | {_rate(found['supervised'])} | "
            f"{found['ats']['images']} | {' of '.join(map(str, found['ats']['features']))} |"
            for row in rows
            for found in row["figures"]
        ),
    ]


def _rate(found: Mapping[str, Any]) -> str:
    low, high = found["low"], found["high"]
    wrongly = f"{found['false_positives']:.1f} called stego"
    return f"{found['detection']:.1f} [{low:.1f}, {high:.1f}] | {wrongly}"


def _images(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the keys read in images, by barrier and by copy."""
    return [
        "| | PSNR dB | wrong bits or images | NC | log10 p | verdict |",
        "|---" * 6 + "|",
        *(
            f"| {row['label']} | {' | '.join(shown_cell(name, row[name]) for name in _IMAGING)} | "
            f"{counted(row['outcomes'])} |"
            for row in rows
        ),
    ]
