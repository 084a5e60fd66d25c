"""The robustness matrix as heat maps: what every attack leaves of every scheme."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from countermark.bench.experiment import load_experiment
from countermark.bench.outlines import outline
from countermark.errors import DataError

if TYPE_CHECKING:
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
    wrong = np.array(shown["wrong"], dtype=float).T  # None becomes NaN, which stays white
    image = left.imshow(wrong, vmin=0, vmax=50, cmap="YlOrRd", aspect="auto")
    figure.colorbar(image, ax=left, label="wrong bits or triggers, %")
    for (scheme, verdicts), aligned in zip(
        enumerate(shown["verdicts"]), shown["aligned"], strict=True
    ):
        for attack, letters in enumerate(verdicts):
            read = f"{letters} → {aligned[attack]}" if aligned[attack] else letters
            left.text(scheme, attack, read, ha="center", va="center", fontsize=6)
    lost = np.array(shown["lost"], dtype=float).T
    image = right.imshow(lost, vmin=0, vmax=30, cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=right, label="accuracy lost, points")
    for scheme, column in enumerate(shown["lost"]):
        for attack, points in enumerate(column):
            right.text(scheme, attack, f"{points:.1f}", ha="center", va="center", fontsize=6)
    left.set_yticks(range(len(shown["attacks"])), shown["attacks"], fontsize=7)
    for axes in (left, right):
        axes.set_xticks(
            range(len(shown["schemes"])), shown["schemes"], rotation=35, ha="right", fontsize=7
        )
