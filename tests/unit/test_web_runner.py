"""How many jobs are taken, however many orders come at once; how a runner ends."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from countermark.web.orders import ChosenSuspect, Job, VerifyRequest
from countermark.web.runner import JobRunner, QueueFullError
from countermark.web.settings import ServerLimits

ORDERS, ALLOWED = 40, 5


class SlowUpload(io.BytesIO):
    """An upload whose copying goes on until it is let."""

    def __init__(self, let: threading.Event) -> None:
        super().__init__(b"suspect")
        self._let = let

    def read(self, size: int | None = -1, /) -> bytes:
        """Wait, then read."""
        self._let.wait(60)
        return super().read(size)


class FailingUpload(io.BytesIO):
    """An upload that breaks off."""

    def read(self, size: int | None = -1, /) -> bytes:  # noqa: ARG002
        """Fail."""
        raise ConnectionError("broken off")


def no_task(job: Job) -> Mapping[str, Any]:
    """Tell a job's process nothing: it never starts here."""
    raise AssertionError(job)


@contextmanager
def made_runner(
    folder: Path, *, task: Callable[[Job], Mapping[str, Any]] = no_task, jobs: int = 2
) -> Iterator[JobRunner]:
    """A runner that is closed when the block ends."""
    runner = JobRunner(folder, ServerLimits(waiting=ALLOWED, jobs=jobs), task)
    try:
        yield runner
    finally:
        runner.close()


def order() -> VerifyRequest:
    """An order with an upload."""
    return VerifyRequest(suspect=ChosenSuspect(name="x.safetensors", uploaded=True), key="key")


def test_orders_at_the_same_time_get_no_more_places_than_there_are(tmp_path: Path) -> None:
    let, refusals = threading.Event(), threading.Semaphore(0)
    with made_runner(tmp_path) as runner:

        def ask() -> bool:
            try:
                runner.add_job(order(), SlowUpload(let))
            except QueueFullError:
                refusals.release()
                return False
            return True

        with ThreadPoolExecutor(ORDERS) as pool:
            asked = [pool.submit(ask) for _ in range(ORDERS)]
            # All places are held by uploads that are still copied: the others are refused now.
            refused_early = all(refusals.acquire(timeout=20) for _ in range(ORDERS - ALLOWED))
            let.set()
            accepted = sum(each.result() for each in asked)
        assert refused_early
        assert accepted == len(runner.list_jobs()) == ALLOWED
        with pytest.raises(QueueFullError, match="too many jobs wait"):
            runner.add_job(order(), None)


def test_a_failed_upload_gives_its_place_back(tmp_path: Path) -> None:
    with made_runner(tmp_path) as runner:
        for _ in range(3 * ALLOWED):
            with pytest.raises(ConnectionError):
                runner.add_job(order(), FailingUpload())
        assert not runner.list_jobs()
        assert not list((tmp_path / "jobs").iterdir())
        for _ in range(ALLOWED):
            runner.add_job(order(), io.BytesIO(b"suspect"))
        with pytest.raises(QueueFullError):
            runner.add_job(order(), io.BytesIO(b"suspect"))


def test_a_job_that_is_over_gives_its_place_back(tmp_path: Path) -> None:
    with made_runner(tmp_path) as runner:
        first, *_ = [runner.add_job(order(), None) for _ in range(ALLOWED)]
        runner._finish_job(first.copy_as_failed("it ended"))
        runner.add_job(order(), None)
        with pytest.raises(QueueFullError):
            runner.add_job(order(), None)


def test_a_runner_that_ends_begins_none_of_the_jobs_that_wait(tmp_path: Path) -> None:
    begun: list[str] = []
    running, let = threading.Event(), threading.Event()

    def task(job: Job) -> Mapping[str, Any]:
        begun.append(job.id)
        running.set()
        let.wait(60)
        return {"kind": "unknown"}

    with made_runner(tmp_path, task=task, jobs=1) as runner:
        for _ in range(ALLOWED):
            runner.add_job(order(), None)
        runner.start()
        assert running.wait(60)
        closing = threading.Thread(target=runner.close)
        closing.start()
        while not runner._ending:
            pass
        let.set()
        closing.join()
        assert len(begun) == 1
        assert sorted(job.state for job in runner.list_jobs()) == ["running"] + ["waiting"] * 4
