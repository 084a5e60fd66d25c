"""Jobs: each in a folder and a process of its own, within limits, and not lost when the server is.

A job's folder has `job.json`, the upload while it is needed, and what came out. A job that waited
when the server ended still waits; one that ran is run once more, and then has failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from countermark import files
from countermark.errors import ConfigError, CountermarkError
from countermark.passphrase import VARIABLE as PASSPHRASE
from countermark.web.access import without_token
from countermark.web.orders import Job, Order, now
from countermark.web.settings import Limits

JOB, BODY, REPORT, ANSWER = "job.json", "body.html", "report.html", "answer.json"
_LARGEST_JOB, _LARGEST_ANSWER, _PIECE = 1 << 16, 8 << 20, 1 << 20
_TRIES = 2
Task = Callable[[Job], Mapping[str, Any]]


class FullError(CountermarkError):
    """So many jobs wait that no more are taken."""


class Runner:
    """Takes jobs, runs them, and knows what became of them.

    Args:
        folder: where they lie; no other server may have it.
        limits: of each.
        task: what a job's process is told: names as paths. It may raise `CountermarkError`.
    """

    def __init__(self, folder: Path, limits: Limits, task: Task) -> None:
        self._folder, self._limits, self._task = folder / "jobs", limits, task
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = FileLock(folder / "lock")
        try:
            self._held.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"{folder} belongs to another server that is running") from None
        self._lock = threading.Lock()
        self._steps: dict[str, str] = {}
        self._children: set[subprocess.Popen[bytes]] = set()
        self._todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._jobs = {job.id: job for job in self._kept()}
        self._copying = 0  # orders that have a place and whose upload is still being copied
        self._ending = False
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(limits.jobs)
        ]

    def start(self) -> None:
        """Take up what was left, and begin to work."""
        for job in self.jobs()[::-1]:
            if not job.over:
                self._todo.put(job.id)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop every process, and let go of the folder; what ran will be run again."""
        self._ending = True
        for _ in self._threads:
            self._todo.put(None)
        for child in list(self._children):
            child.kill()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._held.release()

    def jobs(self) -> list[Job]:
        """All jobs, the newest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: (job.made, job.id), reverse=True)

    def job(self, identity: str) -> Job | None:
        """A job; None where there is none of that name."""
        with self._lock:
            return self._jobs.get(identity)

    def step(self, job: Job) -> str:
        """How far it is, in words."""
        with self._lock:
            return self._steps.get(job.id, "starting" if job.state == "running" else job.state)

    def made(self, job: Job, name: str) -> bytes | None:
        """A file that came out of a job."""
        try:
            return files.read_regular(self._folder / job.id / name, _LARGEST_ANSWER)
        except ValueError:
            return None

    def answer(self, job: Job) -> dict[str, Any] | None:
        """What came out, as JSON values."""
        content = self.made(job, ANSWER)
        return None if content is None else dict(json.loads(content))

    def add(self, order: Order, upload: BinaryIO | None) -> Job:
        """Register a new job, which is on disk when this returns; its upload is copied first.

        Raises:
            FullError: as many jobs as may wait have not ended, those still copied included.
        """
        self._take_place()
        try:
            job = self._write_new(order, upload)
        except BaseException:
            with self._lock:
                self._copying -= 1
            raise
        with self._lock:  # in one step: the job is counted once at every moment
            self._copying -= 1
            self._jobs[job.id] = job
        self._todo.put(job.id)
        return job

    def _take_place(self) -> None:
        """Count one more order, before anything of it is copied.

        Copying an upload takes long. Whoever counted only the jobs that are registered would let
        any number of orders in at the same time.
        """
        with self._lock:
            taken = self._copying + sum(not job.over for job in self._jobs.values())
            if taken >= self._limits.waiting:
                raise FullError("too many jobs wait: come back when some of them have ended")
            self._copying += 1

    def _write_new(self, order: Order, upload: BinaryIO | None) -> Job:
        """Write the folder of a new job, its upload included."""
        job = Job(id=secrets.token_hex(16), order=order, made=now())
        with files.creating(self._folder / job.id) as folder:
            if upload is not None:
                _copy(upload, folder / order.suspect.file)
            (folder / JOB).write_bytes(_text(job))
            files.sync(folder / JOB)
        return job

    def _kept(self) -> list[Job]:
        found = []
        for path in self._folder.glob(f"[0-9a-f]*/{JOB}"):
            with contextlib.suppress(ValueError):  # somebody else's file
                found.append(files.parse_as(Job, files.read_regular(path, _LARGEST_JOB)))
        return found

    def _keep(self, job: Job) -> None:
        files.write_bytes(self._folder / job.id / JOB, _text(job))
        with self._lock:
            self._jobs[job.id] = job

    def _work(self) -> None:
        """What each thread does: one job after the other."""
        while (identity := self._todo.get()) is not None and not self._ending:
            job = self._jobs[identity]
            try:
                self._do(job)
            except OSError as error:  # what is in memory is right until the server ends
                with self._lock:
                    why = f"the server cannot write ({error.strerror})"
                    self._jobs[identity] = job.failed(why)

    def _do(self, job: Job) -> None:
        """Run one job to its end, if it may still be tried."""
        if job.tries >= _TRIES:
            self._over(job.failed("the server was stopped twice while this was read"))
            return
        job = job.started()
        self._keep(job)
        ended = self._ended(job)
        if ended is not None:
            self._over(ended)

    def _ended(self, job: Job) -> Job | None:
        """A job, run to its end; None when the server ends before."""
        try:
            told = self._run(job)
        except CountermarkError as error:
            return job.failed(str(error))
        except Exception as error:
            if self._ending:  # for example the pipe to a process that `close` has killed
                return None
            return job.failed(f"internal error, {type(error).__name__}")
        if self._ending:
            return None
        if "outcome" in told:
            return job.done(str(told["outcome"]))
        return job.failed(str(told.get("failed") or self._killed()))

    def _over(self, job: Job) -> None:
        self._keep(job)
        with self._lock:
            self._steps.pop(job.id, None)
        for each in (self._folder / job.id).glob(f"{job.order.suspect.file}*"):
            each.unlink(missing_ok=True)

    def _killed(self) -> str:
        return (
            f"its process ended before there was an answer: it may take {self._limits.seconds:g} "
            f"seconds and {self._limits.memory / (1 << 30):g} GiB"
        )

    def _run(self, job: Job) -> dict[str, Any]:
        """Start the process of a job, listen to it, and stop it when its time is over."""
        folder = self._folder / job.id
        shutil.rmtree(folder / "bundle", ignore_errors=True)
        task = json.dumps({**self._task(job), "memory": self._limits.memory}).encode() + b"\n"
        with (folder / "said.txt").open("wb") as said, _started(folder, said) as child:
            self._children.add(child)
            if self._ending:  # `close` may have looked at the children before this one was there
                child.kill()
            stop = threading.Timer(self._limits.seconds, child.kill)
            stop.start()
            try:
                return self._listened(job, child, task)
            finally:
                stop.cancel()
                child.kill()
                self._children.discard(child)

    def _listened(self, job: Job, child: subprocess.Popen[bytes], task: bytes) -> dict[str, Any]:
        """The last line that a process says; those before are steps."""
        if child.stdin is None or child.stdout is None:  # pragma: no cover - both are pipes
            return {}
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(task)
            child.stdin.flush()  # and stays open: the process ends when the server does
        for line in child.stdout:
            try:
                told: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            if "step" not in told:
                return told
            with self._lock:
                self._steps[job.id] = str(told["step"])
        return {}


def _started(folder: Path, said: BinaryIO) -> subprocess.Popen[bytes]:
    environment = without_token(os.environ)
    if passphrase := environment.get(PASSPHRASE):
        environment[PASSPHRASE] = str(Path(passphrase).resolve())  # the job works elsewhere
    environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "1")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "countermark.web.work"], cwd=folder, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
    )  # fmt: skip


def _copy(upload: BinaryIO, path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(upload, file, _PIECE)
        file.flush()
        os.fsync(file.fileno())


def _text(job: Job) -> bytes:
    return job.model_dump_json(indent=1).encode() + b"\n"
