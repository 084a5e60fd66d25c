"""Figures of Wang et al. 2020, and further figures that the paper lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from countermark.training.weight_history import BIN, CONVERGED_STD, WINDOW
from countermark_lab.experiments.experiment import (
    Experiment,
    expand_cells,
    get_result_path,
    load_experiment,
)
from countermark_lab.tables.columns import COLUMNS
from countermark_lab.tables.tables import load_row_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "not embedded": "#9aa5b1",
    "[7], mean": "#f0c419",
    "[7], sum": "#a67c00",
    "MANU": "#e07b39",
    "AUTO": "#b44d12",
    "MANU, hardened": "#3d7ea6",
    "AUTO, hardened": "#0b6e4f",
}
HOSTS = {"MLP": "mlp", "VGG16": "vgg16"}
_FLOOR = 1e-13  # of a loss on a logarithmic axis


def load_false_reads(experiments: Path, results: Path) -> dict[str, Any]:
    """Return readings of unmarked models and of the marked model, by variant.

    Returns: by label `bits`, `own` (L2 on the marked model), and by kind of suspect `matched` and
        `L2`, one value for each model.
    """
    experiment = load_experiment(experiments / "wang2020" / "unmarked.toml")
    shown = {}
    for row in experiment.rows:
        figures = load_row_figures(experiment, row.label, results)[0]
        # Only a learnt reader has L2 readings of suspects.
        if figures["suspects"][0]["L2"]:
            shown[row.label] = {
                "bits": figures["bits"],
                "own": figures["E_R"],
                "suspects": {
                    each["label"]: {"matched": each["matched"], "L2": each["L2"]}
                    for each in figures["suspects"]
                },
            }
    return shown


def draw_false_reads(shown: dict[str, Any], figure: Figure) -> None:
    """Draw matching bits on the left, L2 on the right."""
    left, right = figure.subplots(1, 2)
    bits = next(iter(shown.values()))["bits"]
    edges = np.linspace(0, bits, 33)
    colours = dict(zip(shown, ("#b44d12", "#f0c419", "#0b6e4f", "#3d7ea6"), strict=False))
    for label, each in shown.items():
        matched = [k for group in each["suspects"].values() for k in group["matched"]]
        left.hist(matched, edges, histtype="step", linewidth=2, color=colours[label], label=label)
    # Standard deviation of a binomial count of `bits` fair coins.
    spread = math.sqrt(bits) / 2
    left.axvspan(
        bits / 2 - 3 * spread, bits / 2 + 3 * spread, color="#9aa5b1", alpha=0.4,
        label="fair coins, 3 σ",
    )  # fmt: skip
    left.set(xlabel=f"matching bits out of {bits}", ylabel="unmarked models", yscale="log")
    left.legend(fontsize=8)
    rows, names = [], []
    for label, each in shown.items():
        for kind, group in each["suspects"].items():
            rows.append((np.maximum(group["L2"], _FLOOR), colours[label]))
            names.append(f"{label}\n{kind}")
    # Points are spread within their row; seeded, so that the drawing is reproducible.
    jitter = np.random.default_rng(0)
    for at, (losses, colour) in enumerate(rows):
        right.scatter(losses, at + jitter.uniform(-0.3, 0.3, len(losses)), s=6, color=colour)
    for at, each in enumerate(shown.values()):
        # The bar of the marked model spans all rows of its variant.
        groups = len(each["suspects"])
        right.plot(
            [max(each["own"], _FLOOR)] * 2, [at * groups - 0.5, (at + 1) * groups - 0.5],
            color="black", linewidth=2, label="the marked model" if at == 0 else None,
        )  # fmt: skip
    right.axvline(math.log(2), color="#52606d", linestyle=":", label="ln 2: knows nothing")
    right.set(xlabel="L2, nats a bit", xscale="log", yticks=range(len(rows)))
    right.set_yticklabels(names, fontsize=7)
    right.invert_yaxis()
    right.legend(fontsize=8, loc="lower left")


def load_trajectories(experiments: Path, results: Path) -> dict[str, Any]:
    """Return the data of Figure 1.

    Returns: a few weights of the unmarked MLP by epoch, and by epoch the share of converged
        weights, for each seed.
    """
    experiment = _load_experiment(experiments, "mlp")
    watched = [each["watched"] for each in load_row_figures(experiment, "not embedded", results)]
    return {
        "weights": watched[0]["trajectories"],
        "converged": [each["converged"] for each in watched],
    }


def draw_trajectories(shown: dict[str, Any], figure: Figure) -> None:
    """Draw weights on the left, the converged share on the right."""
    left, right = figure.subplots(1, 2)
    for each in shown["weights"]:
        left.plot(range(1, len(each) + 1), each, linewidth=1)
    left.set(xlabel="epoch", ylabel="weight", title="weights between hidden and output layer")
    for number, each in enumerate(shown["converged"], start=1):
        epochs = range(WINDOW, WINDOW + len(each))
        right.plot(epochs, [100 * share for share in each], label=f"seed {number}")
    right.plot(16, 35, "k*", label="the paper: about 35 % after 16")
    right.set(
        xlabel="epoch", ylabel="converged weights, %",
        title=f"deviation of the last {WINDOW} epochs below {CONVERGED_STD}",
    )  # fmt: skip
    right.legend(fontsize=8)


def load_compression(experiments: Path, results: Path) -> dict[str, Any]:
    """Return the data of Figure 4.

    Returns: accuracy and L2 against the removed share, by host, order and method.
    """
    shown: dict[str, Any] = {}
    for host, name in HOSTS.items():
        experiment = _load_experiment(experiments, name)
        if not _is_finished(experiment, results):
            continue
        for label in COLOURS:
            seeds = load_row_figures(experiment, label, results)
            # The k-th entry of every seed has the same fraction and order.
            for points in zip(*(each["pruned"] for each in seeds), strict=True):
                point = {
                    "fraction": points[0]["fraction"],
                    "accuracy": _average_points(points, "accuracy"),
                }
                if "E_R" in points[0]:
                    point["L2"] = _average_points(points, "E_R")
                by_label = shown.setdefault(host, {}).setdefault(points[0]["order"], {})
                by_label.setdefault(label, []).append(point)
    return shown


def draw_compression(shown: dict[str, Any], figure: Figure) -> None:
    """Draw a column for each order of removal.

    Each host has a row of accuracies and a row of losses.
    """
    axes = figure.subplots(2 * len(shown), 3, squeeze=False)
    for at, (host, orders) in enumerate(shown.items()):
        for column, (order, methods) in enumerate(orders.items()):
            above, below = axes[2 * at][column], axes[2 * at + 1][column]
            for label, points in methods.items():
                removed = [100 * point["fraction"] for point in points]
                above.plot(removed, [p["accuracy"] for p in points], color=COLOURS[label])
                if "L2" in points[0]:
                    # A loss of 0 has no place on a logarithmic axis.
                    losses = [max(point["L2"], _FLOOR) for point in points]
                    below.plot(removed, losses, color=COLOURS[label], label=label)
            below.axhline(math.log(2), color="#52606d", linestyle=":", label="ln 2")
            above.set(title=f"{host}, {order}", ylabel="accuracy, %")
            below.set(xlabel="removed, %", ylabel="L2", yscale="log")
    axes[1][0].legend(fontsize=7)


def load_histograms(experiments: Path, results: Path) -> dict[str, Any]:
    """Return the data of Figure 5.

    Returns: the weights of the marked layer in bins of .1, by host and method, at the first seed.
    """
    return {
        host: {
            label: load_row_figures(experiment, label, results)[0]["watched"]["histogram"]
            for label in COLOURS
        }
        for host, experiment in _load_hosts(experiments, results).items()
    }


def draw_histograms(shown: dict[str, Any], figure: Figure) -> None:
    """Draw one panel for each host."""
    for axis, (host, methods) in zip(figure.subplots(1, len(shown), squeeze=False)[0],
                                     shown.items(), strict=True):  # fmt: skip
        for label, each in methods.items():
            edges = BIN * (each["first"] + np.arange(len(each["counts"]) + 1))
            axis.stairs(each["counts"], edges, color=COLOURS[label], label=label, linewidth=1.3)
        axis.set(xlabel="weight", ylabel="weights", title=host)
        axis.legend(fontsize=7)


def load_capacity(experiments: Path, results: Path) -> dict[str, Any]:
    """Return bits right in percent against the size of the watermark, by host and method."""
    shown: dict[str, Any] = {}
    for host, experiment in _load_hosts(experiments, results).items():
        larger = _load_experiment(experiments, f"{HOSTS[host]}_capacity")
        if not _is_finished(larger, results):
            continue
        for source in (experiment, larger):
            for row in source.rows:
                # Rows of the larger experiment append their number of bits to the name of the
                # method.
                label = row.label.partition(f", {row.fields.get('bits', 0):,} bits")[0]
                # Unmarked rows hold no bits; methods without a colour are not drawn.
                if row.scheme == "none" or label not in COLOURS:
                    continue
                seeds = load_row_figures(source, row.label, results)
                right = [COLUMNS["bit_accuracy"].read(each) for each in seeds]
                points = shown.setdefault(host, {}).setdefault(label, [])
                points.append({"bits": row.fields["bits"], "right": right})
                points.sort(key=lambda point: point["bits"])
    return shown


LIMITS = {"MLP": 2 * 640, "VGG16": 2 * 1728}
"""Cover 1965: a linear reader holds about two arbitrary bits for each weight."""


def draw_capacity(shown: dict[str, Any], figure: Figure) -> None:
    """Draw one panel for each host, with the limit of linear readers."""
    for axis, (host, methods) in zip(figure.subplots(1, len(shown), squeeze=False)[0],
                                     shown.items(), strict=True):  # fmt: skip
        for label, points in methods.items():
            sizes = [point["bits"] for point in points]
            means = [float(np.mean(point["right"])) for point in points]
            axis.plot(sizes, means, marker="o", ms=3, color=COLOURS[label], label=label)
        axis.axvline(
            LIMITS[host], color="#52606d", linestyle=":", label="Cover's limit, linear keys"
        )
        axis.set(xlabel="bits", ylabel="bits right, %", xscale="log", title=host)
        axis.set_xticks([256, 512, 1024, 2048, 4096], ["256", "512", "1024", "2048", "4096"])
        axis.minorticks_off()
        axis.legend(fontsize=7)


def load_gates(experiments: Path, results: Path) -> dict[str, Any]:
    """Return data on whether AUTO's gate prefers converged weights, which the paper leaves open.

    Returns: by host and method, over all seeds, the gate's magnitudes, the deviations of the
        weights over epochs 2 to 6 (`early`) and over the last five (`late`), and for each seed the
        rank correlation (Spearman) of the magnitudes with both.
    """
    shown: dict[str, Any] = {}
    for host, experiment in _load_hosts(experiments, results).items():
        for label in ("AUTO", "AUTO, hardened"):
            seeds = [each["watched"] for each in load_row_figures(experiment, label, results)]
            shown.setdefault(host, {})[label] = {
                "gate": [x for each in seeds for x in each["gate"]],
                "early": [x for each in seeds for x in each["early"]],
                "late": [x for each in seeds for x in each["late"]],
                "spearman": {
                    when: [_correlate_ranks(each["gate"], each[when]) for each in seeds]
                    for when in ("early", "late")
                },
            }
    return shown


def draw_gates(shown: dict[str, Any], figure: Figure) -> None:
    """Draw one panel for each host and method: magnitude against deviation."""
    panels = [(host, label, each) for host, by in shown.items() for label, each in by.items()]
    for axis, (host, label, each) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                         panels, strict=True):  # fmt: skip
        for when, colour in (("early", "#f0c419"), ("late", "#b44d12")):
            ranks = ", ".join(f"{rank:+.2f}" for rank in each["spearman"][when])
            shown_as = f"{when}, rank correlation {ranks}"
            axis.scatter(each[when], each["gate"], s=3, color=colour, label=shown_as)
        axis.axvline(CONVERGED_STD, color="#52606d", linestyle=":", label="converged below")
        axis.set(xlabel="deviation over five epochs", xscale="log", title=f"{host}, {label}")
        axis.set_ylabel("magnitude of the gate")
        axis.legend(fontsize=7)


def _load_experiment(experiments: Path, name: str) -> Experiment:
    """Load an experiment of this paper by its name."""
    return load_experiment(experiments / "wang2020" / f"{name}.toml")


def _load_hosts(experiments: Path, results: Path) -> dict[str, Experiment]:
    """Return the experiments of the paper's hosts whose cells all have results."""
    found = {host: _load_experiment(experiments, name) for host, name in HOSTS.items()}
    return {host: each for host, each in found.items() if _is_finished(each, results)}


def _is_finished(experiment: Experiment, results: Path) -> bool:
    """Return true if every cell of an experiment has a result."""
    return all(get_result_path(cell, results).exists() for cell in expand_cells(experiment))


def _average_points(points: tuple[Mapping[str, Any], ...], name: str) -> float:
    """Return the mean of one figure over the points of all seeds."""
    return float(np.mean([point[name] for point in points]))


def _correlate_ranks(one: list[float], other: list[float]) -> float:
    """Compute Spearman's rank correlation."""
    # scipy is slow to import, and only this figure needs it.
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)
