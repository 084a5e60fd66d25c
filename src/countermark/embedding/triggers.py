"""Embedding into answers: the batch gets rows more, which the host learns beside its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.answers import Predict, asked_of, fed
from countermark.embedding.base import Embedding
from countermark.errors import ConfigError, LoopError
from countermark.evidence import Evidence
from countermark.key import Key, KeyMaterial

if TYPE_CHECKING:
    from countermark.schemes.black_box import TriggerScheme
    from countermark.schemes.training.black_box import TriggerTraining


class TriggerEmbedding(Embedding):
    """A mark on its way into a classifier's answers; a context manager around the training.

    Triggers are made, and their labels drawn, when the first batch is mixed.

    Args:
        scheme: what is embedded.
        model: the host.
        owner: whose mark it is.
        material: secret and nonce of an interrupted embedding; else drawn.
        covers: images uint8 (N, C, H, W) of the host's task; triggers are made of them.
        labels: their classes (N,).
        siblings: unmarked models of the same task (modules, or functions from images to classes)
            that training never sees: they are asked about the finished triggers, and a form that is
            judged by them can claim nothing without.

    Raises:
        ConfigError: covers and labels do not fit each other or the scheme, a file that the scheme
            names cannot be used, or siblings where the scheme is not judged by any.
        SuspectError: a sibling that cannot be asked.
    """

    begins = "call x, y = mark.mix(x, y) before each forward pass"

    def __init__(  # noqa: PLR0913 - the host, its task, and what it is compared with
        self, scheme: TriggerScheme, model: nn.Module, *, owner: str,
        covers: NDArray[np.uint8] | Tensor, labels: NDArray[np.int64] | Tensor,
        material: KeyMaterial | None = None, siblings: Sequence[nn.Module | Predict] = (),
    ) -> None:  # fmt: skip
        super().__init__(model, owner=owner, material=material)
        self._scheme = scheme
        self._covers = torch.as_tensor(covers)
        self._labels = torch.as_tensor(labels).long()
        self._check()
        scheme.check_files()
        if siblings and not scheme.needs_siblings:
            raise ConfigError(f"{scheme.name} is not judged by unmarked models: leave siblings out")
        self._siblings = [asked_of(each, scheme.mean, scheme.deviation) for each in siblings]
        self._key: Key | None = None
        self._training: TriggerTraining | None = None

    def mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Rows x (B, C, H, W) as the host is fed with them, y (B,), and `batch_share`·B rows more.

        Raises:
            LoopError: outside the block.
            ConfigError: x is not shaped like the covers.
        """
        self.require_open()
        training = self._ready()
        if x.shape[1:] != self._covers.shape[1:] or y.dim() != 1:
            raise ConfigError(
                f"a batch has images {list(x.shape[1:])} and labels {list(y.shape)}: expected "
                f"images like the covers, {list(self._covers.shape[1:])}, and one class for each"
            )
        count = max(1, round(self._scheme.batch_share * len(x)))
        images, labels = training.rows(count)
        more = fed(images.to(x.device), self._scheme.mean, self._scheme.deviation).to(x.dtype)
        return torch.cat([x, more]), torch.cat([y, labels.to(y.device, y.dtype)])

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Refused: see `add_gradient`."""
        self.add_gradient(optimizer)

    def add_gradient(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Refused: such a mark is in the batch, and has no gradient of its own.

        Raises:
            LoopError: always.
        """
        raise LoopError(
            f"{self._scheme.name} lives in the batch, not in the loss: call x, y = mark.mix(x, y) "
            "before the forward pass"
        )

    def read(self) -> Evidence | None:
        """What the model as it is now answers to the committed triggers."""
        key = self._finished()
        return None if key is None else self._evidence(key)

    @property
    def drawn_key(self) -> Key | None:
        """The key as soon as there are triggers; for measuring only."""
        key = self._finished()
        return None if key is None else self._scheme.calibrated(key, self._siblings)

    def lacking(self, key: Key) -> str | None:
        """Why the mark would not be found in the model as it is now; None when it would."""
        why = self._scheme.not_taken(self._evidence(key))
        if why is None and self._scheme.needs_siblings and not self._siblings:
            warnings.warn(
                "what these triggers are worth is known only by unmarked models of the same task "
                "that training never saw: give siblings, or verify will answer no_verdict",
                stacklevel=3,
            )
        return why

    def state(self) -> dict[str, Any]:
        """The frozen tensors, and where the training half stands."""
        frozen = {} if self._key is None else self._key.frozen
        return {
            "frozen": {name: torch.from_numpy(np.array(each)) for name, each in frozen.items()},
            "training": {} if self._training is None else self._training.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`; nothing that was frozen is made again."""
        if state["frozen"]:
            training = self._ready({name: each.numpy() for name, each in state["frozen"].items()})
            training.restore(state["training"])

    def _ready(self, frozen: Mapping[str, NDArray[Any]] | None = None) -> TriggerTraining:
        """The training half, once what it freezes and then the key are made."""
        if self._training is None:
            half, covers = self._scheme.training(), (self._covers, self._labels)
            if frozen is None:
                frozen = half.prepare(self._scheme, self._material, *covers)
            self._key = self._scheme.generate_key(
                frozen, owner=self._owner, material=self._material
            )
            self._training = half(self._scheme, self._key, *covers)
        return self._training

    def _finished(self) -> Key | None:
        """The key with what was learnt so far."""
        if self._key is None or self._training is None:
            return None
        learnt = self._training.learnt()
        return replace(self._key, learnt=learnt) if learnt else self._key

    def _evidence(self, key: Key) -> Evidence:
        asked = asked_of(self._model, self._scheme.mean, self._scheme.deviation)
        return self._scheme.extract(asked, key)

    def _check(self) -> None:
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
        for name, values in (("mean", scheme.mean), ("deviation", scheme.deviation)):
            if len(values) not in (1, covers.shape[1]):
                raise ConfigError(
                    f"{name} has {len(values)} values, the covers {covers.shape[1]} channels: "
                    "give one, or one for each"
                )
