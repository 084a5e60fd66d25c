"""What the tests of the command line share: an empty folder, a marked and an unmarked model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_calls import call, embed, environment
from killing import DRIVER, Driver

from countermark.checkpoints import save_weights
from countermark.training.models import build

if TYPE_CHECKING:
    from rooms import Visitor

    from authority import LocalAuthority


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    """Starts the command line in children, to be killed at any moment."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Driver(process)
        assert process.stdin is not None
        process.stdin.close()  # its last line: it ends by itself


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, for commands with relative paths; nobody's passphrase."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COUNTERMARK_PASSPHRASE_FILE", raising=False)
    monkeypatch.delenv("COUNTERMARK_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `marked.safetensors`, its `acme.key`, and `unmarked.safetensors`; read only."""
    folder = tmp_path_factory.mktemp("made")
    marked = embed(out=str(folder / "marked.safetensors"), key=str(folder / "acme.key"), epochs="3")
    stranger = embed(scheme="none", out=str(folder / "unmarked.safetensors"), key=None, seed="2")
    assert call(*marked).code == 0
    assert call(*stranger).code == 0
    return folder


@pytest.fixture
def stocked(made: Path, here: Path) -> Path:
    """The folder to work in, with a model, its key, and what is in the way or broken."""
    shutil.copy(made / "marked.safetensors", here / "m.safetensors")
    shutil.copytree(made / "acme.key", here / "acme.key")
    save_weights(build("mlp", {"hidden": 8}).state_dict(), here / "narrow.safetensors")
    content = (here / "m.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(content[:-1000])
    (here / "stub.safetensors").write_bytes(content[:20])
    (here / "empty").touch()
    state = build("mlp", {}).state_dict()
    state["2.weight"][3, 7] = float("nan")
    save_weights(state, here / "nan.safetensors")
    (here / "folder.resume").mkdir()
    (here / "folder.resume" / "mine").touch()
    return here


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory, authority: LocalAuthority) -> Path:
    """The folders of a web server: keys, suspects, a ledger with claims of two owners."""
    from rooms import stock

    folder = tmp_path_factory.mktemp("web") / "room"
    stock(folder, authority)
    return folder


@pytest.fixture(scope="module")
def visitor(room: Path) -> Iterator[Visitor]:
    """Somebody who has logged in to a server of that folder."""
    from rooms import settings_of, visited

    with visited(settings_of(room)) as found:
        found.log_in()
        yield found
