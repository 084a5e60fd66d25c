"""A PostgreSQL server of its own for tests, where Debian's packages are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def programs() -> Path:
    """Where the server's programs are; skips the test, and says so, where they are not."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    pytest.skip("no PostgreSQL server is installed here: .ci/run installs Debian's")


@contextmanager
def server() -> Iterator[str]:
    """Starts a server on a socket of its own; the URL of an empty database."""
    found, folder = programs(), Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    name = user or pwd.getpwuid(os.geteuid()).pw_name
    if user:
        shutil.chown(folder, user)

    def run(*words: str) -> None:
        subprocess.run(words, check=True, cwd=folder, user=user, capture_output=True, timeout=600)

    data = str(folder / "data")
    try:
        run(str(found / "initdb"), "-D", data, "-U", name, "-A", "trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses=''"
        log = str(folder / "log")
        run(str(found / "pg_ctl"), "-D", data, "-o", options, "-l", log, "-w", "start")
        try:
            run(str(found / "createdb"), "-h", str(folder), "-U", name, "claims")
            yield f"postgresql://{name}@/claims?host={folder}"
        finally:
            run(str(found / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
