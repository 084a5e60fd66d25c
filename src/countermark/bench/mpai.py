"""The evaluation of MPAI-NNW: imperceptibility, robustness and cost of a marking technology.

M unmarked networks and D payloads give M×D marked ones. One modification at one value is applied to
all M×(D + 1). The detector runs on each: false positives, false negatives. The decoder runs on the
marked ones: mean symbol error rate. The key is unknown to whoever modifies.
"""

from __future__ import annotations

import copy
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from countermark._version import VERSION
from countermark.attacks import attack_named
from countermark.bench.data import Dataset, load_data
from countermark.bench.marking import marking, scheme_for
from countermark.bench.models import Recipe, build, recipe
from countermark.bench.siblings import Siblings, train_siblings
from countermark.bench.train import Course, accuracy, batches_of, fit, seeded
from countermark.errors import ConfigError
from countermark.examine import examine
from countermark.key import Key, KeyMaterial
from countermark.progress import progress
from countermark.verdict import ALPHA, Terms, Verdict

Modification: TypeAlias = tuple[str, Mapping[str, Any]]

# The kinds of the standard, each at some values; what needs a field of the host is left out.
MODIFICATIONS: tuple[Modification, ...] = (
    ("noise", {"std": 0.1}), ("noise", {"std": 0.5}), ("noise", {"std": 1.0}),
    ("quantise", {"bits": 8}), ("quantise", {"bits": 4}), ("quantise", {"bits": 2}),
    ("prune", {"fraction": 0.5}), ("prune", {"fraction": 0.9}),
    ("prune", {"fraction": 0.5, "order": "random"}),
    ("fine_tune", {"lr": 0.001}), ("fine_tune", {"lr": 0.01}),
    ("imitate", {"epochs": 3}), ("permute", {}), ("rescale", {}),
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What is evaluated.

    Attributes:
        scheme, fields: the technology.
        model, data, train: the networks, what they learn, and on how many rows; None for all.
        epochs: of each network, and of each marking, which goes on from it.
        networks, payloads: M and D.
        siblings: unmarked relatives of each network, for schemes that need some; insertion pays.
        alpha: of the detector.
        modifications: what is done to every network.
    """

    scheme: str
    fields: Mapping[str, Any]
    model: str = "mlp"
    data: str = "digits"
    train: int | None = None
    epochs: int = 3
    networks: int = 2
    payloads: int = 2
    siblings: int = 8
    alpha: float = ALPHA
    modifications: Sequence[Modification] = MODIFICATIONS


@dataclass(frozen=True)
class _Network:
    """An unmarked network, trained in so many seconds; the marked ones and their keys likewise."""

    plain: nn.Module
    marked: list[nn.Module]
    keys: list[Key]
    trained: float
    seconds: float


def evaluate(trial: Trial) -> dict[str, Any]:
    """Mark, modify, detect and decode; all of it on test keys, dated by assumption.

    Returns: `trial`, `imperceptibility` (accuracies in percent), `robustness` (one row for each
        modification), `cost` (CPU seconds of inserting, and as a multiple of training the unmarked
        network; of detecting and decoding; memory), versions.

    Raises:
        ConfigError: scheme, model and fields do not fit.
    """
    if trial.networks < 1 or trial.payloads < 1:
        raise ConfigError("mpai needs at least one network and one payload")
    data = load_data(trial.data).subset(trial.train)
    memory = _peak()
    networks = [_marked(trial, data, number) for number in range(trial.networks)]
    inserting = sum(each.seconds for each in networks) / (trial.networks * trial.payloads)
    training = min(each.trained for each in networks)  # the first one also loads what it needs
    before = [100 * accuracy(each.plain, data) for each in networks]
    after = [100 * accuracy(one, data) for each in networks for one in each.marked]
    rows = [_robustness(trial, networks, data, None)]
    with progress("mpai, modifications", len(trial.modifications)) as advance:
        for modification in trial.modifications:
            rows.append(_robustness(trial, networks, data, modification))
            advance(1)
    detecting = _seconds(lambda: _verdict(trial, networks[0].marked[0], networks[0].keys[0]))
    return {
        "trial": _as_json(trial),
        "imperceptibility": {
            "accuracy_unmarked": statistics.mean(before), "accuracy_marked": statistics.mean(after),
        },
        "robustness": rows,
        "cost": {
            "insert_seconds": inserting, "insert_ratio": inserting / training,
            "detect_and_decode_seconds": detecting,
            "peak_memory_mib": _peak(), "of_which_before_mib": memory,
        },
        "countermark": VERSION,
    }  # fmt: skip


def _marked(trial: Trial, data: Dataset, number: int) -> _Network:
    how, course = recipe(trial.model), Course(trial.epochs, number)
    seeded(number, "init")
    plain, start = build(trial.model, {}), time.process_time()
    fit(plain, data, how, course)
    trained = time.process_time() - start
    scheme = scheme_for(trial.scheme, trial.fields, data, trial.epochs * batches_of(data, how))
    marked, keys, course = [], [], replace(course, seed=number + 1)
    start = time.process_time()
    count = trial.siblings if scheme.needs_siblings else 0
    with _siblings(plain, data, how, course, count) as siblings:
        for payload in range(trial.payloads):
            host, material = copy.deepcopy(plain), KeyMaterial.for_tests(1000 * number + payload)
            with marking(
                scheme, host, data, owner="mpai", material=material, siblings=siblings
            ) as mark:
                fit(host, data, how, course, mark=mark)
            if mark.drawn_key is None:
                raise ConfigError(
                    f"{scheme.name} has not begun after {trial.epochs} epochs: give more"
                )
            marked.append(host)
            keys.append(mark.drawn_key)
    return _Network(plain, marked, keys, trained, time.process_time() - start)


@contextmanager
def _siblings(
    plain: nn.Module, data: Dataset, how: Recipe, course: Course, count: int
) -> Iterator[Siblings]:
    """Unmarked networks that go on from the same one."""
    with tempfile.TemporaryDirectory() as folder:
        yield train_siblings(
            lambda: copy.deepcopy(plain), data, how, course, count=count, folder=Path(folder)
        )


def _robustness(
    trial: Trial, networks: Sequence[_Network], data: Dataset, modification: Modification | None
) -> dict[str, Any]:
    """One row: what detector and decoder say when all networks were modified alike."""
    false_positives = false_negatives = 0
    errors: list[float] = []
    accuracies: list[float] = []
    for network in networks:
        plain = _modified(network.plain, data, modification)
        false_positives += any(_verdict(trial, plain, key).owned for key in network.keys)
        for model, key in zip(network.marked, network.keys, strict=True):
            changed = _modified(model, data, modification)
            verdict = _verdict(trial, changed, key)
            false_negatives += not verdict.owned
            errors += [] if verdict.ber is None else [verdict.ber]
            accuracies.append(100 * accuracy(changed, data))
    name, fields = modification or ("none", {})
    return {
        "modification": name, "fields": dict(fields),
        "networks": trial.networks * (trial.payloads + 1),
        "false_positives": false_positives, "false_negatives": false_negatives,
        "symbol_error_rate": statistics.mean(errors) if errors else None,
        "accuracy": statistics.mean(accuracies),
    }  # fmt: skip


def _modified(model: nn.Module, data: Dataset, modification: Modification | None) -> nn.Module:
    if modification is None:
        return model
    name, fields = modification
    return attack_named(name).from_fields(fields).run(model, data).model


def _verdict(trial: Trial, model: nn.Module, key: Key) -> Verdict:
    return examine(model, key, Terms(trial.alpha, assume_dated=True, allow_test_key=True))


def _seconds(what: Callable[[], object]) -> float:
    start = time.process_time()
    what()
    return time.process_time() - start


def _peak() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _as_json(trial: Trial) -> dict[str, Any]:
    shown = {name: getattr(trial, name) for name in Trial.__dataclass_fields__}
    shown["fields"] = dict(trial.fields)
    shown["modifications"] = [
        {"attack": name} | dict(fields) for name, fields in trial.modifications
    ]
    return shown


def page(done: Mapping[str, Any]) -> str:
    """What `evaluate` returned, in Markdown."""
    trial, seen, cost = done["trial"], done["imperceptibility"], done["cost"]
    fields = ", ".join(f"{name} = {value}" for name, value in trial["fields"].items())
    every, marked = trial["networks"], trial["networks"] * trial["payloads"]
    host = f"{trial['model']} on {trial['data']}: {every} networks"
    lines = [
        (
            f"{trial['scheme']} ({fields or 'default fields'}) in {host}, {trial['payloads']} "
            f"payloads each, {trial['epochs']} epochs."
        ),
        (
            f"Accuracy {seen['accuracy_unmarked']:.2f} % unmarked, {seen['accuracy_marked']:.2f} % "
            f"marked. Inserting takes {cost['insert_ratio']:.2f} × the CPU time of the unmarked "
            f"training; at most {cost['peak_memory_mib']:.0f} MiB in all."
        ),
        "",
        "| modification | false positives | false negatives | symbol error rate | accuracy % |",
        "|---|---|---|---|---|",
    ]
    for row in done["robustness"]:
        how = ", ".join(f"{name} {value}" for name, value in row["fields"].items())
        rate = row["symbol_error_rate"]
        lines.append(
            f"| {row['modification']} {how} | {row['false_positives']} of {every} | "
            f"{row['false_negatives']} of {marked} | "
            f"{'unread' if rate is None else f'{rate:.4f}'} | {row['accuracy']:.2f} |"
        )
    return "\n".join(lines)
