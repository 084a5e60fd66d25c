"""Embedding: a scheme at work while somebody's loop trains.

A loop sees three things only: the loss, the batch, the outputs. An embedding has a word to say on
each, and leaves alone what its scheme does not need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn

from countermark.errors import LoopError, MarkNotTakenError
from countermark.evidence import Evidence
from countermark.key import Key, KeyMaterial


class Embedding(ABC):
    """A mark on its way into a model; a context manager around the training.

    Args:
        model: the host; its parameters are read and given gradients, nothing is added to it.
        owner: whose mark it is; enters the commitment and the payload.
        material: secret and nonce of an interrupted embedding, to go on with; else drawn.
    """

    begins: ClassVar[str]
    """What to do so that a mark begins, for an error message."""

    def __init__(self, model: nn.Module, *, owner: str, material: KeyMaterial | None) -> None:
        self._model, self._owner = model, owner
        self._material = material or KeyMaterial.fresh()
        self._phase: Literal["new", "open", "done", "failed"] = "new"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._model).__name__}, {self._phase})"

    def __enter__(self) -> Self:
        if self._phase != "new":
            raise LoopError("this embedding was used before: start another with scheme.embed(...)")
        self._phase = "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close(ended=kind is None)
        self._phase = "done" if kind is None else "failed"

    def close(self, *, ended: bool) -> None:  # noqa: ARG002 - most have nothing to close
        """The block is left, regularly or not."""
        return

    def penalty(self) -> Tensor:
        """The term () to add to the loss; zero, without gradient, where there is nothing to add.

        Raises:
            LoopError: outside the block.
        """
        self.require_open()
        return torch.zeros(())

    def mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The batch to train on: x (B, …) and y (B,), with more rows where the scheme needs them.

        Raises:
            LoopError: outside the block.
        """
        self.require_open()
        return x, y

    @abstractmethod
    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Embed inside `optimizer.step`, for loops whose loss line cannot be changed.

        Raises:
            LoopError: outside the block, or the mark does not live in the loss.
        """

    @abstractmethod
    def add_gradient(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the penalty's gradient to the loss's, for callbacks that run right before a step.

        Raises:
            LoopError: as `attach`.
        """

    def end_epoch(self) -> None:
        """Say that an epoch ended; schemes that wait for something start by it."""
        self.require_open()

    @abstractmethod
    def read(self) -> Evidence | None:
        """What the key reads from the model as it is now; None while there is no key."""

    @property
    @abstractmethod
    def drawn_key(self) -> Key | None:
        """The key as soon as it is drawn, whether or not the mark has taken; for measuring only."""

    @abstractmethod
    def lacking(self, key: Key) -> str | None:
        """Why the mark would not be found in the model as it is now; None when it would."""

    @final
    @property
    def key(self) -> Key:
        """The key, once training has ended and the mark is in the model.

        Raises:
            LoopError: training has not ended, or ended with an exception.
            MarkNotTakenError: the mark is not in the model; says how much of it is.
        """
        if self._phase != "done":
            raise LoopError(
                "there is no key: training ended with an exception"
                if self._phase == "failed"
                else "the key is there when the with block has ended"
            )
        key = self.drawn_key
        if key is None:
            raise MarkNotTakenError(f"the mark never began: {self.begins}")
        # A mark that would not be found in the owner's own model must not be relied upon.
        if lacking := self.lacking(key):
            raise MarkNotTakenError(lacking)
        return key

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the secret, as tensors and lists that torch can save."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of an embedding with the same scheme, material and owner."""

    @final
    def require_open(self) -> None:
        """Raise `LoopError` outside the block."""
        if self._phase != "open":
            raise LoopError("the mark works inside its block only: with scheme.embed(...) as mark")
