"""Figures of results: drawn from `results/`, and stamped with what they were drawn from."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from countermark.bench.experiment import cells, load_experiment, result_path
from countermark.errors import MissingExtraError
from countermark.files import replacing

_STAMP = "Drawn from"


def false_reads(experiment: Path, results: Path) -> dict[str, Any]:
    """What the figure of false reads shows: by variant, readings of unmarked models and its own.

    Returns: by label `bits`, `own` (L2 on the marked model), and by kind of suspect `matched` and
        `L2`, one value a model.
    """
    shown = {}
    for cell in cells(load_experiment(experiment)):
        figures = json.loads(result_path(cell, results).read_text())["cell"]["figures"]
        if figures["suspects"][0]["L2"]:
            shown[cell.label] = {
                "bits": figures["bits"],
                "own": figures["E_R"],
                "suspects": {
                    each["label"]: {"matched": each["matched"], "L2": each["L2"]}
                    for each in figures["suspects"]
                },
            }
    return shown


def draw_false_reads(shown: dict[str, Any], path: Path) -> None:
    """Draw it as a PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("figures", "report") from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    bits = next(iter(shown.values()))["bits"]
    edges = np.linspace(0, bits, 33)
    colours = dict(zip(shown, ("#b44d12", "#f0c419", "#0b6e4f", "#3d7ea6"), strict=False))
    for label, each in shown.items():
        matched = [k for group in each["suspects"].values() for k in group["matched"]]
        left.hist(matched, edges, histtype="step", linewidth=2, color=colours[label], label=label)
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
            rows.append((np.maximum(group["L2"], 1e-13), colours[label]))
            names.append(f"{label}\n{kind}")
    jitter = np.random.default_rng(0)
    for at, (losses, colour) in enumerate(rows):
        right.scatter(losses, at + jitter.uniform(-0.3, 0.3, len(losses)), s=6, color=colour)
    for at, each in enumerate(shown.values()):
        groups = len(each["suspects"])
        right.plot(
            [max(each["own"], 1e-13)] * 2, [at * groups - 0.5, (at + 1) * groups - 0.5],
            color="black", linewidth=2, label="the marked model" if at == 0 else None,
        )  # fmt: skip
    right.axvline(math.log(2), color="#52606d", linestyle=":", label="ln 2: knows nothing")
    right.set(xlabel="L2, nats a bit", xscale="log", yticks=range(len(rows)))
    right.set_yticklabels(names, fontsize=7)
    right.invert_yaxis()
    right.legend(fontsize=8, loc="lower left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={_STAMP: digest(shown)})


def digest(shown: dict[str, Any]) -> str:
    """What a figure shows, as SHA-256 in hexadecimal."""
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def is_drawn_from(shown: dict[str, Any], path: Path) -> bool:
    """Whether the file is a drawing of just this."""
    stamp = f"{_STAMP}\0{digest(shown)}".encode()
    return path.exists() and stamp in path.read_bytes()
