"""Figures of results: drawn from `results/`, each file marked with the digest of its data.

A figure consists of two functions: one returns its data as JSON values, the other draws them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark._internal.files import replace_file
from countermark.errors import MissingExtraError, find_by_name
from countermark_lab.figures import li2019, robustness, uchida2017, wang2020, zhang2021

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STAMP = "Drawn from"

Shown = Mapping[str, Any]


@dataclass(frozen=True)
class FigureSpec:
    """One figure.

    Attributes:
        caption: states the content in one sentence.
        shown: returns the data of the figure from the folders of experiments and results; empty as
            long as no cell has been computed.
        size: in inches.
        draw: draws the data on a matplotlib figure.
    """

    caption: str
    shown: Callable[[Path, Path], Shown]
    size: tuple[float, float]
    draw: Callable[[Any, Figure], None]


FIGURES: Mapping[str, FigureSpec] = {
    "wang2020/figure1": FigureSpec(
        "Figure 1: weights of the unmarked MLP against epochs, and how many have converged",
        wang2020.load_trajectories, (9, 4), wang2020.draw_trajectories,
    ),
    "wang2020/figure4": FigureSpec(
        "Figure 4: accuracy and L2 after compression, removing weights in three orders",
        wang2020.load_compression, (11, 9), wang2020.draw_compression,
    ),
    "wang2020/figure5": FigureSpec(
        "Figure 5: histograms of the marked layer",
        wang2020.load_histograms, (9, 5), wang2020.draw_histograms,
    ),
    "wang2020/capacity": FigureSpec(
        "Bits right against the size of the watermark, and Cover's limit of linear keys; VGG16 "
        "scaled down: 10 epochs, at 512 bits 20",
        wang2020.load_capacity, (9, 4), wang2020.draw_capacity,
    ),
    "wang2020/gate": FigureSpec(
        "Magnitude of AUTO's gate against each weight's convergence",
        wang2020.load_gates, (11, 4.5), wang2020.draw_gates,
    ),
    "wang2020/false_reads": FigureSpec(
        "Matching bits and L2 on unmarked models",
        wang2020.load_false_reads, (9, 6), wang2020.draw_false_reads,
    ),
    "uchida2017/pruning": FigureSpec(
        "Bit errors and accuracy against the pruned share of the marked layer",
        uchida2017.load_pruning, (8, 4), uchida2017.draw_pruning,
    ),
    "li2019/table1": FigureSpec(
        "Table 1 as pictures: what the triggers of each scheme look like",
        li2019.list_triggers, (9, 6), li2019.draw_triggers,
    ),
    "li2019/table4": FigureSpec(
        "Table 4: covers, fresh triggers, and five times what is between them",
        li2019.list_stego_images, (9, 6), li2019.draw_stego,
    ),
    "li2019/strength": FigureSpec(
        "Stego images that fire the host, against their PSNR: the owner's and forgeries",
        li2019.measure_strength, (10, 4), li2019.draw_strength,
    ),
    "li2019/removal": FigureSpec(
        "What pruning and fine-tuning leave of the default form",
        li2019.measure_removal, (11, 6), li2019.draw_removal,
    ),
    "robustness/mlp": FigureSpec(
        "What attacks leave of marks in an MLP; a letter for each seed: O owned, n not proven, "
        "? no verdict, after the arrow when the copy is aligned first",
        robustness.load_mlp_matrix, (11, 10), robustness.draw_matrix,
    ),
    "robustness/vgg16": FigureSpec(
        "What attacks leave of marks in VGG16, one seed: O owned, n not proven, ? no verdict, "
        "after the arrow when the copy is aligned first",
        robustness.load_vgg16_matrix, (12, 11), robustness.draw_matrix,
    ),
    "zhang2021/barriers": FigureSpec(
        "What the barrier adds, and what is revealed in marked images and in others",
        zhang2021.load_barriers, (9, 6), zhang2021.draw_barriers,
    ),
    "zhang2021/copies": FigureSpec(
        "What surrogates make, and what is revealed in it",
        zhang2021.load_copies, (5, 13), zhang2021.draw_copies,
    ),
}  # fmt: skip


def find_figure(name: str) -> FigureSpec:
    """Return the figure of that name.

    Raises:
        ConfigError: there is no such figure; the message names the nearest.
    """
    return find_by_name("figure", name, FIGURES)


def draw_png(drawing: FigureSpec, shown: Shown, path: Path) -> None:
    """Draw the data of a figure as a PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        # The product runs without matplotlib, which is imported only to draw.
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("figures", "report") from None
    figure = Figure(figsize=drawing.size, layout="constrained")
    drawing.draw(shown, figure)
    with replace_file(path) as temporary:
        # The PNG comment holds the digest: bytes of a PNG differ between versions of matplotlib.
        figure.savefig(temporary, format="png", dpi=110, metadata={_STAMP: compute_digest(shown)})


def compute_digest(shown: Shown) -> str:
    """Return the SHA-256 of the data of a figure, in hexadecimal."""
    # Sorted keys: equal data have equal digests, whatever order they were made in.
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def is_drawn_from(shown: Shown, path: Path) -> bool:
    """Return true if the file is a drawing of exactly these data."""
    # PNG separates keyword and text of a tEXt chunk by a zero byte.
    stamp = f"{_STAMP}\0{compute_digest(shown)}".encode()
    return path.exists() and stamp in path.read_bytes()
