"""Cost of the web page: its first page against importing torch, and claim pages under load.

The server is `countermark serve` in a process of its own, as people start it.
"""

from __future__ import annotations

import http.client
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim
from countermark.claims.signing import compute_key_id
from countermark.claims.statement import Commitment
from countermark_lab.speed.ratios import Ratio, measure_against_torch, read_child_seconds

_CLAIMS = 1000
_LIMIT = 0.6  # of the CPU time of importing torch
_SLOWEST = 1.0  # seconds; one request in a hundred may take longer


@dataclass(frozen=True)
class PageLoad:
    """Timing of claim pages that are requested at an even pace, whether or not the server keeps up.

    Attributes:
        wanted: requests a second.
        asked: number of requests.
        answered: number of requests that were answered with the page.
        seconds: from the first request to the last answer.
        median, p99, most: seconds from the time when a request was due to its answer.
    """

    wanted: float
    asked: int
    answered: int
    seconds: float
    median: float
    p99: float
    most: float

    @property
    def is_within_limit(self) -> bool:
        """True if all pages came, at that pace, and 99 of 100 within a second."""
        at_pace = self.asked / self.seconds >= 0.95 * self.wanted
        return self.answered == self.asked and at_pace and self.p99 <= _SLOWEST


def measure_first_page(pairs: int = 7) -> Ratio:
    """Measure the CPU time of a server up to its first page, against importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        _make_ledger(Path(folder), 1)
        return measure_against_torch(
            "serve, from its start to the first page",
            lambda: _time_first_page(Path(folder)), _LIMIT, pairs,
        )  # fmt: skip


def load(a_second: float = 50, seconds: float = 20, connections: int = 8) -> PageLoad:
    """Request claim pages from a server and time the answers.

    For each page the server checks signature and inclusion proof.

    Args:
        a_second: requests a second.
        seconds: duration of the measurement.
        connections: number of connections that send requests in turn.
    """
    with tempfile.TemporaryDirectory() as folder:
        digests = _make_ledger(Path(folder), _CLAIMS)
        count = round(a_second * seconds)
        # A stride of 7919, a prime, spreads the requests over the claims.
        wanted = [digests[n * 7919 % len(digests)] for n in range(count)]
        with _run_server(Path(folder)) as (address, token):
            return _time_requests(address, _log_in(address, token), wanted, (a_second, connections))


def render_page_load(found: PageLoad) -> list[str]:
    """Render the section about the web page, as lines of Markdown."""
    a_second = found.asked / found.seconds
    times = " | ".join(f"{each:.3f} s" for each in (found.median, found.p99, found.most))
    return [
        "## The web page",
        "",
        f"{found.asked:,} pages of claims, out of {_CLAIMS:,}, {found.wanted:g} a second. For each",
        "page the signature is verified and the inclusion proof computed and checked. The server",
        f"is one process, whoever asks another one, on the same {os.cpu_count()} cores. Seconds",
        "are from when a request was due to the end of its answer.",
        "",
        "| asked | answered | a second | median | p99 | slowest |",
        "|---|---|---|---|---|---|",
        f"| {found.asked:,} | {found.answered:,} | {a_second:.1f} | {times} |",
        "",
        f"Limit: all answered, at this pace, p99 at most {_SLOWEST:g} s.",
    ]


def _time_requests(
    address: str, cookie: str, wanted: Sequence[str], pace: tuple[float, int]
) -> PageLoad:
    """Request the claims `wanted` and time the answers.

    Args:
        address: host and port of the server.
        cookie: of a session that is logged in.
        wanted: digests of claims.
        pace: requests a second, and number of connections.
    """
    a_second, connections = pace
    took: list[float] = []
    warm = http.client.HTTPConnection(address, timeout=30)
    _request_claim(warm, wanted[0], cookie)  # the first request opens the ledger
    warm.close()
    # All threads have started before the first request is due.
    start = time.monotonic() + 0.1

    def send_requests(first: int) -> None:
        """Send every `connections`-th request on one connection, each when it is due."""
        connection = http.client.HTTPConnection(address, timeout=30)
        for n in range(first, len(wanted), connections):
            due = start + n / a_second
            # Time counts from when a request is due: a slow server cannot slow the measurement
            # down.
            time.sleep(max(0.0, due - time.monotonic()))
            if _request_claim(connection, wanted[n], cookie):
                took.append(time.monotonic() - due)
        connection.close()

    threads = [threading.Thread(target=send_requests, args=(n,)) for n in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took.sort()
    # The index is bounded, because unanswered requests have no time.
    p99 = took[min(len(took) - 1, len(took) * 99 // 100)]
    return PageLoad(
        a_second, len(wanted), len(took), time.monotonic() - start, statistics.median(took), p99,
        took[-1],
    )  # fmt: skip


def _request_claim(connection: http.client.HTTPConnection, digest: str, cookie: str) -> bool:
    """Request the page of a claim; return true if the page calls the claim whole."""
    connection.request("GET", f"/claims/{digest}", headers={"cookie": cookie})
    answer = connection.getresponse()
    return b"<strong>Whole</strong>" in answer.read() and answer.status == 200


def _log_in(address: str, token: str) -> str:
    """Log in and return the cookie of the new session."""
    connection = http.client.HTTPConnection(address, timeout=30)
    kind = {"content-type": "application/x-www-form-urlencoded"}
    connection.request("POST", "/login", urlencode({"token": token}), kind)
    cookie = connection.getresponse().headers["set-cookie"].partition(";")[0]
    connection.close()
    return str(cookie)


def _make_ledger(folder: Path, claims: int) -> list[str]:
    """Make a ledger with this many signed claims; return their digests."""
    private = Ed25519PrivateKey.generate()
    digests = []
    with Ledger.create(str(folder / "claims.db"), compute_key_id(private.public_key())) as ledger:
        for n in range(claims):
            commitment = Commitment(kind="C0", sha256=secrets.token_hex(32))
            claim = Claim.make_unsigned(
                commitment, f"Owner {n}", secrets.token_hex(32), 4
            ).with_signature(private)
            ledger.add(claim)
            digests.append(claim.digest)
    return digests


@contextmanager
def _run_server(folder: Path) -> Iterator[tuple[str, str]]:
    """Run a server of the ledger in `folder`; yield its host and port, and its token."""
    token = secrets.token_urlsafe(24)
    # Port 0 lets the system choose a free port; the address is read from standard error.
    words = ["serve", "--ledger", "claims.db", "--port", "0", "--most-requests", "10000"]
    server = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-m", "countermark", *words], cwd=folder, stderr=subprocess.PIPE,
        env=dict(os.environ, COUNTERMARK_TOKEN=token), text=True,
    )  # fmt: skip
    if server.stderr is None:  # pragma: no cover - it is a pipe
        raise RuntimeError("a server without standard error")
    try:
        address = next(line.split()[-1] for line in server.stderr if "http://" in line)
        yield urlsplit(address).netloc, token
    # The ledger is temporary, so that nothing is lost by killing its server.
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def _time_first_page(folder: Path) -> float:
    """Return the CPU seconds of a server from its start to its first page."""
    before = read_child_seconds()
    with _run_server(folder) as (address, _):
        connection = http.client.HTTPConnection(address)
        connection.request("GET", "/login")
        connection.getresponse().read()
        connection.close()
    return read_child_seconds() - before
