"""Figures of Zhang et al. 2021: marked images, and the marks revealed in images."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError, DataError
from countermark.images.image_files import decode_image
from countermark_lab.experiments.experiment_types import load_any_experiment
from countermark_lab.tables.tables import load_row_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMS = "published", "default"
_COPIES = "CNet", "Res9", "Res16", "UNet"
_LOUDER = 10


def load_barriers(experiments: Path, results: Path) -> dict[str, Any]:
    """Return images as PNG in base64, by form.

    Returns: of each form the cover, the marked image, and the images revealed in both.
    """
    return _load_images(experiments, results, {form: form for form in _FORMS})


def load_copies(experiments: Path, results: Path) -> dict[str, Any]:
    """Return images of surrogates as PNG in base64, by form and surrogate.

    Returns: of each surrogate its image, and the images revealed in it and in its unmarked twin's.
    """
    labels = {f"{form}: {copy}": f"{form}: {copy}" for form in _FORMS for copy in _COPIES}
    return _load_images(experiments, results, labels)


def _load_images(experiments: Path, results: Path, labels: dict[str, str]) -> dict[str, Any]:
    """Return the images of the rows with these labels, by title."""
    experiment, shown = load_any_experiment(experiments / "zhang2021" / "derain.toml"), {}
    for title, label in labels.items():
        try:
            shown[title] = load_row_figures(experiment, label, results)[0]["pictures"]
        # Rows without results yet are left out, so that the figure can be drawn before the last
        # cell.
        except (DataError, ConfigError):
            continue
    return shown


def draw_barriers(shown: dict[str, Any], figure: Figure) -> None:
    """Draw a row of images for each form.

    The columns are the cover, the marked image, the residual ten times as strong, and the images
    revealed in the marked image and in the cover.
    """
    axes = figure.subplots(len(shown), 5, squeeze=False)
    for row, (title, each) in zip(axes, shown.items(), strict=True):
        cover, marked = _decode_levels(each["cover"]), _decode_levels(each["marked"])
        # Grey is no change: the residual has both signs.
        residual = np.clip(0.5 + _LOUDER * (marked - cover), 0, 1)
        pictures = {
            "cover": cover, "marked": marked, f"residual × {_LOUDER}": residual,
            "revealed": _decode_levels(each["revealed"]), "in the cover": _decode_levels(each["in_cover"]),
        }  # fmt: skip
        _draw_row(row, pictures, title)


def draw_copies(shown: dict[str, Any], figure: Figure) -> None:
    """Draw a row of images for each surrogate.

    The columns are its image, and the images revealed in it and in the image of its unmarked twin.
    """
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, (title, each) in zip(axes, shown.items(), strict=True):
        names = {"made": "made", "revealed": "revealed", "in_twin": "in the twin's"}
        _draw_row(row, {name: _decode_levels(each[key]) for key, name in names.items()}, title)


def _draw_row(axes: Any, pictures: dict[str, NDArray[np.float64]], title: str) -> None:
    """Draw images (C, H, W) side by side under their names; the title stands on the left."""
    for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
        # matplotlib takes grey images as (H, W), colour images as (H, W, 3).
        shown = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=8)
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel(title, fontsize=8)


def _decode_levels(png: str) -> NDArray[np.float64]:
    """Decode a PNG in base64 to levels (C, H, W) from 0 to 1."""
    found: NDArray[np.float64] = decode_image(io.BytesIO(base64.b64decode(png))) / 255.0
    return found
