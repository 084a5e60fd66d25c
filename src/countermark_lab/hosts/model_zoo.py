"""Unmarked hosts by the hundred, to test null hypotheses on.

The cache holds each host under the digest of everything that determines its weights: an interrupted
command continues, and no host is trained twice. The small MLPs are trained many at a time
(`stack`), all other hosts one after the other, by `fit`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import rfc8785
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark._internal.progress import show_progress
from countermark.checkpoints import load_state, open_weights, save_weights
from countermark.errors import ConfigError
from countermark.training.data import Dataset, load_data
from countermark.training.embed_classifier import check_fit, load_into
from countermark.training.loop import Course, accuracy, fit_to_file, seed_torch
from countermark.training.models import Recipe, Value, build, recipe
from countermark_lab.hosts.grey_images import (
    check_fits_mlp,
    convert_to_grey28,
    select_training_rows,
)
from countermark_lab.hosts.stack import Stack

Arrays: TypeAlias = dict[str, NDArray[np.float32]]

CACHE = Path(".cache/hosts")
AT_A_TIME = 16  # as quick as 8 or 64 (docs/performance.md); a killed process loses few


@dataclass(frozen=True)
class HostSpec:
    """Specification of an unmarked host: everything that determines its weights.

    Attributes:
        data: as `load_data` takes it.
        seed: of the initial weights (unused with a `start`).
        epochs: passes over the training rows.
        order: seed of the data order; None for `seed`.
        rows: first and one past the last training row; None for all.
        grey28: grey (Rec. 601 luma), cropped to the middle 28 x 28 pixels.
        unit_pixels: levels from 0 to 1 instead of standardised levels.
        start: a weight file to begin from; its content enters the digest, not its name.
        model: as `build` takes it; a factory enters the digest by its name alone.
        arguments: arguments of the model, in the form that `sort_fields` makes.
        recipe: changed fields of the model's recipe, in the form that `sort_fields` makes.

    Raises:
        ConfigError: epochs below 0, an unknown model, a wrong field of the recipe.
    """

    data: str
    seed: int
    _: KW_ONLY
    epochs: int
    order: int | None = None
    rows: tuple[int, int] | None = None
    grey28: bool = False
    unit_pixels: bool = False
    start: str | None = None
    model: str = "mlp"
    arguments: tuple[tuple[str, Value], ...] = ()
    recipe: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ConfigError(f"a host needs epochs >= 0, got {self.epochs}")
        # Called for its errors: a wrong recipe is refused when the spec is made.
        recipe(self.model, dict(self.recipe))

    @property
    def data_order(self) -> int:
        """Seed of the data order: `order`, or `seed` without one."""
        return self.seed if self.order is None else self.order

    @property
    def full_recipe(self) -> Recipe:
        """The model's recipe with its changes."""
        return recipe(self.model, dict(self.recipe))

    @property
    def is_stackable(self) -> bool:
        """True for a small MLP, which is trained together with others."""
        default, own = recipe("mlp"), self.full_recipe
        # `Stack` knows plain Adam: only learning rate and batch size may differ.
        alike = replace(own, lr=default.lr, batch_size=default.batch_size) == default
        return self.model == "mlp" and not self.arguments and alike

    @property
    def digest(self) -> str:
        """Name of the host, 16 hexadecimal digits: a hash of its canonical JSON.

        Raises:
            SuspectError: `start` cannot be read.
        """
        names = ("data", "seed", "epochs", "rows", "grey28", "start")
        content = {name: getattr(self, name) for name in names} | {"order": self.data_order}
        if self.start is not None:
            with open_weights(self.start) as weights:
                # A checkpoint that is moved or renamed still gives the same host.
                content["start"] = weights.compute_file_digest()
        how = asdict(self.full_recipe)
        # Newer fields are left out while they are unset, so that no cached host is renamed.
        # The digest of a small MLP is older than other models and recipes: it must not change.
        if self.is_stackable:
            content |= {name: how[name] for name in ("lr", "batch_size")}
        else:
            content |= {"model": self.model, "arguments": dict(self.arguments), "recipe": how}
        if self.unit_pixels:
            content["unit_pixels"] = True
        return hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]


def sort_fields(fields: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Convert arguments, or changes of a recipe, to sorted pairs, with lists as tuples."""
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(fields.items())
    )


def train_hosts(
    specs: Sequence[HostSpec], cache: Path, *, at_a_time: int = AT_A_TIME
) -> Iterator[tuple[HostSpec, Arrays]]:
    """Train the hosts that `cache` lacks, then read all of them.

    Training is over when the call returns; a host is read when the iterator reaches it. Small MLPs
    are trained on the CPU; each other host on the device that `fit` takes, from its checkpoint on.

    Args:
        specs: the hosts; the results come in this order.
        cache: folder of the files `<digest>.safetensors`; created if it is missing.
        at_a_time: small MLPs trained together, and lost together when the process is killed.

    Returns: each spec with its weights by name; of a small MLP "0.weight" (64, 784), "0.bias"
        (64,), "2.weight" (10, 64), "2.bias" (10,).

    Raises:
        ConfigError: `at_a_time` is below 1, or a `start` or the data do not fit the model.
        DataError: the data cannot be read, have fewer rows or do not fit the small MLP.
        SuspectError: a `start` or a file of the cache cannot be read.
    """
    if at_a_time < 1:
        raise ConfigError(f"at_a_time must be at least 1, got {at_a_time}")
    paths = {spec: host_path(spec, cache) for spec in specs}
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):  # cells that run side by side share the hosts
        # Keyed by path: specs with equal digests are trained once.
        missing = {path: spec for spec, path in paths.items() if not path.exists()}
        stacked = [spec for spec in missing.values() if spec.is_stackable]
        epochs = sum(spec.epochs for spec in stacked)
        with show_progress("training hosts, epochs", epochs) as advance:
            for group, data in _group_for_stacks(stacked, at_a_time):
                for spec, state in _train_together(group, data, advance):
                    save_weights(state, paths[spec])
        alone = [spec for spec in missing.values() if not spec.is_stackable]
        for number, (spec, data) in enumerate(_pair_with_data(alone), 1):
            what = f"unmarked host {number} of {len(alone)}"
            course = Course(spec.epochs, spec.data_order, what=what)
            fit_to_file(
                _build_initial_host(spec),
                _select_host_data(spec, data),
                spec.full_recipe,
                course,
                paths[spec],
            )
    # A generator: hundreds of hosts need not fit into memory.
    return ((spec, _load_arrays(paths[spec])) for spec in specs)


@dataclass(frozen=True)
class ZooExtension:
    """Result of `extend_zoo`.

    Attributes:
        there: number of hosts that the cache had already.
        trained: number of hosts trained in this call, without the base.
        seconds: CPU time of the training, including that of a base.
        accuracies: share of the test images, 0 to 1, that each host classifies correctly.
    """

    there: int
    trained: int
    seconds: float
    accuracies: tuple[float, ...]


def extend_zoo(
    like: HostSpec, count: int, *, cache: Path, base: HostSpec | None = None,
    at_a_time: int = AT_A_TIME,
) -> ZooExtension:  # fmt: skip
    """Train `count` hosts, unless the cache has them, and test all of them.

    Args:
        like: the first host; the others take the next seeds.
        count: number of hosts.
        cache: as for `train_hosts`.
        base: all hosts begin with the final weights of this one.
        at_a_time: as for `train_hosts`.

    Raises:
        ConfigError: `count` is below 1; else as `train_hosts`, and nothing is written.
    """
    if count < 1:
        raise ConfigError(f"count is {count}: expected at least 1 host")
    # Data that do not fit are refused before anything is trained.
    data, began = load_host_data(like), time.process_time()
    if base is not None:
        train_hosts([base], cache, at_a_time=at_a_time)
        # All hosts start from the same weights, but each has a data order of its own seed.
        like = replace(like, start=str(host_path(base, cache)))
    specs = [replace(like, seed=like.seed + number) for number in range(count)]
    there = sum(host_path(spec, cache).exists() for spec in specs)
    hosts = train_hosts(specs, cache, at_a_time=at_a_time)
    seconds, found = time.process_time() - began, []
    with show_progress("testing hosts", count) as advance:
        for spec, weights in hosts:
            found.append(measure_test_accuracy(spec, weights, data))
            advance(1)
    return ZooExtension(there, count - there, seconds, tuple(found))


def host_path(spec: HostSpec, cache: Path) -> Path:
    """Return the weight file of a host in the cache; it can be the `start` of another host."""
    return cache / f"{spec.digest}.safetensors"


def load_host_data(spec: HostSpec) -> Dataset:
    """Load the data of a host: its training rows, their scale, and every test row.

    Raises:
        ConfigError: the model does not take the data, or cannot be built.
        DataError: the data cannot be read, have fewer rows or do not fit the small MLP.
    """
    return _select_host_data(spec, _load_images(spec.data, spec.grey28))


def measure_test_accuracy(
    spec: HostSpec, weights: Mapping[str, NDArray[np.float32]], data: Dataset
) -> float:
    """Return the share of test images, 0 to 1, that a host classifies correctly.

    Args:
        spec: the host.
        weights: its weights by name.
        data: as `load_host_data` returns it.
    """
    model = _build_host(spec)
    model.load_state_dict({name: torch.from_numpy(each) for name, each in weights.items()})
    return accuracy(model.to(Course(0).resolve_device()), data)


measure_test_accuracy.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


def _train_together(
    specs: Sequence[HostSpec], data: Dataset, advance: Callable[[float], None]
) -> Iterator[tuple[HostSpec, dict[str, Tensor]]]:
    """Train hosts as one stack; yield each spec with its weights by name."""
    parts = {
        (s.rows, s.unit_pixels): _select_host_data(s, data) for s in specs
    }  # one scale for each range
    stack = Stack(
        [_build_initial_host(spec).state_dict() for spec in specs],
        [parts[spec.rows, spec.unit_pixels] for spec in specs],
        [spec.data_order for spec in specs],
        specs[0].full_recipe,
    )
    stack.train(specs[0].epochs, advance)
    return zip(specs, stack.list_states(), strict=True)


def _group_for_stacks(
    specs: Iterable[HostSpec], at_a_time: int
) -> Iterator[tuple[list[HostSpec], Dataset]]:
    """Yield groups of hosts that can be stacked, with their data.

    A group has at most `at_a_time` hosts; each data set is read once.
    """
    for alike in _group_by(lambda spec: (spec.data, spec.grey28), specs):
        data = _load_images(alike[0].data, alike[0].grey28)
        # A stack takes equally many steps of equal size: rows, recipe and epochs must agree.
        for hosts in _group_by(lambda s: (_count_rows(s.rows), s.full_recipe, s.epochs), alike):
            for at in range(0, len(hosts), at_a_time):
                yield hosts[at : at + at_a_time], data


def _pair_with_data(specs: Iterable[HostSpec]) -> Iterator[tuple[HostSpec, Dataset]]:
    """Yield each host with its data; each data set is read once."""
    # Groups of one host only serve to read each data set once.
    for (host,), data in _group_for_stacks(specs, 1):
        yield host, data


def _group_by(
    key: Callable[[HostSpec], Hashable], specs: Iterable[HostSpec]
) -> Iterable[list[HostSpec]]:
    """Group specs by a key, in the order in which the keys appear."""
    groups: dict[Hashable, list[HostSpec]] = {}
    for spec in specs:
        groups.setdefault(key(spec), []).append(spec)
    return groups.values()


def _count_rows(rows: tuple[int, int] | None) -> int | None:
    """Return the number of rows in a range; None for all rows."""
    return rows[1] - rows[0] if rows else None


def _load_images(name: str, grey: bool) -> Dataset:
    """Load a data set, in grey and cropped to 28 x 28 if `grey` is true."""
    data = load_data(name)
    return convert_to_grey28(data) if grey else data


def _select_host_data(spec: HostSpec, data: Dataset) -> Dataset:
    """Return the part of a data set that a host sees; raise an error if it does not fit."""
    seen = replace(select_training_rows(data, spec.rows), unit_pixels=spec.unit_pixels)
    if spec.is_stackable:
        check_fits_mlp(seen)
    else:
        check_fit(spec.model, _build_host(spec), seen)
    return seen


def _build_initial_host(spec: HostSpec) -> nn.Module:
    """Build the host as it is before training."""
    model = _build_host(spec)
    if spec.start is not None:
        load_into(model, Path(spec.start))
    return model


def _build_host(spec: HostSpec) -> nn.Module:
    """Build the model of a host with the initial weights of its seed."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on undisturbed
        seed_torch(spec.seed, "init")
        return build(spec.model, dict(spec.arguments))


def _load_arrays(path: Path) -> Arrays:
    """Read the weights of a file as arrays by name."""
    return {name: tensor.numpy() for name, tensor in load_state(path).items()}
