"""The benchmark pages: what `rendering` made of `results/`, in a process that may load torch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from countermark.files import read_regular
from countermark.web.access import without_token

INDEX = "index.json"
_LARGEST, _LARGEST_FIGURE = 32 << 20, 8 << 20


class Results:
    """Tables, heat maps and figures; rendered again when a result has changed.

    Args:
        results: the folder `results` of a clone; None where there is none.
        made: where what is rendered lies.
    """

    def __init__(self, results: Path | None, made: Path) -> None:
        self.results, self._made = results, made
        self._child: subprocess.Popen[bytes] | None = None
        self._read: tuple[float, dict[str, Any]] | None = None

    def start(self) -> None:
        """Render what is stale, in a process of its own."""
        if self.results is None or self._index().get("stamp") == stamp_of(self.results):
            return
        self._child = subprocess.Popen(  # noqa: S603 - our own interpreter
            [
                sys.executable, "-P", "-m", "countermark.web.rendering",
                str(self.results.resolve()), str(self._made),
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=without_token(os.environ),
        )  # fmt: skip

    def close(self) -> None:
        """Stop rendering."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    @property
    def rendering(self) -> bool:
        """Whether something is not rendered yet."""
        return self._child is not None and self._child.poll() is None

    def papers(self) -> dict[str, Any]:
        """What was rendered, by paper: `title`, `tables`, `heat_maps`, `figures`."""
        found: dict[str, Any] = self._index().get("papers", {})
        return found

    def figure(self, name: str) -> bytes | None:
        """A figure (PNG) that was rendered; None where there is none of that name."""
        known = {each["name"] for paper in self.papers().values() for each in paper["figures"]}
        if name not in known:
            return None
        try:
            return read_regular(self._made / f"{name}.png", _LARGEST_FIGURE)
        except ValueError:
            return None

    def _index(self) -> dict[str, Any]:
        path = self._made / INDEX
        if not path.is_file():
            return {}
        changed = path.stat().st_mtime
        if self._read is None or self._read[0] != changed:
            self._read = changed, json.loads(read_regular(path, _LARGEST))
        return self._read[1]


def stamp_of(results: Path) -> str:
    """A name for what `results`, and the tables and experiments beside it, are just now."""
    digest = hashlib.sha256()
    for part in (results, results.parent / "tables", results.parent / "experiments"):
        for path in sorted(part.rglob("*")):
            known = path.stat()
            digest.update(f"{path}\0{known.st_mtime_ns}\0{known.st_size}\n".encode())
    return digest.hexdigest()
