"""The kinds of experiments: hosts that are trained, stego images that are sought, images of images.

A file says what it is by one of its tables: `[host]`, `[sought]` or `[images]`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from countermark.bench.detection import Detected, Detection, cells_of
from countermark.bench.experiment import (
    Cell,
    Experiment,
    cells,
    load_experiment,
    located,
    read_toml,
)
from countermark.bench.imaging.experiment import ImagingCell, ImagingExperiment, imaging_cells

AnyExperiment: TypeAlias = Experiment | Detection | ImagingExperiment
AnyCell: TypeAlias = Cell | Detected | ImagingCell

_TOLD_BY: Mapping[str, type[Detection | ImagingExperiment]] = {
    "sought": Detection, "images": ImagingExperiment,
}  # fmt: skip


def load_any(path: Path) -> AnyExperiment:
    """Read an experiment file of any kind.

    Raises:
        ConfigError: it cannot be read, or has an unknown, missing or wrong field.
    """
    try:
        told = tomllib.loads(path.read_text()).keys() & _TOLD_BY.keys()
    except (OSError, ValueError):
        told = set()  # reading it as a host's says what is wrong
    return read_toml(path, _TOLD_BY[told.pop()]) if told else load_experiment(path)


def find_experiment(name: str) -> AnyExperiment:
    """An experiment by its file, or by its name under `experiments/`.

    Raises:
        ConfigError: as `load_any`.
    """
    return load_any(located(name))


def is_experiment(path: Path) -> bool:
    """Whether a file is one of an experiment, and not of a table."""
    try:
        return bool(tomllib.loads(path.read_text()).keys() & {"host", *_TOLD_BY})
    except (OSError, ValueError):
        return True  # reading it as one says what is wrong


def every_cell(experiment: AnyExperiment) -> Iterator[AnyCell]:
    """Every cell of an experiment of any kind."""
    if isinstance(experiment, Detection):
        yield from cells_of(experiment)
    elif isinstance(experiment, ImagingExperiment):
        yield from imaging_cells(experiment)
    else:
        yield from cells(experiment)
