"""The columns of the result tables: which figure of a cell each column shows, and how."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a result table: one figure of a cell, with its heading and decimals."""

    title: str
    read: Callable[[Figures], Any]
    decimals: int = 2


def _compute_bit_accuracy(figures: Figures) -> float:
    """Return the share of matching bits, in percent."""
    return 100 * (1 - float(figures["wrong"]) / float(figures["bits"]))


def _compute_false_reads(figures: Figures) -> float:
    """Return the percentage of unmarked hosts that give every bit of the message."""
    # The first group of suspects in every experiment are hosts with other initial weights.
    strangers = figures["suspects"][0]
    return 100 * float(strangers["all_bits"]) / float(strangers["hosts"])


def _compute_strangers_triggers(figures: Figures) -> float:
    """Return the mean percentage of triggers that unmarked hosts answer as the key wants."""
    strangers = figures["suspects"][0]
    return 100 * float(statistics.mean(strangers["matched"])) / float(strangers["bits"])


# These figures exist for the host, after every attack and at every pruned fraction.
_READ: Mapping[str, Column] = {
    "accuracy": Column("accuracy %", lambda f: f["accuracy"]),
    "bit_accuracy": Column("bits right %", _compute_bit_accuracy),
    "wrong": Column("wrong bits", lambda f: f["wrong"], 1),
    "E_R": Column("L2 (E_R per bit)", lambda f: f["E_R"], 4),
    "log10_p": Column("log10 p", lambda f: f["log10_p"], 1),
    "outcome": Column("verdict", lambda f: f["outcome"]),
    "cost": Column("cost, % of training", lambda f: f["cost"], 0),
    "triggers": Column("committed triggers %", _compute_bit_accuracy, 1),
    "fresh": Column("fresh triggers %", lambda f: f["fresh_fired"], 1),
}


def _make_reading_columns(when: str) -> dict[str, Column]:
    """Make a column for each basic figure, with `when` in its name and heading."""
    return {
        f"{when}_{name}": replace(column, title=f"{column.title}, {when}")
        for name, column in _READ.items()
    }


def _make_answer_columns(prefix: str, when: str) -> dict[str, Column]:
    """Make columns for the answers to test images, committed triggers and fresh triggers."""
    titles = {"accuracy": "accuracy %", "triggers": "committed triggers %", "fresh": "fresh %"}
    # `name=name` binds the name of this turn of the loop; a lambda would see the last one.
    return {
        f"{prefix}_{name}": Column(f"{title}, {when}", lambda f, name=name: f[name], 1)  # type: ignore[misc]
        for name, title in titles.items()
    }


def _make_detection_columns(method: str, title: str) -> dict[str, Column]:
    """Make columns for a detection rate and the ends of its 95 % interval."""
    ends = {"": "detection", "_low": "low", "_high": "high"}
    says = {"": f"{title} %", "_low": "95 % from", "_high": "to"}
    return {
        f"{method}{end}": Column(says[end], lambda f, name=name: f[method][name], 1)  # type: ignore[misc]
        for end, name in ends.items()
    }


def _make_moved_column(how: str) -> Column:
    """Make a column for the wrong bits in images that were shifted or cropped."""
    return Column(f"wrong bits, {how}", lambda figures: figures["moved"][how]["wrong"], 1)


# Files under tables/ name columns by these keys, so a key must not change.
COLUMNS: Mapping[str, Column] = {
    **_READ,
    "selected": Column("weights selected", lambda f: f["selected"], 0),
    "false_reads": Column("false reads %", _compute_false_reads, 0),
    **_make_reading_columns("after"),
    **_make_reading_columns("pruned"),
    "unmarked_triggers": Column("triggers % of unmarked models", _compute_strangers_triggers, 1),
    "forged_fired": Column("fire %", lambda f: f["fired"], 1),
    "forged_kept": Column("cover's class %", lambda f: f["kept"], 1),
    "forged_psnr": Column("PSNR dB", lambda f: f["psnr"], 1),
    "forged_ssim": Column("SSIM", lambda f: f["ssim"], 3),
    **_make_answer_columns("handled", "handled"),
    **_make_answer_columns("machines", "another machine"),
    **_make_detection_columns("ats", "ATS"),
    **_make_detection_columns("supervised", "supervised"),
    "unmarked": Column("accuracy % unmarked", lambda f: f["accuracy"]),
    "psnr": Column("PSNR dB", lambda f: f["psnr"], 1),
    "ssim": Column("SSIM", lambda f: f["ssim"], 3),
    "image_ber": Column("bit error rate of an image", lambda f: f["image_ber"], 4),
    "success": Column("NC > .95, % of images", _compute_bit_accuracy, 0),
    "nc": Column("NC", lambda f: f["nc"], 3),
    "nc_blank": Column("NC of a blank", lambda f: f["nc_blank"], 3),
    "twin_wrong": Column("wrong bits, unmarked twin", lambda f: f["twin"]["wrong"], 1),
    "twin_success": Column(
        "NC > .95, unmarked twin", lambda f: _compute_bit_accuracy(f["twin"]), 0
    ),
    "twin_outcome": Column("verdict, unmarked twin", lambda f: f["twin"]["outcome"]),
    "twin_psnr": Column("PSNR dB, unmarked twin", lambda f: f["twin"]["psnr"], 1),
    "photographs_wrong": Column("wrong bits, photographs", lambda f: f["unmarked"]["wrong"], 1),
    "shifted_wrong": _make_moved_column("shifted by 1"),
    "moved_wrong": _make_moved_column("shifted by 5 and 11"),
    "cropped_wrong": _make_moved_column("cropped by 8 and enlarged"),
    "photographs_outcome": Column("verdict, photographs", lambda f: f["unmarked"]["outcome"]),
}
"""By name. `after_…` and `pruned_…` look at an attack's or a pruning's figures, `forged_…` at those
of one kind of stego images, `handled_…` at those of handled ones, `machines_…` at the mean of what
another machine answered, `ats…` and `supervised…` at detection rates and their intervals,
`unmarked` at the cells of the same experiment that bear no mark."""
