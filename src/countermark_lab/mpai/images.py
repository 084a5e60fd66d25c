"""Evaluation of schemes of outputs: networks of images are marked, then modified.

Each network learns to make marked images by itself, so that a modification of the network can
damage the mark.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from countermark.attacks import find_attack
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.predictors.base import Images
from countermark.results.verdict import Verdict
from countermark.schemes.deep_watermarking.surrogates import (
    CopyingOptions,
    run_network,
    train_surrogate,
)
from countermark.schemes.outputs_training import load_networks
from countermark.training.embed_image_model import get_task, make_output_scheme
from countermark.training.image_squares import DRAWN, photographs
from countermark.training.image_tasks import compare_images, spoil_images
from countermark.verification.verify import examine
from countermark_lab.image_models.barriers import train_key
from countermark_lab.image_models.surrogates import train_absorbing_network
from countermark_lab.mpai.trial import MarkedNetworks, Modification, Trial

# Numbers of training images that owner and thief each get if the trial sets none, for drawn images
# and for photographs. `_TEST` images are read by the detector.
_SQUARES = {DRAWN: 256}
_OF_PHOTOGRAPHS, _TEST = 3000, 100
_FIRST_SIBLING = 5_000_000  # first seed of siblings, above the number of any network


class ImageTechnology:
    """A technology that marks networks from images to images, by a scheme of outputs.

    Raises:
        CountermarkError: a field is wrong, or there are no such images.
    """

    quality: ClassVar[str] = "psnr"
    model: ClassVar[str] = "unet"
    data: ClassVar[str] = DRAWN

    # Changes of weights; `fine_tune` continues training on the thief's own images, and `imitate`
    # trains a new network on the outputs of the marked one.
    modifications: ClassVar[tuple[Modification, ...]] = (
        ("noise", {"std": 0.02}), ("noise", {"std": 0.05}), ("noise", {"std": 0.1}),
        ("quantise", {"bits": 8}), ("quantise", {"bits": 6}), ("quantise", {"bits": 4}),
        ("prune", {"fraction": 0.2}), ("prune", {"fraction": 0.5}),
        ("fine_tune", {"epochs": 1}), ("imitate", {"epochs": 3}),
    )  # fmt: skip

    def __init__(self, trial: Trial) -> None:
        if trial.model != self.model:
            raise ConfigError(f"model {trial.model}: {trial.scheme} is evaluated in unet")
        self._trial = trial
        self._scheme = scheme = make_output_scheme(trial.scheme, trial.fields)
        self._task = get_task(scheme)
        count = trial.train or _SQUARES.get(trial.data, _OF_PHOTOGRAPHS)
        self._data = photographs(
            trial.data, (count, count, _TEST), side=scheme.side, channels=scheme.channels
        )
        # Degraded inputs of the network: `_given` for training, `_asked` for the detector.
        self._given = self._spoil_images(self._data.owner, 1)
        self._asked = self._spoil_images(self._data.test, 2)

    def mark_network(self, number: int) -> MarkedNetworks:
        """Train the unmarked network `number`, and mark a copy of it with each payload."""
        owner, trial, start = self._data.owner, self._trial, time.process_time()
        copying = self._make_copying_options(trial.epochs, number)
        plain = train_surrogate(self._given, owner, copying)
        trained = time.process_time() - start
        marked, keys, start = [], [], time.process_time()
        siblings = self._make_sibling_images(plain, copying)
        for payload in range(trial.payloads):
            key = self._train_key(KeyMaterial.from_test_seed(1000 * number + payload), siblings)
            network = copy.deepcopy(plain).requires_grad_(True)
            live = load_networks(self._scheme, key)
            marked.append(
                train_absorbing_network((self._given, owner), live, copying, network=network)
            )
            keys.append(key)
        return MarkedNetworks(plain, marked, keys, trained, time.process_time() - start)

    def modify_network(self, model: nn.Module, name: str, fields: Mapping[str, Any]) -> nn.Module:
        """Modify a network as a thief could, with their own images and without a key."""
        # The attacks of these two names train classifiers, so networks of images have their own.
        if name not in ("fine_tune", "imitate"):
            return find_attack(name).from_fields(fields).run(model).model
        given, copying = (
            self._spoil_images(self._data.thief, 3),
            self._make_copying_options(fields["epochs"], 99),
        )
        if name == "imitate":
            return train_surrogate(given, run_network(model, given), copying)
        copied_model = copy.deepcopy(model).requires_grad_(True)
        return train_surrogate(given, self._data.thief, copying, network=copied_model)

    def judge_network(self, model: nn.Module, key: Key) -> Verdict:
        """Judge the images that a network makes, by a key."""
        return examine(
            list(run_network(model, self._asked).numpy()), key, self._trial.verification_options
        )

    def measure_quality(self, model: nn.Module) -> float:
        """Measure PSNR in dB of a network's images against the true images."""
        return compare_images(run_network(model, self._asked), self._data.test)["psnr"]

    def _train_key(self, material: KeyMaterial, siblings: list[Images]) -> Key:
        """Train the networks of a key and calibrate it on images of siblings."""
        given = self._data.owner, self._given
        key = train_key(self._scheme, material, given, "mpai")
        return self._scheme.with_calibration(key, [list(each) for each in siblings])

    def _make_sibling_images(self, plain: nn.Module, copying: CopyingOptions) -> list[Images]:
        """Return images of unmarked networks that go on from the same one, if the form needs any."""
        found = []
        for each in range(self._trial.siblings if self._scheme.needs_siblings else 0):
            course = replace(copying, seed=_FIRST_SIBLING + each)
            network = copy.deepcopy(plain).requires_grad_(True)
            train_surrogate(self._given, self._data.owner, course, network=network)
            found.append(run_network(network, self._given[:_TEST]).numpy())
        return found

    def _spoil_images(self, images: Tensor, seed: int) -> Tensor:
        """Degrade images (n, C, H, W) as the task of the network requires."""
        return spoil_images(images, self._task, seed)

    def _make_copying_options(self, epochs: int, seed: int) -> CopyingOptions:
        """Return options of training, with steps for this number of epochs."""
        usual = CopyingOptions()
        steps = max(1, epochs * len(self._data.owner) // usual.batch)
        return replace(usual, steps=steps, seed=seed, precision=self._scheme.precision)
