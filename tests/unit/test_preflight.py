"""tools/preflight.py: what a machine lacks is one sentence, before anything is installed."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

PREFLIGHT = Path(__file__).parents[2] / "tools" / "preflight.py"


@pytest.fixture
def preflight(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, on a machine that lacks nothing."""
    spec = importlib.util.spec_from_file_location("preflight", PREFLIGHT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    set_free(module, monkeypatch, gigabytes=50)
    return module


def set_free(module: ModuleType, patch: pytest.MonkeyPatch, gigabytes: float) -> None:
    shutil = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=gigabytes * 1e9))
    patch.setattr(module, "shutil", shutil)


def test_nothing_is_missing_here(preflight: ModuleType) -> None:
    assert preflight.missing() is None


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 6, 0), (2, 7, 18)])
def test_an_old_python_is_named(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(preflight, "sys", SimpleNamespace(version_info=version))
    said = preflight.missing()
    assert "Python 3.11 or newer is needed" in said
    assert "this is " + ".".join(map(str, version)) in said
    assert "make demo PYTHON=python3.11" in said


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 13, 1)])
def test_a_newer_python_will_do(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(preflight, "sys", SimpleNamespace(version_info=version))
    assert preflight.missing() is None


@pytest.mark.parametrize("module", ["ensurepip", "venv"])
def test_a_python_without_venv_is_told_the_package(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert "apt-get install python3-venv" in preflight.missing()


def test_a_full_disk_is_told_in_gigabytes(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(preflight, monkeypatch, gigabytes=0.3)
    said = preflight.missing()
    assert "4.0 GB of free disk are needed here, 0.3 GB are left" in said


def test_it_is_a_program_of_one_line(tmp_path: Path) -> None:
    """Run where a module of its own stands in the way of venv, so that something is missing."""
    (tmp_path / "venv.py").write_text("raise ImportError", encoding="utf-8")
    (tmp_path / "preflight.py").write_bytes(PREFLIGHT.read_bytes())
    done = subprocess.run(
        [sys.executable, "preflight.py"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("countermark: the venv module is missing")
    assert done.stderr.count("\n") == 1


def test_an_old_python_can_read_it() -> None:
    ast.parse(PREFLIGHT.read_text(encoding="utf-8"), feature_version=(3, 7))
