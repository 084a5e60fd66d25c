"""What is served, from where, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from countermark.errors import ConfigError, nearest, printable

_MOST_NAMES = 1000  # of a folder that are shown


@dataclass(frozen=True)
class Limits:
    """How much anybody may ask for.

    Attributes:
        upload: bytes of a suspect.
        memory: bytes of address space of a job.
        seconds: that a job may run.
        jobs: that run at the same time.
        waiting: jobs that have not ended, at most.
        requests: a second and address, over time; `burst` at once.
        logins: a minute and address.
    """

    upload: int = 1 << 30
    memory: int = 16 << 30
    seconds: float = 3600
    jobs: int = 2
    waiting: int = 16
    requests: float = 20
    burst: int = 200
    logins: int = 10


@dataclass(frozen=True)
class Shelf:
    """A folder out of which something is chosen by its name, and never by a path.

    Attributes:
        folder: None where there is none.
        holds: what lies in it, in a word.
        marked_by: a file that an entry must hold to count; none where files count, too.
    """

    folder: Path | None
    holds: str
    marked_by: str | None = None

    def entries(self) -> Mapping[str, Path]:
        """What lies in the folder itself, by name; links that lead out of it do not count."""
        if self.folder is None:
            return {}
        inside = self.folder.resolve()
        try:
            found = sorted(self.folder.iterdir())[:_MOST_NAMES]
        except OSError:
            return {}
        return {each.name: each for each in found if self._counts(each, inside)}

    def path(self, name: str) -> Path:
        """The path of an entry.

        Raises:
            ConfigError: there is none of that name.
        """
        entries = self.entries()
        if name not in entries:
            why = nearest(name[:80], entries)
            raise ConfigError(f"this server has no {self.holds} {printable(name, 80)!r}: {why}")
        return entries[name]

    def _counts(self, path: Path, inside: Path) -> bool:
        if path.name.startswith(".") or not path.name.isprintable():
            return False
        if not path.resolve().is_relative_to(inside):
            return False
        if self.marked_by is not None:
            return (path / self.marked_by).is_file()
        return path.is_file() or path.is_dir()


@dataclass(frozen=True)
class Settings:
    """What a server serves.

    Attributes:
        ledger: the URL of the ledger.
        state: the folder of its jobs.
        keys, suspects: folders, or None.
        results: the folder `results` of a clone, with `experiments` and `tables` beside it.
        authorities: PEM files of those whose time stamps are believed.
        limits: how much may be asked for.
        token_sha256: of the token; the token itself is kept nowhere.
    """

    ledger: str = field(repr=False)  # as it was given, before anybody looked for a password in it
    state: Path
    token_sha256: bytes = field(repr=False)
    keys: Path | None = None
    suspects: Path | None = None
    results: Path | None = None
    authorities: tuple[Path, ...] = ()
    limits: Limits = Limits()

    @property
    def key_shelf(self) -> Shelf:
        """The keys that may be chosen."""
        return Shelf(self.keys, "key", "key.json")

    @property
    def suspect_shelf(self) -> Shelf:
        """The models and folders of images that may be chosen."""
        return Shelf(self.suspects, "suspect")

    def require(self) -> None:
        """Raise `ConfigError` for a folder that is not there."""
        for folder in (self.keys, self.suspects, self.results):
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"{folder} is no folder: expected one that is there")
