"""From a checkpoint and an owner's name to a stamped copy and its key."""

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

from countermark._internal.output_paths import require_writable_place
from countermark.alignment import commit_reference
from countermark.checkpoints import Weights, open_weights
from countermark.checkpoints.dtypes import encode_values
from countermark.errors import ConfigError, MarkNotTakenError
from countermark.keys.key import REFERENCE, Key, KeyMaterial
from countermark.keys.messages import Bits
from countermark.keys.storage import refuse_existing, refuse_nested
from countermark.schemes import load_scheme
from countermark.schemes.stamp.scheme import BEFORE, Stamp
from countermark.stamping.advising import Advice, advise
from countermark.stamping.copying import (
    PieceWriter,
    copy_checkpoint,
    get_shards,
    require_copy_place,
    require_key_outside,
)
from countermark.stamping.solving import Shifts, shift_values, solve_shifts


@dataclass(frozen=True)
class StampResult:
    """The result of `stamp`.

    Attributes:
        key: the key, as saved.
        advice: the choice of parameters and the expected effects.
        change: relative change of the read values, as a root of summed squares.
        left_out: files beside the checkpoint that may hold the unmarked model or a secret; they
            were not copied.
    """

    key: Key
    advice: Advice
    change: float
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return self.advice.to_json() | {
            "change": self.change,
            "bits": self.key.bits,
            "matched": self.key.bits,  # all bits match, otherwise `stamp` raises
            "commitment": self.key.commitment,
            "test_key": self.key.test_key,
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class StampedCopy:
    """The result of a copy: the relative change of the read values, and the files left out."""

    change: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class StampPaths:
    """The paths of a stamped copy and its key; neither may exist yet.

    Attributes:
        out: the file or folder to write.
        key: the key folder to write.
        passphrase: encrypts the key; None to leave the key unencrypted.
    """

    out: Path
    key: Path
    passphrase: str | None = None

    def check(self, source: Path) -> None:
        """Raise `ConfigError` or `KeyFileError` if copy or key cannot be written to their paths."""
        # All paths are checked before the long computation.
        refuse_existing(self.key)
        require_copy_place(source, self.out)
        require_key_outside(self.key, source)
        refuse_nested(self.key, self.out)
        for each in (self.key, self.out):
            require_writable_place(each)


def stamp(
    source: Path, places: StampPaths, *, owner: str, fields: Mapping[str, Any] | None = None,
    keep_before: bool = True, material: KeyMaterial | None = None,
) -> StampResult:  # fmt: skip
    """Make a copy of a checkpoint that bears a mark, and the key of the mark.

    Args:
        source: a .safetensors file, or a folder with one or with shards under an index; only read.
        places: the paths of copy and key.
        owner: the owner's name.
        fields: fields of the scheme; `advise` chooses the others.
        keep_before: keep the read values as they were before the mark in the key, as a reference
            for alignment.
        material: secret and nonce; drawn from the operating system when None.

    Raises:
        SuspectError: the checkpoint cannot be read, or is not a safetensors checkpoint.
        CountermarkError: the arguments cannot be met; nothing is written then.
        OSError: the disk is full or not writable; nothing is left on it then.
    """
    places.check(source)
    with open_weights(source) as weights:
        # Refuse other formats before the long computation.
        get_shards(weights, source)
        advice = advise(weights, fields)
        key = draw_key(
            weights, advice, owner, material or KeyMaterial.generate(), keep_before=keep_before
        )
        with _save_key_with_copy(places) as save:
            copy = write_marked_copy(
                source, weights, places.out, key=key, bits=key.message, then=save
            )
    return StampResult(key, advice, copy.change, copy.left_out)


def write_marked_copy(
    source: Path, weights: Weights, out: Path, *, key: Key, bits: Bits,
    then: Callable[[Key], None] | None = None,
) -> StampedCopy:  # fmt: skip
    """Make a copy of an open checkpoint from which a key reads the given bits (T,).

    Args:
        source: path of the checkpoint.
        weights: the open checkpoint.
        out: the file or folder to write; must not exist yet.
        key: a key of the scheme `stamp`.
        bits: the bits that the key shall read.
        then: called with the key when the copy is complete, before the copy gets its name.

    Raises:
        ConfigError: the key belongs to another scheme.
        MarkNotTakenError: the key does not read the bits from the copy.
    """
    # Only the scheme `stamp` defines which values to shift for a bit.
    scheme = load_scheme(key)
    if not isinstance(scheme, Stamp):
        raise ConfigError(f"a key of {key.scheme} marks no finished checkpoint: expected stamp")
    shifts = solve_shifts(weights, scheme, key, bits)
    with copy_checkpoint(source, weights, out) as (place, write, left_out):
        change = _write_shifted(weights, scheme, key, shifts, write)
        # Before the copy gets its name: a copy without its mark must never appear.
        _require_bits(place, scheme, key, bits)
        if then is not None:
            then(key)
    if left_out:
        warnings.warn(
            "left out, because they may hold the model without the mark, or a secret: "
            f"{', '.join(left_out)}",
            stacklevel=3,
        )
    return StampedCopy(change, tuple(left_out))


@contextmanager
def _save_key_with_copy(places: StampPaths) -> Iterator[Callable[[Key], None]]:
    """Yield a function that saves the key; remove the key if the copy did not get its name."""
    saved = []

    def save_key(key: Key) -> None:
        """Save the key in its folder."""
        key.save(places.key, places.passphrase)
        saved.append(key)

    try:
        yield save_key
    # KeyboardInterrupt too: a key without its model would be a trap for its owner.
    except BaseException:
        if saved and not os.path.lexists(places.out):
            shutil.rmtree(places.key)
        raise


def draw_key(
    weights: Weights, advice: Advice, owner: str, material: KeyMaterial, *, keep_before: bool
) -> Key:
    """Draw the key; its commitment covers the unmarked checkpoint, and the read values if kept."""
    # The digest proves later that a reference is the model before the mark.
    frozen: dict[str, NDArray[Any]] = {REFERENCE: commit_reference(weights)}
    if keep_before:
        for name, place in advice.scheme.draw_places(advice.tensors, material).items():
            part = weights.read_part(name, place.start, len(place))
            frozen[f"{BEFORE}.{name}"] = encode_values(part, weights.tensors[name].dtype)
    return advice.scheme.generate_key(advice.tensors, owner=owner, material=material, frozen=frozen)


def _write_shifted(
    weights: Weights, scheme: Stamp, key: Key, shifts: Shifts, write: PieceWriter
) -> float:
    """Write the shifted values; return the relative change of the read values."""
    changed = total = 0.0
    for piece in shift_values(weights, scheme, key, shifts):
        write(piece)
        changed += float(np.square(piece.after - piece.before).sum())
        total += float(np.square(piece.before).sum())
    return math.sqrt(changed / total) if total else 0.0


def _require_bits(copy: Path, scheme: Stamp, key: Key, bits: Bits) -> None:
    """Check that the key reads the bits from the copy on disk.

    Raises:
        MarkNotTakenError: some bits are wrong.
    """
    # The copy is opened as a file, so the check covers encoding and offsets as well.
    with open_weights(copy) as weights:
        where = {name: name for name in key.tensors}
        read = scheme.read_bits(scheme.read_suspect_tensors(weights, where, key), key)
    if wrong := int(np.count_nonzero(read != bits)):
        raise MarkNotTakenError(
            f"{wrong} of {len(bits)} bits are not in the copy: expected all; "
            "take fewer bits, more layers or a larger margin"
        )
