"""The robustness matrix as heat maps: what every attack leaves of every scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from countermark.bench.experiment import load_experiment
from countermark.bench.outlines import outline
from countermark.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LETTERS = {"owned": "O", "not_proven": "n", "no_verdict": "?"}


def mlp(experiments: Path, results: Path) -> dict[str, Any]:
    """The matrix of the MLP; empty as long as cells are missing."""
    return _matrix(experiments / "robustness" / "mlp.toml", results)


def vgg16(experiments: Path, results: Path) -> dict[str, Any]:
    """The matrix of VGG16."""
    return _matrix(experiments / "robustness" / "vgg16.toml", results)


def _matrix(path: Path, results: Path) -> dict[str, Any]:
    """Attacks, schemes; per cell wrong bits in percent (None: unread), verdicts, accuracy lost."""
    try:
        rows = outline(load_experiment(path), results)
    except DataError:
        return {}
    marked = [row for row in rows if row["bits"]]
    return {
        "attacks": [each["label"] for each in rows[0]["attacked"]],
        "schemes": [row["label"] for row in marked],
        "wrong": [[_percent(row, each) for each in row["attacked"]] for row in marked],
        "verdicts": [[_letters(each["outcomes"]) for each in row["attacked"]] for row in marked],
        "aligned": [
            [_letters(each["aligned_outcomes"]) for each in row["attacked"]] for row in marked
        ],
        "lost": [
            [row["accuracy"]["ours"] - each["accuracy"]["ours"] for each in row["attacked"]]
            for row in marked
        ],
    }


def _percent(row: Mapping[str, Any], attack: Mapping[str, Any]) -> float | None:
    return 100 * attack["wrong"]["ours"] / row["bits"] if "wrong" in attack else None


def _letters(outcomes: Mapping[str, int]) -> str:
    """A letter for each seed."""
    return "".join(_LETTERS[outcome] * count for outcome, count in sorted(outcomes.items()))


def draw_matrix(shown: Mapping[str, Any], figure: Figure) -> None:
    """Wrong bits on the left, the accuracy that the attack costs on the right."""
    left, right = figure.subplots(1, 2, sharey=True)
    said = [
        [f"{letters} → {after}" if after else letters for letters, after in zip(*pair, strict=True)]
        for pair in zip(shown["verdicts"], shown["aligned"], strict=True)
    ]
    _map(left, shown["wrong"], said, colours=("YlOrRd", 50), label="wrong bits or triggers, %")
    points = [[f"{each:.1f}" for each in column] for column in shown["lost"]]
    _map(right, shown["lost"], points, colours=("Blues", 30), label="accuracy lost, points")
    left.set_yticks(range(len(shown["attacks"])), shown["attacks"], fontsize=7)
    for axes in (left, right):
        axes.set_xticks(
            range(len(shown["schemes"])), shown["schemes"], rotation=35, ha="right", fontsize=7
        )


def _map(
    axes: Axes, values: Sequence[Sequence[float | None]], said: Sequence[Sequence[str]],
    *, colours: tuple[str, float], label: str,
) -> None:  # fmt: skip
    """Values from 0 to the second of `colours`, a column a scheme; what is said stands in them."""
    levels = np.array(values, dtype=float).T  # None becomes NaN, which stays white
    image = axes.imshow(levels, vmin=0, vmax=colours[1], cmap=colours[0], aspect="auto")
    axes.figure.colorbar(image, ax=axes, label=label)
    for column, words in enumerate(said):
        for row, word in enumerate(words):
            dark = levels[row, column] > 0.6 * colours[1]
            axes.text(
                column, row, word, ha="center", va="center", fontsize=6,
                color="white" if dark else "black",
            )  # fmt: skip
