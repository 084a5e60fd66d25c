"""Experiments that train hosts: a TOML file describes cells; a cell is a specification with a hash.

The result of a cell is a file `results/<experiment>/<hash>.json` with `cell` (specification and
figures, equal on every machine up to floating point) and `provenance`. A cell that has a result is
never computed again.
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

from countermark.errors import ConfigError
from countermark.training.models import Value
from countermark_lab.experiments.fresh_triggers import FreshTriggerSettings
from countermark_lab.experiments.image_transforms import ImageTransform
from countermark_lab.experiments.spec import CellSpec, Name, SpecModel
from countermark_lab.experiments.suspect_groups import StartSpec, SuspectGroup

EXPERIMENTS = Path("experiments")

Kind = TypeVar("Kind", bound=BaseModel)


class HostSettings(SpecModel):
    """The host to train: a model by name, on the first `train` images of a data set.

    `start` is a checkpoint that other people may have, too. `siblings` is the number of unmarked
    relatives that are trained for learnt readers. `recipe` changes fields of the host's recipe.
    `unit_pixels` gives models levels from 0 to 1 instead of standardised ones. With `teacher`, the
    answers of the start replace the labels.
    """

    # Fields added after the first results: left out of the hash while they are unset.
    since = frozenset({"start", "siblings", "recipe", "unit_pixels", "teacher"})

    model: str
    model_arguments: dict[str, Value] = Field(default={})
    data: str
    train: int | None = None
    test: int | None = None
    epochs: int
    precision: Literal["fp32", "bf16"] = "fp32"
    start: StartSpec | None = None
    siblings: int = 0
    recipe: dict[str, Any] = Field(default={})
    unit_pixels: bool = False
    teacher: bool = False

    @model_validator(mode="after")
    def _require_teacher_start(self) -> Self:
        """Raise ValueError for a teacher without a start."""
        if self.teacher and self.start is None:
            raise ValueError("teacher needs a start, which gives the answers")
        return self


class AttackStep(SpecModel):
    """One attack by name, with its fields.

    `data` names a data set other than the host's that the attack trains on; `grey28` turns its
    images into grey images of 28 × 28.
    """

    since = frozenset({"data", "grey28"})

    attack: str
    fields: dict[str, Any] = Field(default={})
    data: str = ""
    grey28: bool = False


class AttackChain(SpecModel):
    """A chain of attacks that a thief runs one after the other.

    With `reference`, the copy is also read after alignment to the host's start or to the marked
    host. With `cost`, the result states the cost of the attacks as a share of the host's training.
    """

    since = frozenset({"reference", "cost"})

    label: str
    steps: tuple[AttackStep, ...]
    reference: Literal["", "start", "marked"] = ""
    cost: bool = False


class SchemeRow(SpecModel):
    """One row: a scheme with its fields, or "none"; `siblings` replaces the host's number."""

    label: str
    scheme: str = "none"
    fields: dict[str, Any] = Field(default={})
    siblings: NonNegativeInt | None = None


class PruningPlan(SpecModel):
    """The shares of tensors that are pruned after training, smallest magnitudes first.

    `orders` replaces that order; each is run in turn. `alpha` is the level of the verdicts: the
    number of permutations that a rank needs grows as the level falls.
    """

    since = frozenset({"orders", "alpha"})

    layers: tuple[str, ...]
    fractions: tuple[float, ...]
    orders: tuple[Literal["ascending", "random", "descending"], ...] = ()
    alpha: float | None = None


class Experiment(SpecModel):
    """The whole experiment file. `track` says how its scale differs from the paper's.

    `name` is also the folder of the results. `watch` names a tensor whose values are recorded
    during training. `fresh` describes further triggers and forgeries for hosts with DeepStego's
    mark. For any scheme of triggers, `handled` lists image transforms that are applied before the
    host sees the images, `trials` is the number of times that another process answers from files,
    and `pictures` is the number of triggers that are stored.
    """

    since = frozenset({"attacks", "suspects", "watch", "fresh", "handled", "trials", "pictures"})

    name: Name
    title: str
    track: str
    seeds: tuple[int, ...]
    host: HostSettings
    prune: PruningPlan | None = None
    attacks: tuple[AttackChain, ...] = ()
    suspects: tuple[SuspectGroup, ...] = ()
    watch: str = ""
    fresh: FreshTriggerSettings | None = None
    handled: tuple[ImageTransform, ...] = ()
    trials: NonNegativeInt = 0
    pictures: NonNegativeInt = 0
    rows: tuple[SchemeRow, ...]


class Cell(CellSpec):
    """One row at one seed."""

    since = Experiment.since

    host: HostSettings
    prune: PruningPlan | None
    attacks: tuple[AttackChain, ...] = ()
    suspects: tuple[SuspectGroup, ...] = ()
    watch: str = ""
    fresh: FreshTriggerSettings | None = None
    handled: tuple[ImageTransform, ...] = ()
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


def locate_experiment(name: str, folder: Path = EXPERIMENTS) -> Path:
    """Return `name` itself if it is the path of a TOML file, else the file of that name."""
    path = Path(name)
    return path if path.suffix == ".toml" else folder / f"{name}.toml"


def read_toml(path: Path, kind: type[Kind]) -> Kind:
    """Read a TOML file as a specification of the given kind.

    Raises:
        ConfigError: as in `load_experiment`.
    """
    try:
        return kind.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        what = kind.__name__.lower()
        raise ConfigError(f"{path}: expected a TOML file, an {what}: {error}") from None
    except ValidationError as error:
        # One error at a time: pydantic's full text repeats the input over many lines.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None


def expand_cells(experiment: Experiment) -> Iterator[Cell]:
    """Yield every cell of an experiment: each row at each seed."""
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


def get_result_path(cell: CellSpec, results: Path) -> Path:
    """Return the path of the result of a cell of any kind."""
    return results / cell.experiment / f"{cell.digest}.json"
