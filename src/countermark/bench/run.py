"""Run an experiment: the cells that have no result yet, one by one, side by side, or on Ray.

Every cell is computed by one thread, so that all ways give the same figures. A cell that fails is
recorded with its traceback and fails alone; the next run tries it again.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from countermark._internal.files import write_bytes
from countermark.bench import cell as hosts
from countermark.bench import detection
from countermark.bench.experiment import Cell, result_path
from countermark.bench.imaging import cell as imaging
from countermark.bench.imaging.experiment import ImagingCell
from countermark.bench.kinds import AnyCell, AnyExperiment, every_cell
from countermark.bench.provenance import provenance
from countermark.errors import ConfigError, MissingExtraError, suggest_nearest

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """A cell that was computed, now or before: its result, or why it failed."""

    cell: AnyCell
    result: dict[str, Any] | None
    failure: str | None = None


def run(
    experiment: AnyExperiment, results: Path, *, jobs: int = 1, ray: bool = False,
    rows: Sequence[str] = (),
) -> Iterator[Ended]:  # fmt: skip
    """Compute the cells that have no result yet; yields every cell as it ends.

    Args:
        experiment: what to compute.
        results: folder of the results; whatever is finished there is kept.
        jobs: how many processes, one thread each.
        ray: on Ray's local cluster of so many workers instead.
        rows: labels of the rows to compute; all when empty.

    Raises:
        ConfigError: jobs is below 1, there is no such row, or a name or field of a pending cell is
            wrong.
        DataError: a data set is not there.
        MissingExtraError: Ray is not installed.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}: expected 1 or more")
    finished: list[AnyCell] = []
    pending: list[AnyCell] = []
    for cell in _chosen(experiment, rows):
        (finished if result_path(cell, results).exists() else pending).append(cell)
    for cell in pending:
        check(cell)  # rather than after hours
    for cell in finished:
        yield _ended(cell, results)
    finish = _on_ray if ray else _in_processes if jobs > 1 else _here
    for cell in finish(pending, results, jobs) if pending else ():
        yield _ended(cell, results)


def _chosen(experiment: AnyExperiment, rows: Sequence[str]) -> Iterator[AnyCell]:
    every = list(every_cell(experiment))
    labels = list(dict.fromkeys(cell.label for cell in every))
    for row in rows:
        if row not in labels:
            raise ConfigError(
                f"{experiment.name} has no row {row!r}: {suggest_nearest(row, labels)}"
            )
    yield from (cell for cell in every if not rows or cell.label in rows)


def failure_path(cell: AnyCell, results: Path) -> Path:
    """Where a failed cell leaves its traceback."""
    return result_path(cell, results).with_suffix(".failed.json")


def _ended(cell: AnyCell, results: Path) -> Ended:
    path = result_path(cell, results)
    if path.exists():
        return Ended(cell, json.loads(path.read_text()))
    failed = json.loads(failure_path(cell, results).read_text())
    return Ended(cell, None, failed["traceback"])


def check(cell: AnyCell) -> None:
    """What can be known to be wrong of a cell before anything is computed."""
    if isinstance(cell, Cell):
        hosts.check(cell)
    elif isinstance(cell, ImagingCell):
        imaging.check(cell)
    else:
        detection.check(cell)


def compute(cell: AnyCell, checkpoint: Path) -> dict[str, Any]:
    """The figures of a cell, whatever kind it is."""
    if isinstance(cell, Cell):
        return hosts.compute(cell, checkpoint)
    if isinstance(cell, ImagingCell):
        return imaging.compute(cell, checkpoint)
    return detection.compute(cell)


def _finish(cell: AnyCell, results: Path) -> AnyCell:
    """Compute one cell and write its result, or its traceback."""
    torch.set_num_threads(1)
    path, failed = result_path(cell, results), failure_path(cell, results)
    started, written = time.monotonic(), cell.model_dump(mode="json")
    try:
        content: dict[str, Any] = {
            "cell": written | {"figures": compute(cell, path.with_suffix(".checkpoint"))}
        }
    except Exception:  # whatever it is, the other cells go on
        path, content = failed, {"cell": written, "traceback": traceback.format_exc()}
    content["provenance"] = provenance(time.monotonic() - started)
    write_bytes(path, json.dumps(content, indent=1).encode() + b"\n")
    if path != failed:
        failed.unlink(missing_ok=True)
    return cell


def _here(pending: list[AnyCell], results: Path, _: int) -> Iterator[AnyCell]:
    threads = torch.get_num_threads()
    try:
        for cell in pending:
            yield _finish(cell, results)
    finally:
        torch.set_num_threads(threads)


def _in_processes(pending: list[AnyCell], results: Path, jobs: int) -> Iterator[AnyCell]:
    with _one_thread():
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        try:
            for done in as_completed([pool.submit(_finish, cell, results) for cell in pending]):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(pending: list[AnyCell], results: Path, jobs: int) -> Iterator[AnyCell]:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("--ray", "ray") from None
    ray.init(
        num_cpus=jobs,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": _ONE_THREAD},
    )
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(_finish)
        left = [remote.remote(cell, results.absolute()) for cell in pending]
        while left:
            (done,), left = ray.wait(left)
            yield ray.get(done)
    finally:
        ray.shutdown()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that are started inside compute with one thread: torch reads it when imported."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
