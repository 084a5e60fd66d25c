"""The figures of Zhang et al. 2021: what is hidden, and what is revealed."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from countermark.bench.kinds import load_any
from countermark.bench.tables import figures_of
from countermark.errors import ConfigError, DataError
from countermark.images.image_files import decode_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMS = "published", "default"
_COPIES = "CNet", "Res9", "Res16", "UNet"
_LOUDER = 10


def barriers(experiments: Path, results: Path) -> dict[str, Any]:
    """Pictures as PNG in base64, by form: cover, marked, and what is revealed in either."""
    return _pictures(experiments, results, {form: form for form in _FORMS})


def copies(experiments: Path, results: Path) -> dict[str, Any]:
    """The same of surrogates: what they made, and what is revealed in it."""
    labels = {f"{form}: {copy}": f"{form}: {copy}" for form in _FORMS for copy in _COPIES}
    return _pictures(experiments, results, labels)


def _pictures(experiments: Path, results: Path, labels: dict[str, str]) -> dict[str, Any]:
    experiment, shown = load_any(experiments / "zhang2021" / "derain.toml"), {}
    for title, label in labels.items():
        try:
            shown[title] = figures_of(experiment, label, results)[0]["pictures"]
        except (DataError, ConfigError):
            continue
    return shown


def draw_barriers(shown: dict[str, Any], figure: Figure) -> None:
    """A row a form: cover, marked, residual ten times as loud, revealed in marked and in cover."""
    axes = figure.subplots(len(shown), 5, squeeze=False)
    for row, (title, each) in zip(axes, shown.items(), strict=True):
        cover, marked = _levels(each["cover"]), _levels(each["marked"])
        residual = np.clip(0.5 + _LOUDER * (marked - cover), 0, 1)
        pictures = {
            "cover": cover, "marked": marked, f"residual × {_LOUDER}": residual,
            "revealed": _levels(each["revealed"]), "in the cover": _levels(each["in_cover"]),
        }  # fmt: skip
        _row(row, pictures, title)


def draw_copies(shown: dict[str, Any], figure: Figure) -> None:
    """A row a surrogate: what it made, what is revealed in it, and in its unmarked twin's."""
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, (title, each) in zip(axes, shown.items(), strict=True):
        names = {"made": "made", "revealed": "revealed", "in_twin": "in the twin's"}
        _row(row, {name: _levels(each[key]) for key, name in names.items()}, title)


def _row(axes: Any, pictures: dict[str, NDArray[np.float64]], title: str) -> None:
    for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
        shown = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=8)
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel(title, fontsize=8)


def _levels(png: str) -> NDArray[np.float64]:
    found: NDArray[np.float64] = decode_image(io.BytesIO(base64.b64decode(png))) / 255.0
    return found
