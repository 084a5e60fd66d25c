"""Robustness matrix as heat maps: damage of every attack to the mark of every scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from countermark.errors import DataError
from countermark_lab.experiments.experiment import load_experiment
from countermark_lab.tables.outlines import outline_experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LETTERS = {"owned": "O", "not_proven": "n", "no_verdict": "?"}


def load_mlp_matrix(experiments: Path, results: Path) -> dict[str, Any]:
    """Return the matrix of the MLP; empty as long as cells are missing."""
    return _load_matrix(experiments / "robustness" / "mlp.toml", results)


def load_vgg16_matrix(experiments: Path, results: Path) -> dict[str, Any]:
    """Return the matrix of VGG16; empty as long as cells are missing."""
    return _load_matrix(experiments / "robustness" / "vgg16.toml", results)


def _load_matrix(path: Path, results: Path) -> dict[str, Any]:
    """Return the matrix of an experiment.

    Returns: names of attacks and schemes; per scheme and attack the wrong bits in percent (None if
        unread), the letters of the verdicts without and with alignment, and the accuracy lost.
    """
    try:
        rows = outline_experiment(load_experiment(path), results)
    except DataError:
        return {}
    # The unmarked row of the experiment has no bits and no verdicts.
    marked = [row for row in rows if row["bits"]]
    return {
        "attacks": [each["label"] for each in rows[0]["attacked"]],
        "schemes": [row["label"] for row in marked],
        "wrong": [
            [_compute_wrong_percent(row, each) for each in row["attacked"]] for row in marked
        ],
        "verdicts": [
            [_format_outcomes(each["outcomes"]) for each in row["attacked"]] for row in marked
        ],
        "aligned": [
            [_format_outcomes(each["aligned_outcomes"]) for each in row["attacked"]]
            for row in marked
        ],
        "lost": [
            [row["accuracy"]["ours"] - each["accuracy"]["ours"] for each in row["attacked"]]
            for row in marked
        ],
    }


def _compute_wrong_percent(row: Mapping[str, Any], attack: Mapping[str, Any]) -> float | None:
    """Return the wrong bits after an attack in percent; None if the mark was not read."""
    return 100 * attack["wrong"]["ours"] / row["bits"] if "wrong" in attack else None


def _format_outcomes(outcomes: Mapping[str, int]) -> str:
    """Return the verdicts as text, one letter for each seed."""
    return "".join(_LETTERS[outcome] * count for outcome, count in sorted(outcomes.items()))


def draw_matrix(shown: Mapping[str, Any], figure: Figure) -> None:
    """Draw wrong bits on the left, and the accuracy that the attack costs on the right."""
    left, right = figure.subplots(1, 2, sharey=True)
    said = [
        [f"{letters} → {after}" if after else letters for letters, after in zip(*pair, strict=True)]
        for pair in zip(shown["verdicts"], shown["aligned"], strict=True)
    ]
    # Random bits are wrong in 50 %, so that the colours end there.
    _draw_heat_map(
        left, shown["wrong"], said, colours=("YlOrRd", 50), label="wrong bits or triggers, %"
    )
    points = [[f"{each:.1f}" for each in column] for column in shown["lost"]]
    _draw_heat_map(
        right, shown["lost"], points, colours=("Blues", 30), label="accuracy lost, points"
    )
    left.set_yticks(range(len(shown["attacks"])), shown["attacks"], fontsize=7)
    for axes in (left, right):
        axes.set_xticks(
            range(len(shown["schemes"])), shown["schemes"], rotation=35, ha="right", fontsize=7
        )


def _draw_heat_map(
    axes: Axes, values: Sequence[Sequence[float | None]], said: Sequence[Sequence[str]],
    *, colours: tuple[str, float], label: str,
) -> None:  # fmt: skip
    """Draw one heat map with a text in each cell.

    Args:
        axes: where to draw.
        values: a column for each scheme, a value for each attack.
        said: text of each cell, in the same order.
        colours: name of the colour map, and the value of its last colour; the first is that of 0.
        label: of the colour bar.
    """
    levels = np.array(values, dtype=float).T  # None becomes NaN, which stays white
    image = axes.imshow(levels, vmin=0, vmax=colours[1], cmap=colours[0], aspect="auto")
    axes.figure.colorbar(image, ax=axes, label=label)
    for column, words in enumerate(said):
        for row, word in enumerate(words):
            # White text on dark cells stays readable; a comparison with NaN gives black.
            dark = levels[row, column] > 0.6 * colours[1]
            axes.text(
                column, row, word, ha="center", va="center", fontsize=6,
                color="white" if dark else "black",
            )  # fmt: skip
