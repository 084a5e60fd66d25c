"""A server of its own: two users at once, killed at any moment, asked at random, fed with junk."""

from __future__ import annotations

import io
import os
import random
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rooms import TOKEN, settings_of, visited
from serving import served

from authority import some_claim
from countermark.web.app import make_application

pytestmark = pytest.mark.slow
MUTATIONS = int(os.environ.get("COUNTERMARK_MUTATIONS", "500"))
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def own(room: Path, tmp_path: Path) -> Path:
    """The folders of a server that nobody else uses."""
    return Path(copytree(room, tmp_path / "room", ignore=ignore_patterns("state")))


def client_of(address: str) -> httpx2.Client:
    return httpx2.Client(base_url=address, headers=BEARER, timeout=200)


def ended(client: httpx2.Client, identity: str) -> Any:
    for _ in range(2000):
        said = client.get(f"/api/jobs/{identity}").json()
        if said["job"]["state"] in ("done", "failed"):
            return said["job"]
        time.sleep(0.1)
    raise AssertionError(said)


def asked(client: httpx2.Client, suspect: str) -> str:
    said = client.post("/api/verify", data={"suspect": suspect, "key": "acme.key"})
    assert said.status_code == 202, said.text
    return str(said.json()["job"]["id"])


# --- two users


def test_two_users_at_once_get_each_his_own_answer(own: Path) -> None:
    expected = {"acme.safetensors": "owned", "unmarked.safetensors": "not_proven"}
    with served(own) as site:

        def user(suspect: str) -> list[str]:
            with client_of(site.address) as client:
                jobs = [asked(client, suspect) for _ in range(3)]
                return [ended(client, each)["outcome"] for each in jobs]

        with ThreadPoolExecutor(2) as users:
            found = dict(zip(expected, users.map(user, expected), strict=True))
    assert found == {suspect: [outcome] * 3 for suspect, outcome in expected.items()}


# --- killed


def working(folder: Path) -> list[int]:
    """The processes that work in a folder."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                where = (each / "cwd").readlink()
            except OSError:
                continue
            if where.is_relative_to(folder):
                found.append(int(each.name))
    return found


def test_a_killed_server_loses_no_claim_and_ends_its_jobs(own: Path) -> None:
    claims, jobs = [], []
    drawn = random.Random(1)  # noqa: S311 - moments, no secrets
    for _ in range(6):
        with served(own) as site, client_of(site.address) as client:
            for _ in range(2):
                claim = some_claim(Ed25519PrivateKey.generate())
                said = client.post("/api/claims", files={"file": ("c", claim.to_bytes())})
                assert said.status_code == 201
                claims.append(claim.digest)
            jobs.append(asked(client, "acme.safetensors"))
            time.sleep(drawn.uniform(0, 0.6))
            site.process.kill()
            site.process.wait()
        for _ in range(2000):
            if not working(own / "state"):
                break
            time.sleep(0.05)
        assert not working(own / "state"), "a job outlives its server"
    with served(own) as site, client_of(site.address) as client:
        for digest in claims:
            told = client.get(f"/api/claims/{digest}").json()
            assert told["holds"]
        told = [ended(client, each) for each in jobs]
    for job in told:
        assert job["outcome"] == "owned" or "stopped twice" in job["error"], job
    assert not list((own / "state").rglob("*.tmp"))


# --- asked at random


@pytest.mark.filterwarnings("ignore")
def test_no_request_that_fits_the_document_brings_the_server_down(own: Path) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    with visited(settings_of(own)) as visitor:
        schema = schemathesis.openapi.from_asgi("/api/openapi.json", make_application(visitor.site))
        asked_for = []
        for found in schema.get_all_operations():
            operation = found.ok()
            asked_for.append(operation.label)

            @given(case=operation.as_strategy())
            @settings(
                max_examples=60, deadline=None, derandomize=True,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            def asked_at_random(case: Any) -> None:
                said = case.call(headers=BEARER)
                assert said.status_code < 500, (case, said.text)

            asked_at_random()
        assert len(asked_for) == 10, asked_for


# --- fed with junk


def changed(content: bytes, drawn: random.Random) -> bytes:
    """A file with something wrong: bits, length, a stretch, its head."""
    kind = drawn.randrange(6)
    at = drawn.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + drawn.randbytes(drawn.randrange(1, 64)) + content[at:]
    if kind == 2:
        near = drawn.randrange(min(400, len(content)))
        return content[:near] + drawn.randbytes(8) + content[near + 8 :]
    if kind == 3:
        return drawn.randbytes(8) + content[8:]
    if kind == 4:
        return content[at:]
    text = content[8:600].replace(b'"shape":[', drawn.choice([b'"shape":[-', b'"shape":[9999999']))
    return content[:8] + text + content[600:]


def torch_file(state: dict[str, Any]) -> bytes:
    import torch

    made = io.BytesIO()
    torch.save({name: torch.from_numpy(each) for name, each in state.items()}, made)
    return made.getvalue()


def sources(room: Path) -> Iterator[tuple[str, bytes]]:
    """What is changed: many safetensors files, for one torch file and one that bears its name."""
    from safetensors.numpy import load_file

    path = room / "suspects" / "acme.safetensors"
    content, torch_content = path.read_bytes(), torch_file(load_file(path))
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}q\x00.")
    while True:
        yield from [("x.safetensors", content)] * 18
        yield "x.pt", torch_content
        yield "x.onnx", b"\x08\x09\x12\x04test" + content[:3000]


@pytest.mark.timeout(1800)
def test_mutated_uploads_are_refused_in_one_sentence(own: Path) -> None:
    drawn = random.Random(7)  # noqa: S311 - changes, no secrets
    kinds = sources(own)
    small = replace(settings_of(own, waiting=4), suspects=None)
    outcomes: dict[str, int] = {}
    with visited(small) as visitor:
        for _ in range(MUTATIONS):
            name, content = next(kinds)
            told = visitor.verify(changed(content, drawn) or b"x", name)["job"]
            outcomes[told["outcome"] or "refused"] = (
                outcomes.get(told["outcome"] or "refused", 0) + 1
            )
            if told["state"] == "failed":
                why = told["error"]
                assert why.isprintable()
                assert name in why
                assert str(own) not in why
                assert "internal error" not in why
                assert "process ended" not in why
        sys.stdout.write(f"{outcomes}\n")
        assert set(outcomes) <= {"refused", "owned", "not_proven", "no_verdict"}
        assert outcomes["refused"] > MUTATIONS / 2, outcomes


def test_mutated_claims_are_all_refused(own: Path) -> None:
    drawn = random.Random(8)  # noqa: S311 - changes, no secrets
    content = some_claim(Ed25519PrivateKey.generate()).to_bytes()
    wrong = [each for each in (changed(content, drawn) for _ in range(400)) if each != content]
    assert len(wrong) > 300
    with visited(settings_of(own)) as visitor:
        before = visitor.program.get("/api/head").json()["size"]
        for each in wrong:
            said = visitor.program.post("/api/claims", files={"file": ("c", each)})
            assert said.status_code == 400
            assert said.json()["detail"].isprintable()
        assert visitor.program.get("/api/head").json()["size"] == before
