"""Run an experiment: compute the cells that have no result yet, in turn, in processes, or on Ray.

Every cell is computed by one thread, so that all three ways give the same figures. A cell that
fails is recorded with its traceback, while the other cells go on; the next run tries it again.
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
from countermark.errors import ConfigError, MissingExtraError, suggest_nearest
from countermark_lab.experiments import cell as hosts
from countermark_lab.experiments import detection
from countermark_lab.experiments.experiment import Cell, get_result_path
from countermark_lab.experiments.experiment_types import AnyCell, AnyExperiment, expand_any_cells
from countermark_lab.experiments.provenance import collect_provenance
from countermark_lab.image_models import cell as imaging
from countermark_lab.image_models.experiment import ImagingCell

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class CellOutcome:
    """A computed cell with its result, or the traceback of its failure."""

    cell: AnyCell
    result: dict[str, Any] | None
    failure: str | None = None


def run(
    experiment: AnyExperiment, results: Path, *, jobs: int = 1, ray: bool = False,
    rows: Sequence[str] = (),
) -> Iterator[CellOutcome]:  # fmt: skip
    """Compute the cells that have no result yet; yield every cell as it ends.

    Args:
        experiment: the experiment to compute.
        results: folder of the results; results that exist there are not computed again.
        jobs: number of processes, one thread each.
        ray: use Ray's local cluster with `jobs` workers instead of processes.
        rows: labels of the rows to compute; all when empty.

    Raises:
        ConfigError: jobs is below 1, there is no such row, or a name or field of a pending cell is
            wrong.
        DataError: a data set is missing.
        MissingExtraError: Ray is not installed.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}: expected 1 or more")
    finished: list[AnyCell] = []
    pending: list[AnyCell] = []
    for cell in _select_cells(experiment, rows):
        (finished if get_result_path(cell, results).exists() else pending).append(cell)
    for cell in pending:
        check_cell(cell)  # an error now is better than one after hours
    for cell in finished:
        yield _load_outcome(cell, results)
    # Finished cells were yielded first: the caller sees old results at once.
    finish = _compute_on_ray if ray else _compute_in_processes if jobs > 1 else _compute_in_turn
    for cell in finish(pending, results, jobs) if pending else ():
        yield _load_outcome(cell, results)


def _select_cells(experiment: AnyExperiment, rows: Sequence[str]) -> Iterator[AnyCell]:
    """Yield the cells of the rows with these labels; raise `ConfigError` for an unknown label."""
    every = list(expand_any_cells(experiment))
    labels = list(dict.fromkeys(cell.label for cell in every))
    for row in rows:
        if row not in labels:
            raise ConfigError(
                f"{experiment.name} has no row {row!r}: {suggest_nearest(row, labels)}"
            )
    yield from (cell for cell in every if not rows or cell.label in rows)


def get_failure_path(cell: AnyCell, results: Path) -> Path:
    """Return the file in which a failed cell leaves its traceback."""
    return get_result_path(cell, results).with_suffix(".failed.json")


def _load_outcome(cell: AnyCell, results: Path) -> CellOutcome:
    """Read the result of a computed cell, or its traceback."""
    path = get_result_path(cell, results)
    if path.exists():
        return CellOutcome(cell, json.loads(path.read_text()))
    failed = json.loads(get_failure_path(cell, results).read_text())
    return CellOutcome(cell, None, failed["traceback"])


def check_cell(cell: AnyCell) -> None:
    """Check names, fields and data of a cell before anything is computed.

    Raises:
        CountermarkError: the cell cannot be computed as it stands.
    """
    if isinstance(cell, Cell):
        hosts.check_host_cell(cell)
    elif isinstance(cell, ImagingCell):
        imaging.check_cell(cell)
    else:
        detection.check_detection_cell(cell)


def compute(cell: AnyCell, checkpoint: Path) -> dict[str, Any]:
    """Compute the figures of a cell of any type."""
    if isinstance(cell, Cell):
        return hosts.compute_host_cell(cell, checkpoint)
    if isinstance(cell, ImagingCell):
        return imaging.compute_cell(cell, checkpoint)
    return detection.compute_detection_cell(cell)


def _compute_and_store(cell: AnyCell, results: Path) -> AnyCell:
    """Compute one cell and write its result, or its traceback."""
    torch.set_num_threads(1)
    path, failed = get_result_path(cell, results), get_failure_path(cell, results)
    started, written = time.monotonic(), cell.model_dump(mode="json")
    try:
        content: dict[str, Any] = {
            "cell": written | {"figures": compute(cell, path.with_suffix(".checkpoint"))}
        }
    except Exception:  # any error: the other cells go on
        path, content = failed, {"cell": written, "traceback": traceback.format_exc()}
    content["provenance"] = collect_provenance(time.monotonic() - started)
    write_bytes(path, json.dumps(content, indent=1).encode() + b"\n")
    # A success removes the traceback of an earlier attempt.
    if path != failed:
        failed.unlink(missing_ok=True)
    return cell


def _compute_in_turn(pending: list[AnyCell], results: Path, _: int) -> Iterator[AnyCell]:
    """Compute the cells one after the other in this process."""
    # _finish sets one thread for this process; the caller gets its own number back.
    threads = torch.get_num_threads()
    try:
        for cell in pending:
            yield _compute_and_store(cell, results)
    finally:
        torch.set_num_threads(threads)


def _compute_in_processes(pending: list[AnyCell], results: Path, jobs: int) -> Iterator[AnyCell]:
    """Compute the cells in `jobs` processes; yield each cell when it is finished."""
    with _limit_to_one_thread():
        # A forked copy of a process with torch threads can deadlock; spawn starts clean.
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        try:
            for done in as_completed(
                [pool.submit(_compute_and_store, cell, results) for cell in pending]
            ):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _compute_on_ray(pending: list[AnyCell], results: Path, jobs: int) -> Iterator[AnyCell]:
    """Compute the cells on a local Ray cluster; yield each cell when it is finished."""
    try:
        import ray
    except ImportError:
        raise MissingExtraError("--ray", "ray") from None
    # Threads are limited by the environment: workers import torch on their own.
    ray.init(
        num_cpus=jobs,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": _ONE_THREAD},
    )
    try:
        # _finish records every failure itself; a second try would compute hours in vain.
        remote = ray.remote(num_cpus=1, max_retries=0)(_compute_and_store)
        # An absolute path, because a worker may run in another folder.
        left = [remote.remote(cell, results.absolute()) for cell in pending]
        while left:
            (done,), left = ray.wait(left)
            yield ray.get(done)
    finally:
        ray.shutdown()


@contextmanager
def _limit_to_one_thread() -> Iterator[None]:
    """Limit processes that start inside this context to one thread.

    torch reads the environment variables when it is imported, so that they must be set before.
    """
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
