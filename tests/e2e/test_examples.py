"""The scripts in `examples/`, each run in two processes (slow)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import one_file
from countermark.keys.key import Key
from countermark.verification.verify import verify

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = Path(__file__).parents[2] / "src"


def run(*command: str) -> str:
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **quiet}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_mark_one_model_under_fsdp2(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*launch, str(EXAMPLES / "mark_under_fsdp2.py"), str(tmp_path))
    verdict = verify(tmp_path / "model.safetensors", Key.load(tmp_path / "acme.key"))
    assert verdict.owned
    assert verdict.matched == 128


def test_two_processes_sweep_margins_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source = one_file(tmp_path / "m.safetensors")
    rows = [
        json.loads(line)
        for line in run(str(EXAMPLES / "sweep_on_ray.py"), str(source)).splitlines()
        if line.startswith("{")
    ]
    assert [row["margin"] for row in rows] == [2.0, 3.0, 4.0]
    assert len({row["process"] for row in rows}) == 2
    changes = [row["change"] for row in rows]
    assert changes == sorted(changes)
    noisy = [row["right"]["noise"] for row in rows]
    assert noisy == sorted(noisy)
    assert noisy[-1] >= 124
