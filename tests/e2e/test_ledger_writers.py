"""`ledger add` killed at any moment, and many at once: what was acknowledged is there.

Slow: a thousand kills, and 8 writers of 200 claims, on SQLite and PostgreSQL. By default fewer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_calls import environment
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from authority import some_claim
from countermark.claims.audit import audit_ledger
from countermark.claims.ledger import Ledger
from countermark.claims.signing import compute_key_id
from postgres import server

OWNER, OPERATOR = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()

# Runs `ledger add` in children whose output is a pipe. With kills, one after the other, each ended
# by SIGKILL after a random time; without, all at once until they are done. Prints what each said.
DRIVER = """
import json, os, random, signal, sys, time
from countermark.cli import run
import countermark.claims.ledger, countermark.claims.database, countermark.claims.signed

url, kills, seed, *parts = sys.argv[1:]
drawn = random.Random(int(seed))

def start(files):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        for file in files:
            if run(["ledger", "add", file, "--ledger", url]):
                os._exit(1)
        os._exit(0)
    os.close(writing)
    return child, reading

def heard(child, reading):
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

sets = [json.load(open(part)) for part in parts]
sys.stdout = open(os.devnull, "w")
for warm in range(2):  # so that the first child is as quick as the last
    began = time.monotonic()
    assert run(["ledger", "add", sets[0].pop(0), "--ledger", url]) == 0
quick = time.monotonic() - began
sys.stdout = sys.__stdout__
if int(kills):
    ends, files, window = [], sets[0], 2 * quick
    for each in range(int(kills)):
        child, reading = start(files)
        said = os.read(reading, 1) if each % 2 else b""  # every other child has added something
        time.sleep(drawn.uniform(0.0, window))
        os.kill(child, signal.SIGKILL)
        code, more = heard(child, reading)
        ends.append((code, said.decode() + more))
        files = files[ends[-1][1].count("\\n"):]
else:
    ends = [heard(*each) for each in [start(files) for files in sets]]
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new ledger on each kind of database."""
    if request.param == "sqlite":
        place = str(tmp_path / "l.db")
    else:
        place = request.getfixturevalue("postgresql")
        emptied(place)
    Ledger.create(place, compute_key_id(OPERATOR.public_key())).close()
    return place


def emptied(place: str) -> None:
    import psycopg

    with psycopg.connect(place, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


def written(folder: Path, name: str, count: int) -> Path:
    """Signed claims as files, and the list of them as a file."""
    paths = []
    for each in range(count):
        path = folder / f"{name}-{each}.json"
        path.write_bytes(some_claim(OWNER).to_bytes())
        paths.append(str(path))
    listed = folder / f"{name}.list"
    listed.write_text(json.dumps(paths))
    return listed


def driven(url: str, kills: int, parts: list[Path]) -> list[tuple[int, str]]:
    words = [sys.executable, "-c", DRIVER, url, str(kills), "7", *map(str, parts)]
    done = subprocess.run(
        words, check=True, env=environment(), capture_output=True, text=True, timeout=1500
    )
    ends: list[tuple[int, str]] = json.loads(done.stdout)
    return ends


def acknowledged(ends: list[tuple[int, str]]) -> dict[str, int]:
    """File to place, of every line that was printed whole."""
    lines = [line for _, said in ends for line in said.split("\n")[:-1]]
    pairs = [line.rsplit(": claim ", 1) for line in lines]
    return {path: int(place) for path, place in pairs}


def checked(url: str, acked: dict[str, int]) -> int:
    """Every acknowledged claim is in its place and the tree is sound; how many claims there are."""
    from countermark.claims.signed import Claim

    with Ledger(url) as ledger:
        found = audit_ledger(ledger)
        assert found.faults == ()
        assert {path: found.places[Claim.load(path).digest] for path in acked} == acked
        return found.size


def killed(url: str, folder: Path, kills: int) -> None:
    listed = written(folder, "c", kills * 6)
    ends = driven(url, kills, [listed])
    assert {code for code, _ in ends} <= {-9, 0}
    acked = acknowledged(ends)
    assert len(acked) >= kills // 2  # as every other child was killed after its first line
    size = checked(url, acked)
    # The two that warmed it up, and perhaps one a kill that was not acknowledged any more.
    assert len(acked) + 2 <= size <= len(acked) + 2 + kills


def together(url: str, folder: Path, writers: int, each: int) -> float:
    parts = [written(folder, f"w{number}", each) for number in range(writers)]
    began = time.monotonic()
    ends = driven(url, 0, parts)
    seconds = time.monotonic() - began
    assert [code for code, _ in ends] == [0] * writers
    acked = acknowledged(ends)
    assert sorted(acked.values()) == list(range(2, writers * each))
    assert checked(url, acked) == writers * each
    return seconds


def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    place = str(tmp_path / "l.db")
    Ledger.create(place, compute_key_id(OPERATOR.public_key())).close()
    killed(place, tmp_path, 50)


def test_eight_writers_all_succeed(url: str, tmp_path: Path) -> None:
    together(url, tmp_path, 8, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_kills_lose_nothing(url: str, tmp_path: Path) -> None:
    killed(url, tmp_path, 1000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_writers_of_two_hundred(url: str, tmp_path: Path) -> None:
    seconds = together(url, tmp_path, 8, 200)
    sys.stdout.write(f"\n1,600 claims of 8 writers in {seconds:.1f} s\n")
