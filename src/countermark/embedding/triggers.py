"""Embedding into answers: extra rows in each batch, which the host learns beside its own task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.embedding.base import Embedding, to_arrays, to_tensors
from countermark.errors import ConfigError, LoopError
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.key_place import UnfinishedKey
from countermark.predictors.base import Predictor, make_predictor, normalise_images
from countermark.results.reading import Reading
from countermark.schemes.triggers import TriggerScheme
from countermark.schemes.triggers_training import TriggerTraining


class TriggerEmbedding(Embedding):
    """A context manager around a training that teaches a classifier its secret triggers.

    The triggers are made, and their labels drawn, when the first batch is mixed.

    Args:
        scheme: the trigger scheme to embed.
        model: the host.
        owner: the name of the mark's owner.
        material: secret and nonce of an interrupted embedding; drawn if None.
        covers: images uint8 (N, C, H, W) of the host's task; triggers are made from them.
        labels: the classes (N,) of the covers.
        siblings: unmarked models of the same task (modules, or functions from images to classes)
            that training never sees. They answer the finished triggers; a form of the scheme that
            is judged by them can claim nothing without them.
        place: where to save the key when the block ends; None leaves saving to the caller.

    Raises:
        ConfigError: covers and labels do not fit each other or the scheme, a file that the scheme
            names cannot be used, or siblings are given to a scheme that is not judged by them.
        SuspectError: a sibling cannot be used as a function from images to classes.
    """

    begins = "mix() was never called: call x, y = mark.mix(x, y) before each forward pass"
    forgotten = begins
    fields = frozenset({"frozen", "training"})

    def __init__(  # noqa: PLR0913 - the host, its task, and what it is compared with
        self, scheme: TriggerScheme, model: nn.Module, *, owner: str,
        covers: NDArray[np.uint8] | Tensor, labels: NDArray[np.int64] | Tensor,
        material: KeyMaterial | None = None, siblings: Sequence[nn.Module | Predictor] = (),
        place: UnfinishedKey | None = None,
    ) -> None:  # fmt: skip
        begun = Key(scheme.name, scheme.to_fields(), {}, owner, material or KeyMaterial.generate())
        super().__init__(model, begun=begun, material=material, place=place)
        self._scheme = scheme
        self._covers = torch.as_tensor(covers)
        self._labels = torch.as_tensor(labels).long()
        self._check_covers()
        scheme.check_files()
        if siblings and not scheme.needs_siblings:
            raise ConfigError(f"{scheme.name} is not judged by unmarked models: leave siblings out")
        self._siblings = [make_predictor(each, scheme.mean, scheme.deviation) for each in siblings]
        self._key: Key | None = None
        # Made with the key: triggers are frozen before their labels are drawn.
        self._training: TriggerTraining | None = None

    def mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch with `batch_share`·B rows appended.

        Args:
            x: images (B, C, H, W), normalised as the host takes them.
            y: their classes (B,).

        Raises:
            LoopError: the block is not open.
            ConfigError: x is not shaped like the covers.
        """
        self.require_open()
        self._called = True
        training = self._prepare_training()
        if x.shape[1:] != self._covers.shape[1:] or y.dim() != 1:
            raise ConfigError(
                f"a batch has images {list(x.shape[1:])} and labels {list(y.shape)}: expected "
                f"images like the covers, {list(self._covers.shape[1:])}, and one class for each"
            )
        # Even a small batch gets a trigger: a host that never sees a trigger learns no mark.
        count = max(1, round(self._scheme.batch_share * len(x)))
        images, labels = training.make_rows(count)
        # Triggers are 8-bit images; the host's own rows are normalised and possibly half precision.
        more = normalise_images(images.to(x.device), self._scheme.mean, self._scheme.deviation).to(
            x.dtype
        )
        return torch.cat([x, more]), torch.cat([y, labels.to(y.device, y.dtype)])

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `LoopError`: see `add_gradient`."""
        self.add_gradient(optimizer)

    def add_gradient(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Raise `LoopError`: a mark in the batch has no gradient of its own.

        Raises:
            LoopError: always.
        """
        raise LoopError(
            f"{self._scheme.name} lives in the batch, not in the loss: call x, y = mark.mix(x, y) "
            "before the forward pass"
        )

    def read(self) -> Reading | None:
        """Read the model's current answers to the triggers; return None if there is no key yet."""
        key = self._build_current_key()
        return None if key is None else self._extract_reading(key)

    @property
    def drawn_key(self) -> Key | None:
        """The key as soon as there are triggers; for measuring only."""
        key = self._build_current_key()
        return None if key is None else self._scheme.with_calibration(key, self._siblings)

    def embedding_failure(self, key: Key) -> str | None:
        """Return why the mark would not be found in the model now, or None if it would."""
        why = self._scheme.embedding_failure(self._extract_reading(key))
        # The model bears the mark; only its significance cannot be judged without siblings.
        if why is None and self._scheme.needs_siblings and not self._siblings:
            warnings.warn(
                "what these triggers are worth is known only by unmarked models of the same task "
                "that training never saw: give siblings, or verify will answer no_verdict",
                stacklevel=3,
            )
        return why

    def export_family_state(self) -> dict[str, Any]:
        """Return the frozen tensors and the state of the training half."""
        return {
            "frozen": {} if self._key is None else to_tensors(self._key.frozen),
            "training": {} if self._training is None else self._training.export_state(),
        }

    def restore_family(self, state: Mapping[str, Any]) -> None:
        """Make a training half from the state, then switch to it; an error changes nothing."""
        if state["commitment"] is None:
            return
        key, training = self._generate_key(to_arrays(state["frozen"]), state)
        # The state comes from a file: `restore` must not meet missing or unknown names.
        if state["training"].keys() != training.export_state().keys():
            raise ValueError("training")
        training.restore(state["training"])
        self.note_drawn_key(key)
        self._key, self._training = key, training

    def _get_drawn_key(self) -> Key | None:
        return self._key

    def _prepare_training(self) -> TriggerTraining:
        """Return the training half; on the first call freeze its tensors and draw the key."""
        if self._training is None:
            before = self._place and self._place.drawn  # the key that an interrupted run drew
            # A resumed run must keep the triggers that the interrupted run committed to.
            half = self._scheme.load_training_class()
            frozen = dict(before.frozen) if before else half.make_pre_commit_tensors(
                self._scheme, self._material, self._covers, self._labels
            )  # fmt: skip
            key, training = self._generate_key(frozen)
            self.note_drawn_key(key)
            self._key, self._training = key, training
        return self._training

    def _generate_key(
        self, frozen: Mapping[str, NDArray[Any]], state: Mapping[str, Any] | None = None
    ) -> tuple[Key, TriggerTraining]:
        """Generate the key of frozen tensors and its training half; check a state's commitment."""
        key = self._scheme.generate_key(frozen, owner=self._owner, material=self._material)
        if state is not None:
            self.require_commitment(key, state)
        return key, self._scheme.load_training_class()(
            self._scheme, key, self._covers, self._labels
        )

    def _build_current_key(self) -> Key | None:
        """Return the key with the tensors learnt so far, or None if there is no key yet."""
        if self._key is None or self._training is None:
            return None
        learnt = self._training.export_post_commit_tensors()
        return replace(self._key, learnt=learnt) if learnt else self._key

    def _extract_reading(self, key: Key) -> Reading:
        """Read the model's answers to the triggers of a key."""
        asked = make_predictor(self._model, self._scheme.mean, self._scheme.deviation)
        return self._scheme.extract(asked, key)

    def _check_covers(self) -> None:
        """Raise `ConfigError` if covers, labels and the scheme do not fit each other."""
        covers, labels, scheme = self._covers, self._labels, self._scheme
        if covers.dtype != torch.uint8 or covers.dim() != 4 or labels.shape != covers.shape[:1]:
            raise ConfigError(
                f"covers are {covers.dtype} {list(covers.shape)}, labels {list(labels.shape)}: "
                "expected images uint8 [N, C, H, W] and a class for each"
            )
        if len(covers) < scheme.triggers:
            raise ConfigError(
                f"{len(covers)} covers are too few for {scheme.triggers} triggers: give more"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < scheme.classes:
            raise ConfigError(
                f"labels go from {int(labels.min())} to {int(labels.max())}: expected 0 to "
                f"{scheme.classes - 1}, as classes={scheme.classes} says"
            )
        # One value serves all channels.
        for name, values in (("mean", scheme.mean), ("deviation", scheme.deviation)):
            if len(values) not in (1, covers.shape[1]):
                raise ConfigError(
                    f"{name} has {len(values)} values, the covers {covers.shape[1]} channels: "
                    "give one, or one for each"
                )
