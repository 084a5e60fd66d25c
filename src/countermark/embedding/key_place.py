"""The place of an embedding's key: looked at before training, written to when training has ended.

While training runs, a folder `NAME.unfinished` beside the place holds the secret, so that an
interrupted training goes on with the same key. It holds key folders as `countermark.keyfile` writes
them: `begun`, without the tensors that are frozen later, and `drawn`, once the key is drawn.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from countermark.errors import ConfigError, CountermarkError, KeyFileError, LoopError
from countermark.files import creating
from countermark.key import Key, KeyMaterial
from countermark.keyfile import load_key, refuse_existing, save_key

_BEGUN, _DRAWN = "begun", "drawn"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class KeyPlace:
    """Where an embedding saves its key, and the passphrase that encrypts it there.

    Attributes:
        path: the key folder to write; nothing may have that name yet.
        passphrase: encrypts the key, and the unfinished key beside it; None leaves both readable
            by their owner only. `repr` does not show it.
    """

    path: str | Path
    passphrase: str | None = field(default=None, repr=False)


class UnfinishedKey:
    """The key of an embedding under way.

    In a distributed run every rank makes one; rank 0 alone reads and writes, and the others raise
    what it raises.

    Args:
        key: where the finished key is saved.
        resume: take up the unfinished key that an interrupted run left there, if there is one.

    Raises:
        KeyFileError: a finished key lies there, or an unfinished one and `resume` is false; nothing
            can be written there; or the unfinished key cannot be read.
    """

    def __init__(self, key: str | Path | KeyPlace, *, resume: bool) -> None:
        place = key if isinstance(key, KeyPlace) else KeyPlace(key)
        self._path, self._passphrase = Path(place.path), place.passphrase
        self._resume = resume
        self.folder = self._path.with_name(f"{self._path.name}.unfinished")
        self._begun, self.drawn = do_on_rank_zero(self._look)
        """What an interrupted run left: its key as far as it was made, and as it was drawn."""

    def take_up(self, key: Key, given: KeyMaterial | None) -> Key:
        """Find the key to embed with, as far as it is known before training.

        Its secret is that of the interrupted run, the given one, or a fresh one; what the
        interrupted run committed to of the model before the mark stays as it was.

        Args:
            key: scheme, fields, tensors and owner of the embedding; its material does not matter.
            given: the material that the caller wants.

        Raises:
            KeyFileError: the interrupted run embedded something else, or another secret.
        """
        begun = self._begun
        if begun is None:
            return replace(key, material=do_on_rank_zero(lambda: given or key.material))
        for what, before, now in (
            ("owner", begun.owner, key.owner),
            ("scheme", begun.scheme, key.scheme),
            ("fields", _as_json(begun.fields), _as_json(key.fields)),
            ("tensors", _as_json(begun.tensors), _as_json(key.tensors)),
        ):
            if before != now:
                raise KeyFileError(
                    f"{self.folder} was begun with {what} {_shown(before, now)}, and now it is "
                    f"{_shown(now, before)}: embed as before, or move it away to begin another key"
                )
        if given is not None and given != begun.material:
            raise KeyFileError(
                f"{self.folder} holds another secret than the material that was given: leave "
                "material out, or move the folder away to begin another key"
            )
        return begun

    def begin(self, key: Key) -> None:
        """Write the unfinished key as training begins, unless it was taken up.

        Args:
            key: without what is frozen later.

        Raises:
            KeyFileError: it cannot be written, or something has its name by now.
        """
        if self._begun is None:
            do_on_rank_zero(lambda: self._write_begun(key))
            self._begun = key

    def note_drawn(self, key: Key, *, replaces: bool) -> None:
        """Write the key as it is drawn, so that no later run can end with another one unnoticed.

        Args:
            key: as far as it is made now.
            replaces: a checkpoint from before the draw was restored, so that another draw may take
                the place of an earlier one.

        Raises:
            LoopError: an earlier run drew another key here.
            KeyFileError: it cannot be written.
        """
        before = self.drawn
        if before is not None and before.commitment == key.commitment:
            return
        if before is not None and before.c0 != key.c0 and not replaces:
            raise LoopError(
                f"the interrupted run drew a key with the commitment {before.commitment}, and this "
                f"one draws {key.commitment}: restore(state) from a checkpoint of that run first, "
                f"or move {self.folder} away to begin another key"
            )
        do_on_rank_zero(lambda: self._write_drawn(key))
        self.drawn = key

    def finish(self, key: Key) -> None:
        """Save the finished key, then remove the unfinished one.

        Raises:
            KeyFileError: something has the key's name by now; the unfinished key stays.
        """
        do_on_rank_zero(lambda: self._write_finished(key))

    def _look(self) -> tuple[Key | None, Key | None]:
        refuse_existing(self._path)
        if self._passphrase == "":
            raise KeyFileError(
                "an empty passphrase protects nothing: give one, or None for no cipher"
            )
        _require_writable(self._path.parent)
        if not os.path.lexists(self.folder):
            return None, None
        if not self._resume:
            raise KeyFileError(
                f"{self.folder} is the key of an interrupted training: go on with resume=True, or "
                "move it away to begin another key"
            )
        begun = load_key(self.folder / _BEGUN, self._passphrase)
        drawn = self.folder / _DRAWN
        return begun, load_key(drawn, self._passphrase) if drawn.exists() else None

    def _write_begun(self, key: Key) -> None:
        try:
            with creating(self.folder) as folder:
                save_key(key, folder / _BEGUN, self._passphrase)
        except FileExistsError:
            raise KeyFileError(
                f"{self.folder} came in the way: another training embeds the same key; give this "
                "one another name"
            ) from None
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def _write_drawn(self, key: Key) -> None:
        drawn = self.folder / _DRAWN
        try:
            shutil.rmtree(drawn, ignore_errors=True)
            save_key(key, drawn, self._passphrase)
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def _write_finished(self, key: Key) -> None:
        try:
            save_key(key, self._path, self._passphrase)
        except OSError as error:
            raise _unwritable(self._path, error) from None
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise KeyFileError(
                f"{self.folder} cannot be removed ({error.strerror}): the key is saved at "
                f"{self._path}, and the folder holds its secret, so remove it yourself"
            ) from None


def place_for(key: str | Path | KeyPlace | None, *, resume: bool) -> UnfinishedKey | None:
    """The unfinished key for what `embed` is given, or None where it is given no place.

    Raises:
        ConfigError: `resume` without a place.
        KeyFileError: as `UnfinishedKey`.
    """
    if key is not None:
        return UnfinishedKey(key, resume=resume)
    if resume:
        raise ConfigError(
            "resume=True needs the place of the key whose training was interrupted: give "
            'key="…" too'
        )
    return None


def do_on_rank_zero(act: Callable[[], _Value]) -> _Value:
    """Do something on rank 0 alone and hand its result, or its error, to every rank.

    Without a process group it is done here. Every rank must call it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return act()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except CountermarkError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: _Value = outcome[0]
    return result


def _require_writable(folder: Path) -> None:
    """Raise `KeyFileError` where no key could be written into a folder, which may not exist yet."""
    ancestors = (folder, *folder.absolute().parents)
    existing = next(each for each in ancestors if os.path.exists(each))  # noqa: PTH110 - no errors
    if not existing.is_dir():
        raise KeyFileError(f"{existing} is not a folder: choose another place for the key")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise KeyFileError(f"{existing} cannot be written to: choose another place for the key")


def _unwritable(path: Path, error: OSError) -> KeyFileError:
    return KeyFileError(
        f"{path} cannot be written ({error.strerror}): make room there, or choose another place "
        "for the key"
    )


def _as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file: tuples are lists there."""
    return json.loads(json.dumps(value))


def _shown(value: Any, other: Any) -> str:
    """A value for an error message; of two sets of fields only those that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: each for name, each in value.items() if other.get(name) != each}
    return repr(value)
