"""Running an experiment: side by side, through failures and kills, always the same cells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small import SMALL

from countermark.cli.program import run_program
from countermark.errors import ConfigError
from countermark_lab.commands import app as lab
from countermark_lab.experiments import run as running
from countermark_lab.experiments.experiment import (
    Experiment,
    expand_cells,
    get_result_path,
    load_experiment,
)
from countermark_lab.experiments.run import get_failure_path, run

FAILING = SMALL.replace('layer = "2.weight"', 'layer = "9.weight"')
LONGER = SMALL.replace("seeds = [1, 2]", "seeds = [1, 2, 3, 4, 5, 6]").replace(
    "train = 100\ntest = 100\nepochs = 1", "train = 400\ntest = 100\nepochs = 2"
)
PRONE = "[[attacks]]\nlabel = 'a'\nsteps = [{ attack = 'prone' }]\n"


def computed(experiment: Experiment, results: Path) -> dict[str, bytes]:
    """The `cell` of every result, as canonical bytes by file name."""
    return {
        path.name: json.dumps(json.loads(path.read_text())["cell"], sort_keys=True).encode()
        for path in (get_result_path(cell, results) for cell in expand_cells(experiment))
    }


def test_one_process_and_two_give_the_same_cells(small: Experiment, tmp_path: Path) -> None:
    list(run(small, tmp_path / "one"))
    ended = list(run(small, tmp_path / "two", jobs=2))
    assert {each.cell.digest for each in ended} == {cell.digest for cell in expand_cells(small)}
    assert computed(small, tmp_path / "one") == computed(small, tmp_path / "two")
    thread = {
        json.loads(p.read_text())["provenance"]["threads"] for p in tmp_path.rglob("*/*.json")
    }
    assert thread == {1}


def test_some_rows_alone_can_be_computed(small: Experiment, tmp_path: Path) -> None:
    ended = list(run(small, tmp_path, rows=["marked"]))
    assert [each.cell.label for each in ended] == ["marked", "marked"]
    assert len(list(tmp_path.rglob("*.json"))) == 2
    with pytest.raises(ConfigError, match="has no row 'markt': the nearest is 'marked'"):
        list(run(small, tmp_path, rows=["markt"]))


@pytest.mark.slow
def test_ray_gives_the_same_cells(small: Experiment, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    list(run(small, tmp_path / "one"))
    list(run(small, tmp_path / "ray", jobs=2, ray=True))
    assert computed(small, tmp_path / "one") == computed(small, tmp_path / "ray")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_cell_fails_alone(tmp_path: Path, jobs: int) -> None:
    path = tmp_path / "failing.toml"
    path.write_text(FAILING)
    experiment = load_experiment(path)
    by_label: dict[str, list[bool]] = {}
    for ended in run(experiment, tmp_path, jobs=jobs):
        by_label.setdefault(ended.cell.label, []).append(ended.failure is None)
    assert by_label == {"not embedded": [True, True], "marked": [False, False]}
    failed = [
        cell for cell in expand_cells(experiment) if get_failure_path(cell, tmp_path).exists()
    ]
    assert [cell.label for cell in failed] == ["marked", "marked"]
    kept = json.loads(get_failure_path(failed[0], tmp_path).read_text())
    assert "Traceback" in kept["traceback"]
    assert "ConfigError" in kept["traceback"]
    assert kept["cell"]["seed"] == 1


def test_a_cell_that_failed_is_tried_again(
    small: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> dict[str, Any]:
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(running, "compute", refuse)
        assert all(ended.result is None for ended in run(small, tmp_path))
    assert all(ended.result for ended in run(small, tmp_path))
    assert not list(tmp_path.rglob("*.failed.json"))


def test_a_killed_run_redoes_no_finished_cell(tmp_path: Path) -> None:
    path, results = tmp_path / "small.toml", tmp_path / "results"
    path.write_text(LONGER)
    command = [sys.executable, "-m", "countermark_lab", "run", str(path)]
    command += ["--results", str(results), "--jobs", "2"]
    started = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(results.rglob("*.json")) and started.poll() is None:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    done = list(results.rglob("*.json"))
    assert 0 < len(done) < 12
    before = {each: (each.stat().st_mtime_ns, each.read_bytes()) for each in done}
    ended = list(run(load_experiment(path), results))
    assert len(ended) == 12
    assert all(each.result for each in ended)
    assert {each: (each.stat().st_mtime_ns, each.read_bytes()) for each in done} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('data = "digits"', 'data = "no/such/place"'), "no data directory 'no/such/place'"),
        (('model = "mlp"', 'model = "mpl"'), "unknown model 'mpl'"),
        (('scheme = "uchida"', 'scheme = "uchide"'), "uchide"),
        (("bits = 128", "bitz = 128"), "uchida has no field 'bitz'"),
        (("epochs = 1", "epochs = 1\nepoch = 3"), "host.epoch: Extra inputs are not permitted"),
        (("seeds = [1, 2]", "seeds = [1, 'two']"), "seeds.1: Input should be a valid integer"),
        (("[[rows]]", f"{PRONE}[[rows]]"), "prone"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_anything_runs(
    tmp_path: Path, change: tuple[str, str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(*change, 1))
    words = ["run", str(path), "--results", str(tmp_path / "results")]
    assert run_program(lab, "lab", words) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said in shown.err
    assert not (tmp_path / "results").exists()


def test_jobs_are_at_least_one(small: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--jobs is 0: expected 1 or more"):
        list(run(small, tmp_path, jobs=0))
