"""A checkpoint and an owner's name to a stamped copy and its key."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.alignment import commit_reference
from countermark.errors import ConfigError, MarkNotTakenError
from countermark.key import REFERENCE, Key, KeyMaterial
from countermark.keyfile import refuse_existing, refuse_nested
from countermark.message import Bits
from countermark.places import require_place
from countermark.schemes import scheme_of
from countermark.schemes.stamp import BEFORE, Stamp
from countermark.stamping.advising import Advice, advise
from countermark.stamping.copying import Writer, copied, require_apart, require_room, shards_of
from countermark.stamping.solving import Shifts, shifted, solve
from countermark.weights import Weights, open_weights
from countermark.weights.dtypes import encoded


@dataclass(frozen=True)
class Stamped:
    """What was made.

    Attributes:
        key: the key, as it was saved.
        advice: what was expected.
        change: the relative change of the values that are read, root of summed squares.
        left_out: what beside the checkpoint may hold the model without the mark, or a secret.
    """

    key: Key
    advice: Advice
    change: float
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return self.advice.to_json() | {
            "change": self.change,
            "bits": self.key.bits,
            "matched": self.key.bits,  # or there would be no copy
            "commitment": self.key.commitment,
            "test_key": self.key.test_key,
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class Copy:
    """A copy that was made: the relative change of what is read, and the files left out."""

    change: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Places:
    """Where a stamped copy and its key go; neither may exist yet.

    Attributes:
        out: the file or folder to write.
        key: the key folder to write.
        passphrase: encrypts the key; None for none.
    """

    out: Path
    key: Path
    passphrase: str | None = None

    def check(self, source: Path) -> None:
        """Raise `ConfigError` or `KeyFileError` when something is in the way."""
        refuse_existing(self.key)
        require_room(source, self.out)
        require_apart(self.key, source)
        refuse_nested(self.key, self.out)
        for each in (self.key, self.out):
            require_place(each)


def stamp(
    source: Path, places: Places, *, owner: str, fields: Mapping[str, Any] | None = None,
    keep_before: bool = True, material: KeyMaterial | None = None,
) -> Stamped:  # fmt: skip
    """Make a copy of a checkpoint that bears a mark, and its key.

    Args:
        source: a .safetensors file, or a folder with one or with shards under an index; only read.
        places: where copy and key go.
        owner: whose mark it is.
        fields: fields of the scheme; the others are advised.
        keep_before: keep in the key what it reads as it was, as a reference for alignment.
        material: secret and nonce; drawn from the operating system when None.

    Raises:
        SuspectError: the checkpoint cannot be read, or is no safetensors checkpoint.
        CountermarkError: what cannot be right; nothing is written then.
        OSError: the disk is full, or may not be written to; nothing is left then.
    """
    places.check(source)
    with open_weights(source) as weights:
        shards_of(weights, source)
        advice = advise(weights, fields)
        key = drawn_key(
            weights, advice, owner, material or KeyMaterial.fresh(), keep_before=keep_before
        )
        with _both_or_none(places) as save:
            copy = copy_marked(source, weights, places.out, key=key, bits=key.message, then=save)
    return Stamped(key, advice, copy.change, copy.left_out)


def copy_marked(
    source: Path, weights: Weights, out: Path, *, key: Key, bits: Bits,
    then: Callable[[Key], None] | None = None,
) -> Copy:  # fmt: skip
    """Make a copy of an open checkpoint from which a key reads these bits (T,).

    Args:
        source: where the checkpoint lies.
        weights: the same, open.
        out: the file or folder to write; must not exist yet.
        key: a key of `stamp`.
        bits: what it shall read.
        then: called with the key when the copy is right, before it gets its name.

    Raises:
        MarkNotTakenError: the bits are not in the copy.
    """
    scheme = scheme_of(key)
    if not isinstance(scheme, Stamp):
        raise ConfigError(f"a key of {key.scheme} marks no finished checkpoint: expected stamp")
    shifts = solve(weights, scheme, key, bits)
    with copied(source, weights, out) as (place, write, left_out):
        change = _write(weights, scheme, key, shifts, write)
        _read_back(place, scheme, key, bits)
        if then is not None:
            then(key)
    if left_out:
        warnings.warn(
            "left out, because they may hold the model without the mark, or a secret: "
            f"{', '.join(left_out)}",
            stacklevel=3,
        )
    return Copy(change, tuple(left_out))


@contextmanager
def _both_or_none(places: Places) -> Iterator[Callable[[Key], None]]:
    """Yields what saves the key; it is removed again where the model did not get its name."""
    saved = []

    def save(key: Key) -> None:
        key.save(places.key, places.passphrase)
        saved.append(key)

    try:
        yield save
    except BaseException:
        if saved and not os.path.lexists(places.out):
            shutil.rmtree(places.key)
        raise


def drawn_key(
    weights: Weights, advice: Advice, owner: str, material: KeyMaterial, *, keep_before: bool
) -> Key:
    """The key; the whole checkpoint, and what is read of it, enter its commitment as they are."""
    frozen: dict[str, NDArray[Any]] = {REFERENCE: commit_reference(weights)}
    if keep_before:
        for name, place in advice.scheme.places(advice.tensors, material).items():
            part = weights.read_part(name, place.start, len(place))
            frozen[f"{BEFORE}.{name}"] = encoded(part, weights.tensors[name].dtype)
    return advice.scheme.generate_key(advice.tensors, owner=owner, material=material, frozen=frozen)


def _write(weights: Weights, scheme: Stamp, key: Key, shifts: Shifts, write: Writer) -> float:
    """Write the shifted values; returns their relative change."""
    changed = total = 0.0
    for piece in shifted(weights, scheme, key, shifts):
        write(piece)
        changed += float(np.square(piece.after - piece.before).sum())
        total += float(np.square(piece.before).sum())
    return math.sqrt(changed / total) if total else 0.0


def _read_back(copy: Path, scheme: Stamp, key: Key, bits: Bits) -> None:
    """Read the bits from the copy as it lies on disk.

    Raises:
        MarkNotTakenError: they are not there.
    """
    with open_weights(copy) as weights:
        where = {name: name for name in key.tensors}
        read = scheme.read_bits(scheme.read_from(weights, where, key), key)
    if wrong := int(np.count_nonzero(read != bits)):
        raise MarkNotTakenError(
            f"{wrong} of {len(bits)} bits are not in the copy: expected all; "
            "take fewer bits, more layers or a larger margin"
        )
