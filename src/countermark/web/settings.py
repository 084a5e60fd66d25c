"""Settings of the server: what it serves, from which folders, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from countermark.errors import ConfigError, make_printable, suggest_nearest

# Entries of a folder that are listed.
_MOST_NAMES = 1000


@dataclass(frozen=True)
class ServerLimits:
    """The limits of requests and jobs.

    Attributes:
        upload: bytes of an uploaded suspect.
        memory: bytes of address space of a job.
        seconds: the time that a job may run.
        jobs: the number of jobs that run at the same time.
        waiting: the largest number of jobs that have not ended.
        requests: requests a second from one address, over time.
        burst: requests at once from one address.
        logins: log-ins a minute from one address.
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
class NamedFolder:
    """A folder whose entries visitors choose by name, and never by a path.

    Attributes:
        folder: the folder; None for an empty choice.
        holds: a word for its entries, used in messages.
        marked_by: the name of a file that an entry, then a folder, must hold; None to take files
            and any folders.
    """

    folder: Path | None
    holds: str
    marked_by: str | None = None

    def list_entries(self) -> Mapping[str, Path]:
        """Return the paths of all entries by name, without links that lead out of the folder."""
        if self.folder is None:
            return {}
        inside = self.folder.resolve()
        try:
            found = sorted(self.folder.iterdir())[:_MOST_NAMES]
        except OSError:
            return {}
        return {each.name: each for each in found if self._is_entry(each, inside)}

    def find_path(self, name: str) -> Path:
        """Return the path of the file or folder that a visitor chose by its name.

        Raises:
            ConfigError: there is no entry of that name.
        """
        # The name is looked up and never joined to a path, so that `..` cannot leave the folder.
        entries = self.list_entries()
        if name not in entries:
            why = suggest_nearest(name[:80], entries)
            raise ConfigError(
                f"this server has no {self.holds} {make_printable(name, 80)!r}: {why}"
            )
        return entries[name]

    def _is_entry(self, path: Path, inside: Path) -> bool:
        """Return true if a path in the folder is an entry.

        Args:
            path: the path.
            inside: the resolved folder.
        """
        if path.name.startswith(".") or not path.name.isprintable():
            return False
        # A link out of the folder would let visitors read other files of the machine.
        if not path.resolve().is_relative_to(inside):
            return False
        if self.marked_by is not None:
            return (path / self.marked_by).is_file()
        return path.is_file() or path.is_dir()


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server.

    Attributes:
        ledger: the URL of the ledger.
        state: the folder of its jobs.
        token_sha256: the digest of the token; the token itself is kept nowhere.
        keys, suspects: folders whose entries visitors choose, or None.
        documentation: the address of the documentation, which the overview links, or None.
        authorities: PEM files of timestamping authorities that the server trusts.
        limits: the limits of requests and jobs.
    """

    # The URL may hold a password, so it is not part of the representation.
    ledger: str = field(repr=False)
    state: Path
    token_sha256: bytes = field(repr=False)
    keys: Path | None = None
    suspects: Path | None = None
    documentation: str | None = None
    authorities: tuple[Path, ...] = ()
    limits: ServerLimits = ServerLimits()

    def __post_init__(self) -> None:
        # A link of another kind, such as javascript:, would run in the visitor's session.
        if self.documentation and not self.documentation.startswith(("https://", "http://")):
            raise ConfigError(
                f"the documentation is said to be at {self.documentation}: expected an address that "
                "begins with https:// or http://"
            )

    @property
    def key_choices(self) -> NamedFolder:
        """The keys that visitors may choose."""
        return NamedFolder(self.keys, "key", "key.json")

    @property
    def suspect_choices(self) -> NamedFolder:
        """The models and folders of images that visitors may choose."""
        return NamedFolder(self.suspects, "suspect")

    def require_folders(self) -> None:
        """Raise `ConfigError` if a folder does not exist."""
        for folder in (self.keys, self.suspects):
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"{folder} is no folder: expected one that is there")
