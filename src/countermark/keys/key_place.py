"""The place of an embedding's key: checked before training, written to after training.

While training runs, a folder `NAME.unfinished` beside the place holds the secret, so that an
interrupted training can continue with the same key. The folder holds key folders in the format of
`countermark.keys.storage`: `begun`, without the tensors that are frozen later, and `drawn`, once the key
is drawn.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from countermark._internal.files import create_folder
from countermark.errors import ConfigError, CountermarkError, KeyFileError, LoopError
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.storage import load_key, refuse_existing, save_key

_BEGUN, _DRAWN = "begun", "drawn"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class KeyPlace:
    """Where an embedding saves its key, and the passphrase that encrypts the key there.

    Attributes:
        path: the key folder to write; the name must be free.
        passphrase: encrypts the key, and the unfinished key beside it; None leaves both readable
            by their owner only. `repr` does not show it.
    """

    path: str | Path
    passphrase: str | None = field(default=None, repr=False)


class UnfinishedKey:
    """The key of an embedding whose training still runs.

    In a distributed run every rank creates an instance. Only rank 0 reads and writes files; an
    error on rank 0 is raised on every rank.

    Args:
        key: where the finished key is saved.
        resume: take up the unfinished key that an interrupted run left there, if there is one.

    Raises:
        KeyFileError: a finished key lies there, or an unfinished key and `resume` is false; the
            place is not writable; or the unfinished key cannot be read.
    """

    def __init__(self, key: str | Path | KeyPlace, *, resume: bool) -> None:
        place = key if isinstance(key, KeyPlace) else KeyPlace(key)
        self._path, self._passphrase = Path(place.path), place.passphrase
        self._resume = resume
        self.folder = self._path.with_name(f"{self._path.name}.unfinished")
        self._begun, self.drawn = run_on_rank_zero(self._read_existing)
        """The unfinished key of an interrupted run: its material, and the key if it was drawn."""

    def take_up(self, key: Key, given: KeyMaterial | None) -> Key:
        """Return the key to embed with, as far as it is known before training.

        Its secret is that of the interrupted run, else the given secret, else a fresh one. Tensors
        that the interrupted run committed to before embedding stay as they were.

        Args:
            key: scheme, fields, tensors and owner of the embedding; its material is used only if
                `given` is None.
            given: the material that the caller wants.

        Raises:
            KeyFileError: the interrupted run embedded another key, or with another secret.
        """
        begun = self._begun
        if begun is None:
            # Rank 0 hands out its material: each rank would draw a secret of its own.
            return replace(key, material=run_on_rank_zero(lambda: given or key.material))
        # The saved key was read from JSON, where tuples became lists: compare JSON with JSON.
        for what, before, now in (
            ("owner", begun.owner, key.owner),
            ("scheme", begun.scheme, key.scheme),
            ("fields", _convert_by_json(begun.fields), _convert_by_json(key.fields)),
            ("tensors", _convert_by_json(begun.tensors), _convert_by_json(key.tensors)),
        ):
            if before != now:
                raise KeyFileError(
                    f"{self.folder} was begun with {what} {_describe_value(before, now)}, and now it is "
                    f"{_describe_value(now, before)}: embed as before, or move it away to begin another key"
                )
        if given is not None and given != begun.material:
            raise KeyFileError(
                f"{self.folder} holds another secret than the material that was given: leave "
                "material out, or move the folder away to begin another key"
            )
        return begun

    def begin(self, key: Key) -> None:
        """Write the unfinished key when training begins, unless an earlier run wrote it.

        Args:
            key: the key without tensors that are frozen later.

        Raises:
            KeyFileError: the folder cannot be written, or its name is taken by now.
        """
        if self._begun is None:
            run_on_rank_zero(lambda: self._write_begun(key))
            self._begun = key

    def note_drawn_key(self, key: Key, *, replaces: bool) -> None:
        """Write the drawn key, so that no later run can end with another key unnoticed.

        Args:
            key: the key as far as it is known now.
            replaces: a checkpoint from before the draw was restored, so that a second draw may
                replace the first.

        Raises:
            LoopError: an earlier run drew another key here.
            KeyFileError: the key cannot be written.
        """
        before = self.drawn
        # A resumed run draws the same key again, which is written already.
        if before is not None and before.commitment == key.commitment:
            return
        if before is not None and before.c0 != key.c0 and not replaces:
            raise LoopError(
                f"the interrupted run drew a key with the commitment {before.commitment}, and this "
                f"one draws {key.commitment}: restore(state) from a checkpoint of that run first, "
                f"or move {self.folder} away to begin another key"
            )
        run_on_rank_zero(lambda: self._write_drawn(key))
        self.drawn = key

    def finish(self, key: Key) -> None:
        """Save the finished key, then remove the unfinished one.

        Raises:
            KeyFileError: the key's name is taken by now; the unfinished key stays.
        """
        run_on_rank_zero(lambda: self._write_finished(key))

    def _read_existing(self) -> tuple[Key | None, Key | None]:
        """Check the place; return the begun and the drawn key of an interrupted run, if any."""
        refuse_existing(self._path)
        # An empty passphrase looks like encryption to the caller and would protect nothing.
        if self._passphrase == "":
            raise KeyFileError(
                "an empty passphrase protects nothing: give one, or None for no cipher"
            )
        # Find out before training, not after hours of it, that the key cannot be saved.
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
        """Create the folder of the unfinished key with the begun key in it."""
        try:
            # The folder appears whole or not at all, and fails if its name is taken.
            with create_folder(self.folder) as folder:
                save_key(key, folder / _BEGUN, self._passphrase)
        except FileExistsError:
            raise KeyFileError(
                f"{self.folder} came in the way: another training embeds the same key; give this "
                "one another name"
            ) from None
        except OSError as error:
            raise _make_unwritable_error(self.folder, error) from None

    def _write_drawn(self, key: Key) -> None:
        """Write the drawn key into the folder, in place of an earlier one."""
        drawn = self.folder / _DRAWN
        try:
            # The caller has checked that the earlier key may be replaced; saving refuses a taken
            # name.
            shutil.rmtree(drawn, ignore_errors=True)
            save_key(key, drawn, self._passphrase)
        except OSError as error:
            raise _make_unwritable_error(self.folder, error) from None

    def _write_finished(self, key: Key) -> None:
        """Save the key at its place, then remove the folder of the unfinished key."""
        try:
            # Save first, remove second: an interruption between both leaves two copies, never zero.
            save_key(key, self._path, self._passphrase)
        except OSError as error:
            raise _make_unwritable_error(self._path, error) from None
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise KeyFileError(
                f"{self.folder} cannot be removed ({error.strerror}): the key is saved at "
                f"{self._path}, and the folder holds its secret, so remove it yourself"
            ) from None


def make_unfinished_key(key: str | Path | KeyPlace | None, *, resume: bool) -> UnfinishedKey | None:
    """Return the unfinished key at the place that `embed` is given, or None without a place.

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


def run_on_rank_zero(act: Callable[[], _Value]) -> _Value:
    """Call a function on rank 0 alone and return its result, or raise its error, on every rank.

    Without a process group the function is called in this process. Every rank must call it.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return act()
    # The result and the error. An error must travel too, or the other ranks would wait forever.
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
    """Raise `KeyFileError` if no key could be written into a folder, which may not exist yet."""
    ancestors = (folder, *folder.absolute().parents)
    # The search ends at the file system root, which always exists.
    existing = next(each for each in ancestors if os.path.exists(each))  # noqa: PTH110 - no errors
    if not existing.is_dir():
        raise KeyFileError(f"{existing} is not a folder: choose another place for the key")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise KeyFileError(f"{existing} cannot be written to: choose another place for the key")


def _make_unwritable_error(path: Path, error: OSError) -> KeyFileError:
    """Make the `KeyFileError` for a path that cannot be written."""
    return KeyFileError(
        f"{path} cannot be written ({error.strerror}): make room there, or choose another place "
        "for the key"
    )


def _convert_by_json(value: Any) -> Any:
    """Return a value as it comes back from a JSON file: tuples become lists."""
    return json.loads(json.dumps(value))


def _describe_value(value: Any, other: Any) -> str:
    """Format a value for an error message; of two dictionaries show only fields that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: each for name, each in value.items() if other.get(name) != each}
    return repr(value)
