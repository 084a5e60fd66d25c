"""Experiments: a TOML file is a list of cells, a cell a specification with a hash, a result a JSON.

A finished cell is a file `results/<experiment>/<hash>.json` with `cell` (specification and figures,
the same on every machine up to floating point) and `provenance`; it is never computed again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import rfc8785
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
)

from countermark._version import VERSION
from countermark.attacks import attack_named
from countermark.attacks.prune import Prune
from countermark.bench.data import Dataset, load_data
from countermark.bench.embed import load_into
from countermark.bench.models import Value, build, recipe
from countermark.bench.siblings import Siblings, train_siblings
from countermark.bench.suspects import CACHE, Base, Suspects, judged
from countermark.bench.train import Checkpoint, Course, accuracy, fit, seeded
from countermark.errors import ConfigError
from countermark.examine import examine, read_evidence
from countermark.files import write_bytes
from countermark.key import Key, KeyMaterial
from countermark.schemes import scheme_named
from countermark.verdict import Terms


class _Strict(BaseModel):
    """A part of a specification.

    A field of `since`, added after cells had been computed, is left out where it is not set: what
    a cell is called must not change with the library.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    since: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {n: v for n, v in handler(self).items() if v or n not in self.since}


class Host(_Strict):
    """What is trained: a model by name, on the first `train` images of a data set.

    `start` is a checkpoint that others may have, too; `siblings` unmarked relatives are trained for
    learnt readers.
    """

    since = frozenset({"start", "siblings"})

    model: str
    model_arguments: dict[str, Value] = {}
    data: str
    train: int | None = None
    test: int | None = None
    epochs: int
    precision: Literal["fp32", "bf16"] = "fp32"
    start: Base | None = None
    siblings: int = 0


class Step(_Strict):
    """One attack by name, with its fields."""

    attack: str
    fields: dict[str, Any] = {}


class Attacks(_Strict):
    """Attacks that a thief runs one after the other."""

    label: str
    steps: tuple[Step, ...]


class Row(_Strict):
    """One row of a table: a scheme with its fields, or "none"; what the source prints for it.

    `paper` has figures by column, `paper_pruned` wrong bits by pruned fraction.
    """

    label: str
    scheme: str = "none"
    fields: dict[str, Any] = {}
    paper: dict[str, float] = {}
    paper_pruned: dict[str, float] = {}


class Prunings(_Strict):
    """Which shares of which tensors are pruned afterwards, smallest magnitudes first."""

    layers: tuple[str, ...]
    fractions: tuple[float, ...]


class Experiment(_Strict):
    """The whole file. `track` says how far it is from the paper's own scale.

    `name` is also the folder of its results.
    """

    since = frozenset({"attacks", "suspects"})

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)*$")]
    title: str
    track: str
    source: str
    seeds: tuple[int, ...]
    host: Host
    prune: Prunings | None = None
    attacks: tuple[Attacks, ...] = ()
    suspects: tuple[Suspects, ...] = ()
    rows: tuple[Row, ...]


class Cell(_Strict):
    """One row at one seed."""

    since = Experiment.since

    experiment: str
    track: str
    host: Host
    prune: Prunings | None
    attacks: tuple[Attacks, ...] = ()
    suspects: tuple[Suspects, ...] = ()
    label: str
    scheme: str
    fields: dict[str, Any]
    seed: int

    @property
    def digest(self) -> str:
        """The cell's name: a hash of its specification."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()[:16]


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        ConfigError: it cannot be read, or has an unknown, missing or wrong field.
    """
    try:
        return Experiment.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: expected an experiment as TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None


def cells(experiment: Experiment) -> Iterator[Cell]:
    """Every cell of an experiment: its rows at each of its seeds."""
    for row in experiment.rows:
        for seed in experiment.seeds:
            yield Cell(
                experiment=experiment.name,
                track=experiment.track,
                host=experiment.host,
                prune=experiment.prune,
                attacks=experiment.attacks,
                suspects=experiment.suspects,
                label=row.label,
                scheme=row.scheme,
                fields=row.fields,
                seed=seed,
            )


def run(experiment: Experiment, results: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Compute the cells that have no result yet, one after the other; yields each result."""
    for cell in cells(experiment):
        path = result_path(cell, results)
        if not path.exists():
            started = time.monotonic()
            figures = compute(cell, path.with_suffix(".checkpoint"))
            content = {
                "cell": cell.model_dump(mode="json") | {"figures": figures},
                "provenance": _provenance(time.monotonic() - started),
            }
            write_bytes(path, json.dumps(content, indent=1).encode() + b"\n")
        yield cell, json.loads(path.read_text())


def result_path(cell: Cell, results: Path) -> Path:
    """Where the result of a cell lies."""
    return results / cell.experiment / f"{cell.digest}.json"


def compute(cell: Cell, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train one host, marked or not, and measure it before and after what a thief does.

    Returns: accuracy in percent; for a marked host the bits that are right, E_R (L2) per bit in
        nats, log10 p and outcome; the same at every pruned fraction and after every attack; and
        what the key reads in every group of suspects.
    """
    data = load_data(cell.host.data).subset(cell.host.train, cell.host.test)
    saving = Checkpoint(checkpoint) if checkpoint else None
    model, key = _trained(cell, data, saving)
    figures = measured(model, key) | {"accuracy": 100 * accuracy(model, data)}
    if cell.prune:
        figures["pruned"] = [
            {"fraction": fraction}
            | measured(thinned := _pruned(model, cell.prune, fraction), key)
            | {"accuracy": 100 * accuracy(thinned, data)}
            for fraction in cell.prune.fractions
        ]
    for attacks in cell.attacks:
        stolen = model
        for step in attacks.steps:
            stolen = attack_named(step.attack).from_fields(step.fields).run(stolen, data).model
        after = measured(stolen, key) | {"accuracy": 100 * accuracy(stolen, data)}
        figures.setdefault("attacked", []).append({"label": attacks.label} | after)
    if key is not None and cell.suspects:
        figures["suspects"] = [
            judged(group, list(group.specs(cell.seed, cell.host.epochs, _start(cell))), key,
                   cell.seed)
            for group in cell.suspects
        ]  # fmt: skip
    if saving:
        saving.remove()
    return figures


def _trained(
    cell: Cell, data: Dataset, checkpoint: Checkpoint | None
) -> tuple[torch.nn.Module, Key | None]:
    model, host_recipe = _host(cell), recipe(cell.host.model)
    course = Course(cell.host.epochs, cell.seed, cell.host.precision)
    if cell.scheme == "none":
        fit(model, data, host_recipe, course, checkpoint=checkpoint)
        return model, None
    scheme = scheme_named(cell.scheme).from_fields(cell.fields)
    siblings = Siblings()
    if cell.host.siblings and not scheme.linear:
        siblings = train_siblings(
            lambda: _host(cell), data, host_recipe, course,
            count=cell.host.siblings, folder=CACHE / "siblings" / _host_digest(cell),
        )  # fmt: skip
    with scheme.embed(
        model,
        owner="bench",
        material=KeyMaterial.for_tests(cell.seed),
        unmarked=siblings.shown,
        siblings=siblings.held_out,
    ) as mark:
        fit(model, data, host_recipe, course, mark=mark, checkpoint=checkpoint)
    return model, mark.drawn_key  # whether or not the mark took: what happened is recorded


def _host(cell: Cell) -> torch.nn.Module:
    """The host before training."""
    seeded(cell.seed, "init")
    model = build(cell.host.model, cell.host.model_arguments)
    start = _start(cell)
    if start is not None:
        load_into(model, start)
    return model


def _start(cell: Cell) -> Path | None:
    return None if cell.host.start is None else cell.host.start.path(cell.host.data)


def _host_digest(cell: Cell) -> str:
    """What the unmarked siblings of a cell's host follow from."""
    content: dict[str, Any] = {"host": cell.host.model_dump(mode="json"), "seed": cell.seed}
    return hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]


def measured(model: torch.nn.Module, key: Key | None) -> dict[str, Any]:
    """What a key reads from a model, as figures; none without a key."""
    if key is None:
        return {}
    evidence = read_evidence(model, key)
    verdict = examine(model, key, Terms(assume_dated=True, allow_test_key=True))
    return {
        "bits": verdict.bits,
        "wrong": verdict.bits - evidence.matched,
        "E_R": evidence.cross_entropy,
        "log10_p": verdict.log10_p,
        "outcome": verdict.outcome,
    }


def _pruned(model: torch.nn.Module, prune: Prunings, fraction: float) -> torch.nn.Module:
    return Prune(fraction, layers=prune.layers).run(model).model


def _commit() -> str:
    """The commit of the source tree this runs from, with -dirty where files were changed."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match=v*"]
    try:
        described = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "no repository"
    return described.stdout.strip()


def _provenance(seconds: float) -> dict[str, Any]:
    return {
        "countermark": VERSION,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
