"""Uploads of the hostile, bounds of jobs, and what a server keeps when it ends."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_calls import process, python, refused
from rooms import TOKEN, Visitor, settings_of, visited

from countermark.errors import ConfigError
from countermark.web.orders import VerifyRequest
from countermark.web.site import AppState, parse_request

# --- hostile uploads


class Canary:
    """Leaves a trace where somebody unpickles it."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["CANARY"],)


def canaries() -> Iterator[tuple[str, bytes]]:
    """A pickle, alone and in what torch writes, under names of every kind."""
    content = pickle.dumps(Canary())
    yield "x.bin", content
    inside = io.BytesIO()
    with zipfile.ZipFile(inside, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    yield "x.pt", inside.getvalue()


def test_a_pickle_never_runs(
    visitor: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(trace))
    for name, content in canaries():
        told = visitor.verify(content, name)
        assert told["job"]["state"] == "failed"
        assert name in told["job"]["error"]
    assert not trace.exists()
    trace.mkdir()
    with pytest.raises(FileExistsError):
        pickle.loads(pickle.dumps(Canary()))  # noqa: S301 - it would have


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.safetensors", b"\xff" * 100, "not known here"),
        ("x.safetensors", (8).to_bytes(8, "little") + b"{}      ", "expected"),
        ("x.onnx", b"\x08\x00garbage", ""),
        ("a\nb\x1b[2J<script>.safetensors", b"\xff" * 100, "not known here"),
    ],
)
def test_junk_is_refused_in_one_sentence(
    visitor: Visitor, name: str, content: bytes, why: str
) -> None:
    told = visitor.verify(content, name)
    if told["job"]["state"] == "failed":
        assert why in told["job"]["error"]
        assert told["job"]["error"].isprintable()
    else:
        assert told["job"]["outcome"] == "no_verdict"
    page = visitor.http.get(f"/jobs/{told['job']['id']}").text
    assert "<script>." not in page


def test_no_upload_is_larger_than_is_taken(room: Path) -> None:
    small = replace(settings_of(room, upload=100_000), state=room / "small")
    with visited(small) as found:
        sent = {"data": {"key": "acme.key"}, "files": {"file": ("x", bytes(300_000))}}
        said = found.program.post("/api/verify", **sent)
        assert said.status_code == 413

        def unannounced() -> Iterator[bytes]:
            yield from [bytes(10_000)] * 300

        for path in ("/api/verify", "/api/claims", "/login"):
            said = found.program.post(
                path, content=unannounced(),
                headers={"content-type": "multipart/form-data; boundary=x"},
            )  # fmt: skip
            assert said.status_code in (400, 413), path
        assert not found.site.runner.list_jobs()


def test_a_job_has_bounds_of_memory_time_and_number(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = replace(settings_of(room, memory=96 << 20, jobs=1), state=room / "tight")
    with visited(tight) as found:
        told = found.verify((room / "suspects" / "acme.safetensors").read_bytes())
        assert told["job"]["state"] == "failed"
    data = {"suspect": "acme.safetensors", "key": "acme.key"}
    full = replace(settings_of(room, waiting=1, jobs=1), state=room / "full")
    with visited(full) as found:  # the first has time enough to be there when the second comes
        codes = [found.program.post("/api/verify", data=data).status_code for _ in range(2)]
        assert codes == [202, 429]
    short = replace(settings_of(room, seconds=0.05, jobs=1), state=room / "short")
    with visited(short) as found:
        assert found.program.post("/api/verify", data=data).status_code == 202
        (job,) = found.site.runner.list_jobs()
        assert "it may take 0.05 seconds" in found.ended(job.id)["job"]["error"]


# --- what is kept, and who is alone


def test_a_folder_belongs_to_one_server(room: Path) -> None:
    settings = replace(settings_of(room), state=room / "alone")
    with visited(settings), pytest.raises(ConfigError, match="belongs to another server"):
        AppState(settings)
    AppState(settings).close()


def test_jobs_of_a_server_that_ended_are_taken_up_or_fail(room: Path) -> None:
    settings = replace(settings_of(room), state=room / "again")
    with AppState(settings) as site:
        content = io.BytesIO((room / "suspects" / "acme.safetensors").read_bytes())
        fields = {"suspect": {"name": "m.safetensors", "uploaded": True}, "key": "acme.key"}
        waiting = site.accept_request(parse_request(VerifyRequest, fields), content)
    path = room / "again" / "jobs" / waiting.id / "job.json"
    kept = json.loads(path.read_text())
    assert kept["state"] in ("waiting", "running")
    assert (path.parent / "upload.safetensors").exists()
    lost = path.parent.parent / ("0" * 32)
    shutil.copytree(path.parent, lost)
    (lost / "job.json").write_text(
        json.dumps(kept | {"id": "0" * 32, "state": "running", "tries": 2})
    )
    (path.parent.parent / ("1" * 32)).mkdir()
    (path.parent.parent / ("1" * 32) / "job.json").write_text("{")
    with visited(settings) as found:
        assert found.ended(waiting.id)["job"]["outcome"] == "owned"
        assert "stopped twice" in found.ended("0" * 32)["job"]["error"]
        assert len(found.site.runner.list_jobs()) == 2


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from rooms import settings_of, visited
with visited(settings_of(Path(sys.argv[1]))) as visitor:
    visitor.log_in()
    for path in ("", "claims", "verify", "dispute", "jobs", "api/openapi.json"):
        assert visitor.http.get(f"/{path}").status_code == 200, path
    told = visitor.program.get("/api/claims").json()["claims"]
    assert visitor.http.get("/claims/" + told[-1]["digest"]).status_code == 200
sys.stdout.write("served")
"""


def test_it_serves_without_torch(room: Path, tmp_path: Path) -> None:
    shutil.copytree(room, tmp_path / "room", ignore=shutil.ignore_patterns("state"))
    tests = Path(__file__).parents[1]
    said = python(
        WITHOUT_TORCH, str(tmp_path / "room"), str(tests), str(tests / "e2e"), folder=tmp_path
    )
    assert said.out == "served", said


def test_what_cannot_be_served_is_said_in_one_line(
    room: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(room / "claims.db", here / "claims.db")
    monkeypatch.setenv("COUNTERMARK_TOKEN", TOKEN)
    refused(["serve", "--ledger", "absent.db", "--check"], "there is no ledger", here)
    refused(["serve", "--ledger", "claims.db", "--keys", "absent", "--check"], "is no folder", here)
    said = process([sys.executable, "-m", "countermark", "serve", "--ledger", "absent.db"], here)
    assert said.code == 2, "it ends by itself when there is no ledger"
    assert "there is no ledger" in said.err.splitlines()[-1]
    shutil.rmtree(here / "served")
    monkeypatch.setitem(sys.modules, "countermark.web.serving", None)
    refused(["serve", "--ledger", "claims.db", "--check"], "countermark[web]", here)
