"""The benchmark pages: read the files that `rendering` made from `results/`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from countermark._internal.files import read_regular
from countermark.web.access import remove_token

INDEX = "index.json"
# Bytes of the index, and of a figure.
_LARGEST, _LARGEST_FIGURE = 32 << 20, 8 << 20


class RenderedResults:
    """Tables, heat maps and figures of the results, rendered again when a result has changed.

    Args:
        results: the folder `results` of a clone, or None.
        made: the folder for rendered files.
    """

    def __init__(self, results: Path | None, made: Path) -> None:
        self.results, self._made = results, made
        self._child: subprocess.Popen[bytes] | None = None
        self._read: tuple[float, dict[str, Any]] | None = None

    def start(self) -> None:
        """Start a process that renders the results, if they changed since the last rendering."""
        if self.results is None or self._read_index().get("stamp") == digest_results(self.results):
            return
        # -P keeps the working folder off the module path, and the child gets no token.
        self._child = subprocess.Popen(  # noqa: S603 - our own interpreter
            [
                sys.executable, "-P", "-m", "countermark.web.rendering",
                str(self.results.resolve()), str(self._made),
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=remove_token(os.environ),
        )  # fmt: skip

    def close(self) -> None:
        """Stop the rendering process, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    @property
    def is_rendering(self) -> bool:
        """Whether the rendering process is still at work."""
        return self._child is not None and self._child.poll() is None

    def read_papers(self) -> dict[str, Any]:
        """Return by paper what was rendered: `title`, `tables`, `heat_maps`, `figures`."""
        found: dict[str, Any] = self._read_index().get("papers", {})
        return found

    def read_figure(self, name: str) -> bytes | None:
        """Return a rendered figure as PNG, or None if there is no figure of that name."""
        # The name comes from a URL: only names in the index become paths.
        known = {each["name"] for paper in self.read_papers().values() for each in paper["figures"]}
        if name not in known:
            return None
        try:
            return read_regular(self._made / f"{name}.png", _LARGEST_FIGURE)
        except ValueError:
            return None

    def _read_index(self) -> dict[str, Any]:
        """Return the index of rendered files; empty before the first rendering."""
        path = self._made / INDEX
        if not path.is_file():
            return {}
        # Every benchmark page needs the index, so parse it only when its file changes.
        changed = path.stat().st_mtime
        if self._read is None or self._read[0] != changed:
            self._read = changed, json.loads(read_regular(path, _LARGEST))
        return self._read[1]


def digest_results(results: Path) -> str:
    """Return a digest of the present state of `results`, `tables` and `experiments`."""
    # Names, times and sizes are enough, and much faster than reading every result.
    digest = hashlib.sha256()
    for part in (results, results.parent / "tables", results.parent / "experiments"):
        for path in sorted(part.rglob("*")):
            known = path.stat()
            digest.update(f"{path}\0{known.st_mtime_ns}\0{known.st_size}\n".encode())
    return digest.hexdigest()
