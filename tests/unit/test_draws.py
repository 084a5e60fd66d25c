"""What tests draw depends on the seed of the run and on their own name, and on nothing else."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import draws
from countermark.keys.key import KeyMaterial

Drawn = tuple[float, float, float, bytes]

SUITE = """
import random
import pytest
from countermark.keys.key import KeyMaterial

def record(*values):
    with open("drawn.txt", "a") as file:
        print(*values, random.random(), KeyMaterial.generate().secret.hex(), file=file)

@pytest.fixture(scope="module", params=[1, 2])
def wide():
    return random.random()

@pytest.fixture
def narrow(wide):
    return random.random()

@pytest.mark.parametrize("number", range(5))
def test_narrow(number, narrow, wide):
    record(number, wide, narrow)

def test_wide(wide):
    record("wide", wide)
"""


def drawn() -> Drawn:
    """One value of each source that the run seeds."""
    number = random.random()  # noqa: S311 - nobody's secret
    return (number, np.random.rand(), torch.rand(1).item(), KeyMaterial.generate().secret)


@pytest.fixture
def from_a_fixture(late: Drawn) -> Drawn:
    return drawn()


@pytest.fixture
def late() -> Drawn:
    return drawn()


def test_a_block_draws_from_its_text_and_disturbs_nothing() -> None:
    with draws.drawing_from("one"):
        first = drawn()
        with draws.drawing_from("one"):
            inner = drawn()
        second = drawn()
    assert inner == first
    with draws.drawing_from("one"):
        assert (drawn(), drawn()) == (first, second)
    with draws.drawing_from("two"):
        assert not set(drawn()) & set(first)


def test_secrets_can_be_fixed_apart() -> None:
    with draws.drawing_from("one", secrets="fixed"):
        one = drawn()
    with draws.drawing_from("two", secrets="fixed"):
        other = drawn()
    assert one[-1] == other[-1]
    assert not set(one[:-1]) & set(other[:-1])


def test_a_fixture_asked_for_late_changes_no_draw(request: pytest.FixtureRequest) -> None:
    with draws.drawing_from("x"):
        undisturbed = [drawn(), drawn()]
    with draws.drawing_from("x"):
        one = drawn()
        asked: Any = request.getfixturevalue("from_a_fixture")
        assert [one, drawn()] == undisturbed
    assert asked != request.getfixturevalue("late")


@pytest.mark.real_secrets
def test_real_secrets_follow_from_no_text() -> None:
    with draws.drawing_from("one"), draws.drawing_secrets_from_the_system():
        one = KeyMaterial.generate()
    with draws.drawing_from("one"), draws.drawing_secrets_from_the_system():
        assert KeyMaterial.generate() != one


def run_suite(folder: Path, *options: str) -> list[str]:
    """Run `SUITE` under these options in a process of its own, and return what it recorded."""
    (folder / "tests").mkdir(parents=True)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = real_secrets\n")
    for name in ("clock.py", "conftest.py", "draws.py"):
        shutil.copy(Path(draws.__file__).parent / name, folder / "tests")
    (folder / "tests" / "test_suite.py").write_text(SUITE)
    words = [sys.executable, "-m", "pytest", "-q", "tests", *options]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "drawn.txt").read_text().splitlines()


def test_the_order_of_tests_changes_no_draw(tmp_path: Path) -> None:
    usual = run_suite(tmp_path / "usual", "--seed", "3")
    shuffled = run_suite(tmp_path / "shuffled", "--seed", "3", "--shuffle")
    assert shuffled != usual
    assert sorted(shuffled) == sorted(usual)
    assert len(set(usual)) == 12


def test_another_seed_is_another_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(draws.VARIABLE, "1")
    assert draws.name_draw("a", "b") == "1/a/b"
    monkeypatch.setenv(draws.VARIABLE, "2")
    assert draws.name_draw("a", "b") == "2/a/b"
