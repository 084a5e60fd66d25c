"""Embedding: a scheme at work while somebody's loop trains.

A loop sees three things only: the loss, the batch, the outputs. An embedding has a word to say on
each, and leaves alone what its scheme does not need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.embedding.key_place import UnfinishedKey
from countermark.errors import CountermarkError, LoopError, MarkNotTakenError, printable
from countermark.evidence import Evidence
from countermark.key import Key, KeyMaterial

_STATE_TYPE = "countermark/state/v1"


class Embedding(ABC):
    """A mark on its way into a model; a context manager around the training.

    Args:
        model: the host; its parameters are read and given gradients, nothing is added to it.
        begun: the key as far as it is known before training: scheme, fields, tensors, owner, and
            the secret to embed with unless an interrupted training left one.
        place: where the finished key is saved; None leaves that to the caller.

    Raises:
        KeyFileError: the place holds the unfinished key of another embedding.
    """

    begins: ClassVar[str]
    """What to do so that a mark begins, for an error message."""

    forgotten: ClassVar[str]
    """What was never called where a mark did not take because nothing trained it."""

    fields: ClassVar[frozenset[str]]
    """Names of what the family puts into its state."""

    def __init__(
        self, model: nn.Module, *, begun: Key, material: KeyMaterial | None,
        place: UnfinishedKey | None,
    ) -> None:  # fmt: skip
        self._model, self._place = model, place
        if place is not None:
            begun = place.take_up(begun, material)
        self._begun, self._owner, self._material = begun, begun.owner, begun.material
        self._phase: Literal["new", "open", "done", "failed"] = "new"
        self._called = self._restored = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._model).__name__}, {self._phase})"

    def __enter__(self) -> Self:
        if self._phase != "new":
            raise LoopError("this embedding was used before: start another with scheme.embed(...)")
        if self._place is not None:
            self._place.begin(self._begun)
        self._phase = "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close(ended=kind is None)
        self._phase = "done" if kind is None else "failed"
        if kind is None and self._place is not None:
            self._place.finish(self.key)

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
            raise MarkNotTakenError(lacking if self._called else f"{self.forgotten}; {lacking}")
        return key

    @final
    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the secret, as tensors and lists that torch can save.

        `fingerprint` is a commitment to secret, owner, scheme, fields and tensors, `commitment` the
        C0 of the key where it is drawn already; neither reveals the secret.
        """
        return {
            "type": _STATE_TYPE,
            "fingerprint": self._fingerprint(),
            "commitment": self._drawn_c0(),
            **self.family_state(),
        }

    @final
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of an embedding with the same scheme, secret and owner.

        Call it inside the block, when the model's own checkpoint is loaded and before the next
        step. After an error the embedding is as it was.

        Raises:
            LoopError: outside the block; the state is of another embedding, was taken before the
                key was drawn that this one has, or is damaged.
        """
        self.require_open()
        self._check_state(state)
        with refusing_damage():
            self.restore_family(state)
        self._restored = True

    @abstractmethod
    def family_state(self) -> dict[str, Any]:
        """What the family adds to the state, under the names of `fields`."""

    @abstractmethod
    def restore_family(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that belongs to this embedding, wholly or not at all."""

    def require_commitment(self, key: Key, state: Mapping[str, Any]) -> None:
        """Raise `LoopError` for a key that is made of a state and is not the one it speaks of."""
        if key.c0.hex() != state["commitment"]:
            raise LoopError(
                "the state does not hold what its key was drawn from (its commitment does not "
                "follow): it was changed; restore it from another checkpoint"
            )

    def note_drawn(self, key: Key) -> None:
        """Keep the key as it is drawn beside its place, where it has one."""
        if self._place is not None and self._phase == "open":
            self._place.note_drawn(key, replaces=self._restored)

    def _fingerprint(self) -> str:
        """What secret, owner, scheme, fields and tensors have in common, in hexadecimal.

        What is frozen is left out: a resumed run is begun with other weights, and takes what the
        interrupted one froze from its state.
        """
        return replace(self._begun, frozen={}).c0.hex()

    def _drawn_c0(self) -> str | None:
        """C0 of the key in hexadecimal; None while it is not drawn."""
        key = self._drawn()
        return None if key is None else key.c0.hex()

    @abstractmethod
    def _drawn(self) -> Key | None:
        """The key as it was drawn, without what was learnt since."""

    def _bound(self) -> Key | None:
        """The drawn key that no state may replace any more."""
        return self._drawn()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        expected = {"type", "fingerprint", "commitment"} | self.fields
        found = set(state) if isinstance(state, Mapping) else set()
        if found != expected or state["type"] != _STATE_TYPE:
            wrong = ", ".join(sorted(map(str, found ^ expected)) or ["type"])
            raise LoopError(
                f"this is not what state() of a {type(self).__name__} gives: missing or unknown is "
                f"{printable(wrong, 200)}"
            )
        if state["fingerprint"] != self._fingerprint():
            raise LoopError(
                "the state is of another embedding: its secret, owner, scheme, fields or tensors "
                'differ; embed as before, with key="…" and resume=True or with the same material'
            )
        drawn = self._bound()
        if drawn is None and self._place is not None:
            drawn = self._place.drawn
        if drawn is not None and state["commitment"] not in (drawn.c0.hex(), None):
            other = printable(str(state["commitment"]), 80)
            raise LoopError(
                f"the state is of a key with the commitment {other}, and this embedding draws "
                f"{drawn.c0.hex()}: restore the state of its own run"
            )
        if self._bound() is not None and state["commitment"] is None:
            raise LoopError(
                "the state was taken before the key was drawn, and this embedding has drawn its "
                "key: restore before the first step"
            )

    @final
    def require_open(self) -> None:
        """Raise `LoopError` outside the block."""
        if self._phase != "open":
            raise LoopError("the mark works inside its block only: with scheme.embed(...) as mark")


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Turn what foreign values in a state raise into a `LoopError` of one line."""
    try:
        yield
    except CountermarkError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        said = printable(" ".join(str(e).split()), 200)
        raise LoopError(
            f"the state is damaged ({type(e).__name__}: {said}): restore it from another checkpoint"
        ) from None


def as_tensors(named: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Named arrays as tensors of their own, for a state."""
    return {name: torch.from_numpy(np.array(each)) for name, each in named.items()}


def as_arrays(named: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Named tensors of a state as arrays."""
    return {str(name): each.detach().cpu().numpy() for name, each in named.items()}
