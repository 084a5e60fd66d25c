"""Figures of Li and Guo 2019, and further figures that the paper lacks."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from countermark_lab.experiments.experiment import expand_cells, get_result_path, load_experiment
from countermark_lab.tables.tables import load_row_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMS = {"vgg16": "DeepStego", "published": "as published"}  # by experiment
_TIMES = 5  # the residual is drawn five times as strong, as in the paper
_KINDS = {
    "owner": ("owner's fresh triggers", "#0b6e4f"),
    "foreign": ("foreign networks", "#b44d12"),
    "pasted": ("residuals of other images", "#f0c419"),
}


def list_triggers(experiments: Path, results: Path) -> dict[str, Any]:
    """Return committed triggers of every scheme: bytes in base64 and their shape, by row."""
    return {
        label: {name: figures["pictures"][name] for name in ("shape", "triggers")}
        for label, figures in _load_measured_rows(experiments, results)
        if "pictures" in figures
    }


def draw_triggers(shown: Mapping[str, Any], figure: Figure) -> None:
    """Draw a row of images for each scheme."""
    rows = {label: _decode_images(each["triggers"], each["shape"]) for label, each in shown.items()}
    _draw_image_rows(rows, figure)


def list_stego_images(experiments: Path, results: Path) -> dict[str, Any]:
    """Return covers and fresh triggers of both forms: bytes in base64 and their shape."""
    return {
        label: {name: figures["pictures"][name] for name in ("shape", "accuracy", "fresh")}
        for label, figures in _load_measured_rows(experiments, results)
        if label in _FORMS.values() and "pictures" in figures
    }


def draw_stego(shown: Mapping[str, Any], figure: Figure) -> None:
    """Draw the covers of each form, the triggers, and their differences, magnified."""
    rows = {}
    for label, each in shown.items():
        covers, made = (_decode_images(each[name], each["shape"]) for name in ("accuracy", "fresh"))
        # Bytes would wrap around in the difference, hence int.
        apart = _TIMES * np.abs(made.astype(int) - covers)
        rows[f"{label}:\ncovers"] = covers
        rows[f"{label}:\ntriggers"] = made
        rows[f"{label}:\n{_TIMES} × residual"] = np.minimum(apart, 255).astype(np.uint8)
    _draw_image_rows(rows, figure)


def measure_strength(experiments: Path, results: Path) -> dict[str, Any]:
    """Return the share of stego images that fire the host against their PSNR.

    Shares are in percent; points are listed by form and kind of image.
    """
    found: dict[str, Any] = {}
    for label, figures in _load_measured_rows(experiments, results):
        if label not in _FORMS.values():
            continue
        found[label] = {"accuracy": figures["accuracy"]}
        for kind in _KINDS:
            found[label][kind] = [
                {name: each[name] for name in ("number", "psnr", "fired")}
                for each in figures["forgeries"]
                if each["kind"] == kind
            ]
    return found


def draw_strength(shown: Mapping[str, Any], figure: Figure) -> None:
    """Draw a panel for each form: a curve for the owner, one for each forger."""
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axis, (form, each) in zip(panels, shown.items(), strict=True):
        for kind, (says, colour) in _KINDS.items():
            for number in sorted({point["number"] for point in each[kind]}):
                curve = [point for point in each[kind] if point["number"] == number]
                # A curve over PSNR needs its points in the order of PSNR.
                curve.sort(key=lambda point: point["psnr"])
                at, fired = ([point[name] for point in curve] for name in ("psnr", "fired"))
                # One legend entry for each kind, not for each network.
                label = says if number == 0 else None
                axis.plot(at, fired, color=colour, marker="o", ms=3, label=label)
        axis.axhline(each["accuracy"], color="#52606d", linestyle=":", label="test accuracy")
        axis.set(xlabel="PSNR, dB", ylabel="fire the host, %", title=form, ylim=(0, 100))
        axis.legend(fontsize=8)


def measure_removal(experiments: Path, results: Path) -> dict[str, Any]:
    """Return accuracy, committed and fresh triggers in percent, and log10 p, after each attack.

    Returns: `pruned, %` and `fine-tuned, SGD`, each a list of points with `at`; empty as long as
        cells are missing.
    """
    for label, figures in _load_measured_rows(experiments, results):
        if label == _FORMS["vgg16"]:
            # Both curves begin at the model before any attack.
            before = {"at": "0", **_summarise_copy(figures)}
            pruned = [
                {"at": f"{100 * each['fraction']:g}", **_summarise_copy(each)}
                for each in figures["pruned"]
            ]
            tuned = [
                {"at": each["label"].removeprefix("fine-tuned, SGD "), **_summarise_copy(each)}
                for each in figures["attacked"]
                if each["label"].startswith("fine-tuned")
            ]
            return {"pruned, %": [before, *pruned], "fine-tuned, SGD": [before, *tuned]}
    return {}


def draw_removal(shown: Mapping[str, Any], figure: Figure) -> None:
    """Draw shares above and log10 p below; pruning on the left, fine-tuning on the right."""
    panels = figure.subplots(2, len(shown), sharex="col", squeeze=False)
    colours = {"accuracy": "#9aa5b1", "committed": "#0b6e4f", "fresh": "#3d7ea6"}
    for (above, below), (title, points) in zip(panels.T, shown.items(), strict=True):
        at = [point["at"] for point in points]
        for name, colour in colours.items():
            above.plot(at, [point[name] for point in points], color=colour, marker="o", label=name)
        below.plot(at, [point["log10_p"] for point in points], color="#b44d12", marker="o")
        below.axhline(-6, color="#52606d", linestyle=":", label="alpha 1e-6")
        above.set(ylabel="%", ylim=(0, 100))
        below.set(ylabel="log10 p", xlabel=title)
        below.tick_params(axis="x", rotation=30)
        above.legend(fontsize=8)
        below.legend(fontsize=8)


def _summarise_copy(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return accuracy, triggers in percent, and log10 p of one copy."""
    matched = 1 - figures["wrong"] / figures["bits"]
    return {
        "accuracy": figures["accuracy"],
        "committed": 100 * matched,
        "fresh": figures["fresh_fired"],
        "log10_p": figures["log10_p"],
    }


def _load_measured_rows(
    experiments: Path, results: Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield label and figures of every row of the two experiments, if all cells have results."""
    for name in _FORMS:
        experiment = load_experiment(experiments / "li2019" / f"{name}.toml")
        if all(get_result_path(cell, results).exists() for cell in expand_cells(experiment)):
            for row in experiment.rows:
                yield row.label, load_row_figures(experiment, row.label, results)[0]


def _decode_images(encoded: Sequence[str], shape: Sequence[int]) -> NDArray[np.uint8]:
    """Decode images from base64 to an array (n, C, H, W)."""
    drawn = [np.frombuffer(base64.b64decode(each), dtype=np.uint8) for each in encoded]
    return np.stack(drawn).reshape(-1, *shape)


def _draw_image_rows(rows: Mapping[str, NDArray[np.uint8]], figure: Figure) -> None:
    """Draw images (n, C, H, W) side by side, each row beside its name."""
    most = max(len(pictures) for pictures in rows.values())
    panels = figure.subplots(len(rows), most, squeeze=False)
    for axes, (label, pictures) in zip(panels, rows.items(), strict=True):
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        # Rows may hold fewer images than the longest row.
        for axis, picture in zip(axes, pictures, strict=False):
            axis.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
        for axis in axes:
            axis.set(xticks=[], yticks=[], frame_on=False)
