"""Experiments: a TOML file is a list of cells, a cell a specification with a hash.

A finished cell is a file `results/<experiment>/<hash>.json` with `cell` (specification and figures,
the same on every machine up to floating point) and `provenance`; it is never computed again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from countermark.bench.fresh import Fresh
from countermark.bench.handling import Handling
from countermark.bench.models import Value
from countermark.bench.strict import Addressed, Name, Strict
from countermark.bench.suspects import Base, Suspects
from countermark.errors import ConfigError

EXPERIMENTS = Path("experiments")

Kind = TypeVar("Kind", bound=BaseModel)


class Host(Strict):
    """What is trained: a model by name, on the first `train` images of a data set.

    `start` is a checkpoint that others may have, too; `siblings` unmarked relatives are trained for
    learnt readers; `recipe` changes fields of the host's recipe. `unit_pixels`
    gives models levels from 0 to 1 instead of standardised ones. With `teacher` the answers of the
    start replace the labels.
    """

    since = frozenset({"start", "siblings", "recipe", "unit_pixels", "teacher"})

    model: str
    model_arguments: dict[str, Value] = Field(default={})
    data: str
    train: int | None = None
    test: int | None = None
    epochs: int
    precision: Literal["fp32", "bf16"] = "fp32"
    start: Base | None = None
    siblings: int = 0
    recipe: dict[str, Any] = Field(default={})
    unit_pixels: bool = False
    teacher: bool = False

    @model_validator(mode="after")
    def _teacher_is_a_start(self) -> Self:
        if self.teacher and self.start is None:
            raise ValueError("teacher needs a start, which gives the answers")
        return self


class Step(Strict):
    """One attack by name, with its fields; on data of another domain where `data` names some.

    `grey28` makes them grey pictures of 28 × 28.
    """

    since = frozenset({"data", "grey28"})

    attack: str
    fields: dict[str, Any] = Field(default={})
    data: str = ""
    grey28: bool = False


class Attacks(Strict):
    """Attacks that a thief runs one after the other.

    With `reference` the copy is also read after alignment, to what the host started as or to the
    marked host. With `cost` it is said what share of the host's own training the attacks took.
    """

    since = frozenset({"reference", "cost"})

    label: str
    steps: tuple[Step, ...]
    reference: Literal["", "start", "marked"] = ""
    cost: bool = False


class Row(Strict):
    """One row: a scheme with its fields, or "none"; `siblings` of its own where it needs more."""

    label: str
    scheme: str = "none"
    fields: dict[str, Any] = Field(default={})
    siblings: NonNegativeInt | None = None


class Prunings(Strict):
    """Which shares of which tensors are pruned afterwards, smallest magnitudes first.

    `orders` are other ones, in turn. `alpha` is where they are judged: a rank among permutations
    takes as many as it asks for.
    """

    since = frozenset({"orders", "alpha"})

    layers: tuple[str, ...]
    fractions: tuple[float, ...]
    orders: tuple[Literal["ascending", "random", "descending"], ...] = ()
    alpha: float | None = None


class Experiment(Strict):
    """The whole file. `track` says how far it is from the paper's own scale.

    `name` is also the folder of its results. `watch` names a tensor whose values are followed.
    `fresh` is what hosts that bear DeepStego's mark are asked about beside committed triggers.
    Of any mark in answers: `handled` is what images go through before such a host sees them,
    `trials` how often another process answers from files, `pictures` how many triggers are kept.
    """

    since = frozenset({"attacks", "suspects", "watch", "fresh", "handled", "trials", "pictures"})

    name: Name
    title: str
    track: str
    seeds: tuple[int, ...]
    host: Host
    prune: Prunings | None = None
    attacks: tuple[Attacks, ...] = ()
    suspects: tuple[Suspects, ...] = ()
    watch: str = ""
    fresh: Fresh | None = None
    handled: tuple[Handling, ...] = ()
    trials: NonNegativeInt = 0
    pictures: NonNegativeInt = 0
    rows: tuple[Row, ...]


class Cell(Addressed):
    """One row at one seed."""

    since = Experiment.since

    host: Host
    prune: Prunings | None
    attacks: tuple[Attacks, ...] = ()
    suspects: tuple[Suspects, ...] = ()
    watch: str = ""
    fresh: Fresh | None = None
    handled: tuple[Handling, ...] = ()
    trials: NonNegativeInt = 0
    pictures: NonNegativeInt = 0
    label: str
    scheme: str
    fields: dict[str, Any]


def load_experiment(path: Path) -> Experiment:
    """Read the file of an experiment that trains hosts.

    Raises:
        ConfigError: it cannot be read, or has an unknown, missing or wrong field.
    """
    return read_toml(path, Experiment)


def located(name: str, folder: Path = EXPERIMENTS) -> Path:
    """The TOML file of that path, or of that name in a folder."""
    path = Path(name)
    return path if path.suffix == ".toml" else folder / f"{name}.toml"


def read_toml(path: Path, kind: type[Kind]) -> Kind:
    """Read a TOML file as a specification of this kind.

    Raises:
        ConfigError: as `load_experiment`.
    """
    try:
        return kind.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        what = kind.__name__.lower()
        raise ConfigError(f"{path}: expected a TOML file, an {what}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None


def cells(experiment: Experiment) -> Iterator[Cell]:
    """Every cell of an experiment: its rows at each of its seeds."""
    for row in experiment.rows:
        host = experiment.host
        if row.siblings is not None:
            host = host.model_copy(update={"siblings": row.siblings})
        for seed in experiment.seeds:
            yield Cell(
                experiment=experiment.name,
                track=experiment.track,
                host=host,
                prune=experiment.prune,
                attacks=experiment.attacks,
                suspects=experiment.suspects,
                watch=experiment.watch,
                fresh=experiment.fresh,
                handled=experiment.handled,
                trials=experiment.trials,
                pictures=experiment.pictures,
                label=row.label,
                scheme=row.scheme,
                fields=row.fields,
                seed=seed,
            )


def result_path(cell: Addressed, results: Path) -> Path:
    """Where the result of a cell, of any kind, lies."""
    return results / cell.experiment / f"{cell.digest}.json"
