"""The queue of jobs. Each job has a folder and a process of its own, within limits.

A job's folder holds `job.json`, the upload while it is needed, and the job's output. Jobs survive
the end of the server: a job that waited still waits, and a job that ran is run once more. A job
that is interrupted a second time has failed.
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

from countermark._internal import files
from countermark.errors import ConfigError, CountermarkError
from countermark.keys.passphrase import VARIABLE as PASSPHRASE
from countermark.web.access import remove_token
from countermark.web.orders import Job, Order, get_present_instant
from countermark.web.settings import ServerLimits

JOB, BODY, REPORT, ANSWER = "job.json", "body.html", "report.html", "answer.json"
# Bytes of `job.json`, of any output, and of a piece of an upload that is copied at a time.
_LARGEST_JOB, _LARGEST_ANSWER, _PIECE = 1 << 16, 8 << 20, 1 << 20
# A job is started at most this often, so that a job that brings the server down is not run forever.
_TRIES = 2
Task = Callable[[Job], Mapping[str, Any]]


class QueueFullError(CountermarkError):
    """The queue is full: as many jobs wait as the limits allow."""


class JobRunner:
    """Accepts jobs, runs them in threads that each watch one process, and keeps their state.

    Args:
        folder: holds the jobs; no other server may use it.
        limits: the limits of the queue and of each job.
        task: makes the task that a job's process gets, with paths in place of names. It may raise
            `CountermarkError`.

    Raises:
        ConfigError: another server uses the folder.
    """

    def __init__(self, folder: Path, limits: ServerLimits, task: Task) -> None:
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
        self._jobs = {job.id: job for job in self._load_jobs()}
        # Requests that have a place in the queue and whose upload is still being copied.
        self._copying = 0
        self._ending = False
        self._threads = [
            threading.Thread(target=self._process_queue, daemon=True) for _ in range(limits.jobs)
        ]

    def start(self) -> None:
        """Queue the jobs that an earlier server left, and start the threads."""
        # `list_jobs` lists the newest first; the oldest is to run first.
        for job in self.list_jobs()[::-1]:
            if not job.over:
                self._todo.put(job.id)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop all processes and threads, and release the folder.

        Jobs that ran will be run again by the next server.
        """
        self._ending = True
        # One None wakes each thread that waits for a job.
        for _ in self._threads:
            self._todo.put(None)
        for child in list(self._children):
            child.kill()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._held.release()

    def list_jobs(self) -> list[Job]:
        """Return all jobs, the newest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: (job.made, job.id), reverse=True)

    def find_job(self, identity: str) -> Job | None:
        """Return the job with this identity, or None."""
        with self._lock:
            return self._jobs.get(identity)

    def describe_step(self, job: Job) -> str:
        """Return the present step of a job, in words."""
        with self._lock:
            return self._steps.get(job.id, "starting" if job.state == "running" else job.state)

    def read_output(self, job: Job, name: str) -> bytes | None:
        """Return a file that a job wrote, or None if the file is missing or too large."""
        try:
            return files.read_regular(self._folder / job.id / name, _LARGEST_ANSWER)
        except ValueError:
            return None

    def read_answer(self, job: Job) -> dict[str, Any] | None:
        """Return a job's answer as JSON values, or None without an answer."""
        content = self.read_output(job, ANSWER)
        return None if content is None else dict(json.loads(content))

    def add_job(self, order: Order, upload: BinaryIO | None) -> Job:
        """Copy the upload of a new job, store the job on disk, and queue it.

        Raises:
            FullError: the queue is full. Jobs whose upload is still being copied count as well.
        """
        self._reserve_place()
        try:
            job = self._write_new_job(order, upload)
        # A client may break off its upload: the place in the queue is then free again.
        except BaseException:
            with self._lock:
                self._copying -= 1
            raise
        # Both changes under one lock, so that the job counts exactly once at every moment.
        with self._lock:
            self._copying -= 1
            self._jobs[job.id] = job
        self._todo.put(job.id)
        return job

    def _reserve_place(self) -> None:
        """Reserve a place in the queue, before the upload is copied.

        Copying takes long. If only stored jobs were counted, any number of uploads could be copied
        at the same time.

        Raises:
            FullError: the queue is full.
        """
        with self._lock:
            taken = self._copying + sum(not job.over for job in self._jobs.values())
            if taken >= self._limits.waiting:
                raise QueueFullError("too many jobs wait: come back when some of them have ended")
            self._copying += 1

    def _write_new_job(self, order: Order, upload: BinaryIO | None) -> Job:
        """Write the folder of a new job with its upload, completely or not at all."""
        job = Job(id=secrets.token_hex(16), order=order, made=get_present_instant())
        with files.create_folder(self._folder / job.id) as folder:
            if upload is not None:
                _copy_upload(upload, folder / order.suspect.upload_name)
            (folder / JOB).write_bytes(_encode_job(job))
            files.sync_to_disk(folder / JOB)
        return job

    def _load_jobs(self) -> list[Job]:
        """Read all jobs that are stored in the folder."""
        found = []
        for path in self._folder.glob(f"[0-9a-f]*/{JOB}"):
            # A file that is no job was put there by somebody else: leave it alone.
            with contextlib.suppress(ValueError):
                found.append(files.parse_document(Job, files.read_regular(path, _LARGEST_JOB)))
        return found

    def _save_job(self, job: Job) -> None:
        """Store a job's state on disk, then in memory."""
        files.write_bytes(self._folder / job.id / JOB, _encode_job(job))
        with self._lock:
            self._jobs[job.id] = job

    def _process_queue(self) -> None:
        """Process one job after the other until the server ends; each thread runs this."""
        while (identity := self._todo.get()) is not None and not self._ending:
            job = self._jobs[identity]
            try:
                self._process_job(job)
            # A full disk must not end the thread. The failure is kept in memory only.
            except OSError as error:
                with self._lock:
                    why = f"the server cannot write ({error.strerror})"
                    self._jobs[identity] = job.copy_as_failed(why)

    def _process_job(self, job: Job) -> None:
        """Process one job, and fail it if it has no try left."""
        if job.tries >= _TRIES:
            self._finish_job(job.copy_as_failed("the server was stopped twice while this was read"))
            return
        # Store the try before the process starts: it must count even if the server dies with it.
        job = job.copy_as_running()
        self._save_job(job)
        ended = self._run_to_end(job)
        if ended is not None:
            self._finish_job(ended)

    def _run_to_end(self, job: Job) -> Job | None:
        """Run a job and return it done or failed, or None if the server ends before."""
        try:
            told = self._run_process(job)
        except CountermarkError as error:
            return job.copy_as_failed(str(error))
        except Exception as error:
            # `close` kills the processes, which breaks their pipes: that is no fault of the job.
            if self._ending:
                return None
            return job.copy_as_failed(f"internal error, {type(error).__name__}")
        if self._ending:
            return None
        if "outcome" in told:
            return job.copy_as_done(str(told["outcome"]))
        return job.copy_as_failed(str(told.get("failed") or self._explain_killed_process()))

    def _finish_job(self, job: Job) -> None:
        """Store a job that has ended, and delete its upload."""
        self._save_job(job)
        with self._lock:
            self._steps.pop(job.id, None)
        for each in (self._folder / job.id).glob(f"{job.order.suspect.upload_name}*"):
            each.unlink(missing_ok=True)

    def _explain_killed_process(self) -> str:
        """Return the message for a process that ended without an answer."""
        return (
            f"its process ended before there was an answer: it may take {self._limits.seconds:g} "
            f"seconds and {self._limits.memory / (1 << 30):g} GiB"
        )

    def _run_process(self, job: Job) -> dict[str, Any]:
        """Run the process of a job and return its last message; kill it when its time is over."""
        folder = self._folder / job.id
        # An earlier try may have left a bundle, and a bundle is only written to a new folder.
        shutil.rmtree(folder / "bundle", ignore_errors=True)
        task = json.dumps({**self._task(job), "memory": self._limits.memory}).encode() + b"\n"
        with (folder / "said.txt").open("wb") as said, _start_process(folder, said) as child:
            self._children.add(child)
            # `close` may have gone through the children before this child was added.
            if self._ending:
                child.kill()
            stop = threading.Timer(self._limits.seconds, child.kill)
            stop.start()
            try:
                return self._read_messages(job, child, task)
            finally:
                stop.cancel()
                child.kill()
                self._children.discard(child)

    def _read_messages(
        self, job: Job, child: subprocess.Popen[bytes], task: bytes
    ) -> dict[str, Any]:
        """Read a process's messages: record each step, and return the last message.

        Args:
            job: the job.
            child: its process.
            task: one line of JSON for its standard input.

        Returns: `outcome` or `failed`; empty if the process ended without an answer.
        """
        if child.stdin is None or child.stdout is None:  # pragma: no cover - both are pipes
            return {}
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(task)
            # Standard input stays open: its end tells the process that the server is gone.
            child.stdin.flush()
        for line in child.stdout:
            try:
                told: dict[str, Any] = json.loads(line)
            # A library may print to standard output as well.
            except ValueError:
                continue
            if "step" not in told:
                return told
            with self._lock:
                self._steps[job.id] = str(told["step"])
        return {}


def _start_process(folder: Path, said: BinaryIO) -> subprocess.Popen[bytes]:
    """Start the process of a job in its folder.

    Args:
        folder: the job's folder.
        said: an open file for standard error.
    """
    environment = remove_token(os.environ)
    if passphrase := environment.get(PASSPHRASE):
        # A relative path would be looked for in the job's folder.
        environment[PASSPHRASE] = str(Path(passphrase).resolve())
    # One thread a job by default: several jobs share the processor cores.
    environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "1")
    # -P keeps the job's folder, which holds an upload, off the module path.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "countermark.web.work"], cwd=folder, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
    )  # fmt: skip


def _copy_upload(upload: BinaryIO, path: Path) -> None:
    """Copy an upload to a file, and sync the file to disk."""
    with path.open("wb") as file:
        shutil.copyfileobj(upload, file, _PIECE)
        file.flush()
        os.fsync(file.fileno())


def _encode_job(job: Job) -> bytes:
    """Return a job as the bytes of its file."""
    return job.model_dump_json(indent=1).encode() + b"\n"
