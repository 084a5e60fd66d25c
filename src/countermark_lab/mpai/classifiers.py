"""Evaluation of schemes of weights and triggers: classifiers are marked, then attacked."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from countermark.attacks import find_attack
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import Verdict
from countermark.training.build_embedding import make_embedding, make_scheme
from countermark.training.data import load_data
from countermark.training.loop import Course, accuracy, count_batches, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.training.siblings import TrainedSiblings, train_siblings
from countermark.verification.verify import examine
from countermark_lab.mpai.trial import MarkedNetworks, Modification, Trial


class ClassifierTechnology:
    """A technology that marks classifiers, by a scheme of weights or triggers.

    Raises:
        ConfigError: there is no such model or data set.
    """

    quality: ClassVar[str] = "accuracy"
    model: ClassVar[str] = "mlp"
    data: ClassVar[str] = "digits"

    # The kinds of modification in the standard, each at some values. Attacks that need the name
    # of a layer are left out, since the model is not fixed.
    modifications: ClassVar[tuple[Modification, ...]] = (
        ("noise", {"std": 0.1}), ("noise", {"std": 0.5}), ("noise", {"std": 1.0}),
        ("quantise", {"bits": 8}), ("quantise", {"bits": 4}), ("quantise", {"bits": 2}),
        ("prune", {"fraction": 0.5}), ("prune", {"fraction": 0.9}),
        ("prune", {"fraction": 0.5, "order": "random"}),
        ("fine_tune", {"lr": 0.001}), ("fine_tune", {"lr": 0.01}),
        ("imitate", {"epochs": 3}), ("permute", {}), ("rescale", {}),
    )  # fmt: skip

    def __init__(self, trial: Trial) -> None:
        self._trial, self._how = trial, recipe(trial.model)
        self._data = load_data(trial.data).subset(trial.train)
        self._plain: dict[str, nn.Module] = {}  # unmarked hosts, by commitments of the keys

    def mark_network(self, number: int) -> MarkedNetworks:
        """Train the unmarked network `number`, and mark a copy of it with each payload.

        Raises:
            ConfigError: the training is too short for the scheme to begin.
        """
        trial, data, course = self._trial, self._data, Course(self._trial.epochs, number)
        seed_torch(number, "init")
        plain, start = build(trial.model, {}), time.process_time()
        fit(plain, data, self._how, course)
        trained = time.process_time() - start
        batches = trial.epochs * count_batches(data, self._how)
        scheme = make_scheme(trial.scheme, trial.fields, data, batches, stored=True)
        # Marking goes on from the trained network, on batches in another order.
        marked, keys, course = [], [], replace(course, seed=number + 1)
        start = time.process_time()
        with self._prepare_siblings(plain, course, scheme.needs_siblings) as siblings:
            for payload in range(trial.payloads):
                host, material = (
                    copy.deepcopy(plain),
                    KeyMaterial.from_test_seed(1000 * number + payload),
                )
                with make_embedding(
                    scheme, host, data, owner="mpai", material=material, siblings=siblings
                ) as mark:
                    fit(host, data, self._how, course, mark=mark)
                if mark.drawn_key is None:
                    raise ConfigError(
                        f"{scheme.name} has not begun after {trial.epochs} epochs: give more"
                    )
                marked.append(host)
                keys.append(mark.drawn_key)
                if scheme.needs_siblings and mark.drawn_key.tensors:
                    self._plain[mark.drawn_key.commitment] = plain
        return MarkedNetworks(plain, marked, keys, trained, time.process_time() - start)

    @contextmanager
    def _prepare_siblings(
        self, plain: nn.Module, course: Course, needed: bool
    ) -> Iterator[TrainedSiblings]:
        """Train unmarked siblings that go on from the same network; their files go afterwards."""
        count = self._trial.siblings if needed else 0
        with tempfile.TemporaryDirectory() as folder:
            yield train_siblings(
                lambda: copy.deepcopy(plain), self._data, self._how, course,
                count=count, folder=Path(folder),
            )  # fmt: skip

    def modify_network(self, model: nn.Module, name: str, fields: Mapping[str, Any]) -> nn.Module:
        """Run an attack on a network and return the result."""
        return find_attack(name).from_fields(fields).run(model, self._data).model

    def judge_network(self, model: nn.Module, key: Key) -> Verdict:
        """Judge a network by a key."""
        # Only keys of learnt readers have an entry: their verdicts compare with an unmarked model.
        plain = self._plain.get(key.commitment)
        unmarked = [] if plain is None else [plain]
        return examine(model, key, self._trial.verification_options, unmarked=unmarked)

    def measure_quality(self, model: nn.Module) -> float:
        """Measure test accuracy in percent."""
        return 100 * accuracy(model, self._data)
