"""The three kinds of experiments: on trained hosts, on steganalysis, and on networks of images.

One of the tables in a file shows its kind: `[host]`, `[sought]` or `[images]`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from countermark_lab.experiments.detection import Detection, DetectionCell, expand_detection_cells
from countermark_lab.experiments.experiment import (
    Cell,
    Experiment,
    expand_cells,
    load_experiment,
    locate_experiment,
    read_toml,
)
from countermark_lab.image_models.experiment import (
    ImagingCell,
    ImagingExperiment,
    list_imaging_cells,
)

AnyExperiment: TypeAlias = Experiment | Detection | ImagingExperiment
AnyCell: TypeAlias = Cell | DetectionCell | ImagingCell

# The table that only files of this kind have.
_TOLD_BY: Mapping[str, type[Detection | ImagingExperiment]] = {
    "sought": Detection, "images": ImagingExperiment,
}  # fmt: skip


def load_any_experiment(path: Path) -> AnyExperiment:
    """Read an experiment file of any kind.

    Raises:
        ConfigError: it cannot be read, or has an unknown, missing or wrong field.
    """
    try:
        told = tomllib.loads(path.read_text()).keys() & _TOLD_BY.keys()
    except (OSError, ValueError):
        told = set()  # `load_experiment` below reads the file again and raises the error
    return read_toml(path, _TOLD_BY[told.pop()]) if told else load_experiment(path)


def find_experiment(name: str) -> AnyExperiment:
    """Read an experiment, given its file or its name under `experiments/`.

    Raises:
        ConfigError: as in `load_any_experiment`.
    """
    return load_any_experiment(locate_experiment(name))


def is_experiment(path: Path) -> bool:
    """Return true if a TOML file describes an experiment rather than a table."""
    try:
        return bool(tomllib.loads(path.read_text()).keys() & {"host", *_TOLD_BY})
    except (OSError, ValueError):
        return True  # reading the file as an experiment raises an error that says what is wrong


def expand_any_cells(experiment: AnyExperiment) -> Iterator[AnyCell]:
    """Yield every cell of an experiment of any kind."""
    # Each kind has cells of its own class, since their fields, and so their hashes, differ.
    if isinstance(experiment, Detection):
        yield from expand_detection_cells(experiment)
    elif isinstance(experiment, ImagingExperiment):
        yield from list_imaging_cells(experiment)
    else:
        yield from expand_cells(experiment)
