"""Figures of Uchida et al. 2017."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark_lab.experiments.experiment import load_experiment
from countermark_lab.tables.tables import load_row_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load_pruning(experiments: Path, results: Path) -> dict[str, Any]:
    """Return wrong bits and accuracy in percent against the pruned share, by type of key."""
    experiment = load_experiment(experiments / "uchida2017" / "pruning.toml")
    shown = {}
    for row in experiment.rows:
        figures = load_row_figures(experiment, row.label, results)[0]
        shown[row.label] = [
            {
                "fraction": each["fraction"],
                "wrong": 100 * each["wrong"] / each["bits"] if "wrong" in each else None,
                "accuracy": each["accuracy"],
            }
            # The figures of the unpruned model are the first point of the curve.
            for each in [{**figures, "fraction": 0.0}, *figures["pruned"]]
        ]
    return shown


def draw_pruning(shown: dict[str, Any], figure: Figure) -> None:
    """Draw bit errors on the left, accuracy on the right."""
    left, right = figure.subplots(1, 2)
    for label, each in shown.items():
        at = [100 * point["fraction"] for point in each]
        # The unmarked row has an accuracy only.
        if each[0]["wrong"] is not None:
            left.plot(at, [point["wrong"] for point in each], marker="o", ms=3, label=label)
        right.plot(at, [point["accuracy"] for point in each], marker="o", ms=3, label=label)
    left.axvline(65, color="#52606d", linestyle=":", label="65 %: no errors in the paper")
    left.set(xlabel="pruned share of the marked layer, %", ylabel="wrong bits, %")
    right.set(xlabel="pruned share of the marked layer, %", ylabel="test accuracy, %")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
