"""The base class of embeddings: a scheme that marks a model while a user's own loop trains it.

A training loop exposes three things: the loss, the batch and the outputs. An embedding offers one
method for each of the three. A method that the scheme does not need changes nothing.
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

from countermark.errors import CountermarkError, LoopError, MarkNotTakenError, make_printable
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.key_place import UnfinishedKey
from countermark.results.reading import Reading

_STATE_TYPE = "countermark/state/v1"


class Embedding(ABC):
    """A context manager around a training that puts one mark into one model.

    Args:
        model: the host; the embedding reads its parameters, may add to their gradients, and adds no
            layer to it.
        begun: the key as far as it is known before training: scheme, fields, tensors, owner, and
            the secret to embed with unless an interrupted training left a secret.
        place: where the finished key is saved; None leaves saving to the caller.

    Raises:
        KeyFileError: the place holds the unfinished key of another embedding.
    """

    begins: ClassVar[str]
    """The call that begins a mark, for an error message."""

    forgotten: ClassVar[str]
    """The call that is missing if nothing trained the mark, for an error message."""

    fields: ClassVar[frozenset[str]]
    """Names of the entries that the family puts into its state."""

    def __init__(
        self, model: nn.Module, *, begun: Key, material: KeyMaterial | None,
        place: UnfinishedKey | None,
    ) -> None:  # fmt: skip
        self._model, self._place = model, place
        if place is not None:
            # The secret of an interrupted run takes precedence over a new secret.
            begun = place.take_up(begun, material)
        self._begun, self._owner, self._material = begun, begun.owner, begun.material
        self._phase: Literal["new", "open", "done", "failed"] = "new"
        # Whether a step can have embedded the mark, and whether a state was restored.
        self._called = self._restored = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._model).__name__}, {self._phase})"

    def __enter__(self) -> Self:
        # An embedding draws one key, for one training.
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
        # The phase changes first: `key` below is refused while the block is open.
        self._phase = "done" if kind is None else "failed"
        if kind is None and self._place is not None:
            self._place.finish(self.key)

    def close(self, *, ended: bool) -> None:  # noqa: ARG002 - most have nothing to close
        """Release resources when the block is left; `ended` is true without an exception."""
        return

    def penalty(self) -> Tensor:
        """Return the term () to add to the loss; zero, without gradient, unless a family adds one.

        Raises:
            LoopError: the block is not open.
        """
        self.require_open()
        return torch.zeros(())

    def mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch to train on, x (B, …) and y (B,), with more rows if the scheme adds any.

        Raises:
            LoopError: the block is not open.
        """
        self.require_open()
        return x, y

    def wrap(self, model: nn.Module | None = None) -> nn.Module:  # noqa: ARG002
        """Return a network whose output images are all marked; only a mark in outputs has one.

        Raises:
            LoopError: the mark is in weights or answers.
        """
        raise LoopError(f"{self._begun.scheme} marks no outputs: serve the trained model itself")

    def absorb(self, outputs: Tensor, targets: Tensor, strength: float = 1.0) -> Tensor:  # noqa: ARG002
        """Return the loss () of a network that learns task and mark together, in outputs only.

        Raises:
            LoopError: the mark is in weights or answers.
        """
        raise LoopError(f"{self._begun.scheme} marks no outputs: add mark.penalty() or mark.mix()")

    @abstractmethod
    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Embed inside `optimizer.step`, for loops whose loss line cannot be changed.

        Raises:
            LoopError: the block is not open, or the mark does not live in the loss.
        """

    @abstractmethod
    def add_gradient(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the penalty's gradient to the loss's, for callbacks that run right before a step.

        Raises:
            LoopError: as `attach`.
        """

    def end_epoch(self) -> None:
        """Note that an epoch ended; some schemes draw their key after a number of epochs."""
        self.require_open()

    @abstractmethod
    def read(self) -> Reading | None:
        """Read the mark from the model's current state; return None if there is no key yet."""

    @property
    @abstractmethod
    def drawn_key(self) -> Key | None:
        """The key as soon as it is drawn, even if the model lacks the mark; for measuring only."""

    @abstractmethod
    def embedding_failure(self, key: Key) -> str | None:
        """Return why the mark would not be found in the model now, or None if it would."""

    @final
    @property
    def key(self) -> Key:
        """The key, once training has ended and the mark is in the model.

        Raises:
            LoopError: training has not ended, or ended with an exception.
            MarkNotTakenError: the mark is not in the model; the message says how much of it is.
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
        # Check again on every access: the caller may have changed the model since the block ended.
        # A mark that would not be found in the owner's own model must not be relied upon.
        if lacking := self.embedding_failure(key):
            raise MarkNotTakenError(lacking if self._called else f"{self.forgotten}; {lacking}")
        return key

    @final
    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs beside the secret, in types that torch can save.

        `fingerprint` is a commitment to secret, owner, scheme, fields and tensors. `commitment` is
        the C0 of the key, or None before the key is drawn. Neither reveals the secret.
        """
        return {
            "type": _STATE_TYPE,
            "fingerprint": self._compute_fingerprint(),
            "commitment": self._read_drawn_c0(),
            **self.export_family_state(),
        }

    @final
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state()` of an embedding with the same scheme, secret and owner.

        Call this method inside the block, after the model's own checkpoint is loaded and before the
        next step. After an error the embedding is unchanged.

        Raises:
            LoopError: the block is not open; or the state belongs to another embedding, was taken
                before this embedding's key was drawn, or is damaged.
        """
        self.require_open()
        self._check_state(state)
        with refuse_damage():
            self.restore_family(state)
        self._restored = True

    @abstractmethod
    def export_family_state(self) -> dict[str, Any]:
        """Return the part of the state that the family adds, under the names of `fields`."""

    @abstractmethod
    def restore_family(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of this embedding; on an error change nothing."""

    def require_commitment(self, key: Key, state: Mapping[str, Any]) -> None:
        """Raise `LoopError` if a key made from a state does not have the state's commitment."""
        if key.c0.hex() != state["commitment"]:
            raise LoopError(
                "the state does not hold what its key was drawn from (its commitment does not "
                "follow): it was changed; restore it from another checkpoint"
            )

    def note_drawn_key(self, key: Key) -> None:
        """Save the drawn key in the folder of the unfinished key, if the embedding has a place."""
        if self._place is not None and self._phase == "open":
            self._place.note_drawn_key(key, replaces=self._restored)

    def _compute_fingerprint(self) -> str:
        """Return a commitment to secret, owner, scheme, fields and tensors, in hexadecimal.

        Frozen tensors are left out: a resumed run begins with other weights and takes the frozen
        tensors of the interrupted run from its state.
        """
        return replace(self._begun, frozen={}).c0.hex()

    def _read_drawn_c0(self) -> str | None:
        """Return C0 of the key in hexadecimal, or None before the key is drawn."""
        key = self._get_drawn_key()
        return None if key is None else key.c0.hex()

    @abstractmethod
    def _get_drawn_key(self) -> Key | None:
        """Return the key as it was drawn, without tensors that were learnt since."""

    def _get_bound_key(self) -> Key | None:
        """Return the drawn key if a restored state may no longer replace it."""
        return self._get_drawn_key()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `LoopError` for a state that is malformed or of another embedding or key."""
        expected = {"type", "fingerprint", "commitment"} | self.fields
        found = set(state) if isinstance(state, Mapping) else set()
        # Compare the set of names exactly: a checkpoint file is hostile input.
        if found != expected or state["type"] != _STATE_TYPE:
            wrong = ", ".join(sorted(map(str, found ^ expected)) or ["type"])
            raise LoopError(
                f"this is not what state() of a {type(self).__name__} gives: missing or unknown is "
                f"{make_printable(wrong, 200)}"
            )
        if state["fingerprint"] != self._compute_fingerprint():
            raise LoopError(
                "the state is of another embedding: its secret, owner, scheme, fields or tensors "
                'differ; embed as before, with key="…" and resume=True or with the same material'
            )
        drawn = self._get_bound_key()
        # An interrupted run may have drawn a key already; a state must agree with that key too.
        if drawn is None and self._place is not None:
            drawn = self._place.drawn
        if drawn is not None and state["commitment"] not in (drawn.c0.hex(), None):
            other = make_printable(str(state["commitment"]), 80)
            raise LoopError(
                f"the state is of a key with the commitment {other}, and this embedding draws "
                f"{drawn.c0.hex()}: restore the state of its own run"
            )
        if self._get_bound_key() is not None and state["commitment"] is None:
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
def refuse_damage() -> Iterator[None]:
    """Turn exceptions that damaged values in a state cause into a one-line `LoopError`."""
    try:
        yield
    except CountermarkError:
        raise
    # torch and numpy raise these types for values of a wrong type, shape or range.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        said = make_printable(" ".join(str(e).split()), 200)
        raise LoopError(
            f"the state is damaged ({type(e).__name__}: {said}): restore it from another checkpoint"
        ) from None


def to_tensors(named: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Copy named arrays into torch tensors, for a state."""
    return {name: torch.from_numpy(np.array(each)) for name, each in named.items()}


def to_arrays(named: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Convert the named tensors of a state to arrays."""
    return {str(name): each.detach().cpu().numpy() for name, each in named.items()}
