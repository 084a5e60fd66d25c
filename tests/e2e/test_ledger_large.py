"""A ledger of 100,000 claims: a claim is found and proven in milliseconds, all of it in minutes."""

from __future__ import annotations

import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import environment
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from authority import some_claim
from countermark.claims.audit import audit_ledger
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim
from countermark.claims.signing import compute_key_id
from countermark.claims.tree import GrowingTree

COUNT, LIMIT = 100_000, 0.05  # claims; seconds of a find, and of a proof

WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from authority import some_claim
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from countermark.claims.ledger import Ledger
owner = Ed25519PrivateKey.generate()
with Ledger(sys.argv[1]) as ledger:
    print("writing", flush=True)
    while True:
        ledger.add(some_claim(owner))
"""


def filled(path: Path, count: int) -> list[Claim]:
    """A ledger that is written row by row; `Ledger.add` waits for the disk each time."""
    owner = Ed25519PrivateKey.generate()
    Ledger.create(str(path), compute_key_id(owner.public_key())).close()
    tree, kept = GrowingTree(), []
    with sqlite3.connect(path) as connection:
        for place in range(count):
            claim = some_claim(owner)
            content = claim.to_bytes()
            row = (place, claim.digest, claim.commitment, claim.model_root, content)
            connection.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?)", row)
            nodes = [(*at, digest) for at, digest in tree.add_leaf(content).items()]
            connection.executemany("INSERT INTO nodes VALUES (?, ?, ?)", nodes)
            if place % (count // 100) == 0:
                kept.append(claim)
    connection.close()
    return kept


def median(act: Callable[[Claim], object], claims: list[Claim]) -> float:
    seconds = []
    for each in claims:
        began = time.perf_counter()
        act(each)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_claims(tmp_path: Path) -> None:
    path = tmp_path / "large.db"
    kept = filled(path, COUNT)
    with Ledger(str(path)) as ledger:
        places = {each.digest: ledger.find(digest=each.digest)[0].place for each in kept}

        def find(claim: Claim) -> None:
            assert ledger.find(digest=claim.digest)

        def prove(claim: Claim) -> None:
            ledger.prove(places[claim.digest])

        alone = median(find, kept), median(prove, kept)
        words = [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parents[1])]
        with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            beside = median(find, kept), median(prove, kept)
            writer.kill()
        began = time.process_time()
        found = audit_ledger(ledger)
        seconds = time.process_time() - began
    assert found.faults == ()
    assert found.size > COUNT, "the writer wrote nothing"
    sys.stdout.write(
        f"\n{COUNT:,} claims: find {1e3 * alone[0]:.1f} ms, proof {1e3 * alone[1]:.1f} ms; beside "
        f"a writer {1e3 * beside[0]:.1f} and {1e3 * beside[1]:.1f} ms; "
        f"verify {found.size / seconds:,.0f} claims a second of CPU time\n"
    )
    assert max(*alone, *beside) < LIMIT
