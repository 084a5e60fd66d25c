"""A suspect may do anything: it costs labels, is in the transcript, and never raises or hangs."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keys import one_line

from countermark.errors import ConfigError
from countermark.predictors.remote import Endpoint, RemoteOptions, TranscriptEntry, connect
from countermark.predictors.remote.pace import RequestPacer
from suspect_server import Said, Seen, Suspects, answering, hang, some_images, start, talking

pytestmark = pytest.mark.usefixtures("quick")
ENOUGH = 80.0  # seconds, however loaded the machine: what is tested would else take for ever


def ask(url: str, count: int = 2, **fields: Any) -> list[TranscriptEntry]:
    """The entries of images that got no label, which took a finite time."""
    began = time.monotonic()
    with connect(url, RemoteOptions("mlflow", **fields)) as endpoint:
        assert endpoint(some_images(count)).tolist() == [-1] * count
    assert time.monotonic() - began < ENOUGH
    entries = endpoint.transcript.entries
    for each in entries:
        assert each.label is None
        assert each.why
        assert each.why.isprintable()
        assert len(each.why) <= 160
    return list(entries)


def why(entries: list[TranscriptEntry]) -> str:
    """The one reason of all."""
    (said,) = {str(each.why) for each in entries}
    return said


async def drip(scope: Any, receive: Any, send: Any) -> None:
    await start(send)
    while True:
        await send({"type": "http.response.body", "body": b" ", "more_body": True})
        await asyncio.sleep(0.02)


async def pour(scope: Any, receive: Any, send: Any) -> None:
    await start(send)
    for _ in range(10_000):
        await send({"type": "http.response.body", "body": b"[" * 1000, "more_body": True})


def endless_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: y\r\n")
        time.sleep(0.02)


@pytest.mark.parametrize("app", [hang, drip])
def test_a_suspect_that_hangs_or_drips_is_left(suspects: Suspects, app: Any) -> None:
    entries = ask(suspects.serve(app), timeout=0.3, retries=0)
    assert why(entries) == "no whole answer within 0.3 s"
    assert {(each.status, each.answer, each.attempts) for each in entries} == {(None, None, 1)}


def test_headers_without_end_are_left() -> None:
    with talking(endless_headers) as url:
        assert why(ask(url, timeout=0.3, retries=0)) == "no whole answer within 0.3 s"


def test_the_deadline_ends_everything(suspects: Suspects) -> None:
    entries = ask(suspects.serve(hang), 50, batch=1, timeout=0.2, deadline=0.5)
    assert [each.attempts for each in entries][-1] == 0
    assert sum(each.attempts for each in entries) <= 4
    last = entries[-1]
    assert (last.request, last.answer, last.status) == (None, None, None)
    assert last.why == "the deadline of 0.5 s left no time to ask"


def test_only_the_time_spent_asking_counts_towards_the_deadline(suspects: Suspects) -> None:
    url = suspects.answer(lambda _: {"predictions": [1]})
    with connect(url, RemoteOptions("mlflow", deadline=200.0)) as endpoint:
        endpoint(some_images(1))
        endpoint._pace._ends -= 1000  # as if very long ago
        assert endpoint(some_images(1)).tolist() == [1]


def test_an_answer_that_is_too_large_is_not_read_to_its_end(suspects: Suspects) -> None:
    entries = ask(suspects.serve(pour), largest_answer=5000)
    assert why(entries) == "the answer has more than 5,000 bytes"
    assert {(each.status, each.answer, each.attempts) for each in entries} == {(200, None, 1)}


def test_an_answer_of_just_the_size_is_read(suspects: Suspects) -> None:
    body = b'{"predictions": [1]}'
    with connect(
        suspects.answer(lambda _: Said(body)), RemoteOptions("mlflow", largest_answer=len(body))
    ) as endpoint:
        assert endpoint(some_images(1)).tolist() == [1]


ANSWERS: list[tuple[Any, str]] = [
    (Said(b"\x00\xff garbage"), "the answer is no JSON: 'utf-8' codec"),
    (Said(b""), "the answer is no JSON: Expecting value"),
    (Said(b"[" * 100_000), "the answer is no JSON: it nests too deeply"),
    ({"predictions": [float("nan")] * 2}, "expected a label, came nan"),
    ({"predictions": [[1e308, float("inf")]] * 2}, "a score is not finite: inf"),
    ({"predictions": [10**50] * 2}, "no label is as large or small as a number beyond 64 bits"),
    ({"predictions": [1]}, "expected a list of 2 answer(s), came a list of 1"),
    ({"predictions": [1, 2, 3]}, "expected a list of 2 answer(s), came a list of 3"),
    ({"predictions": {"0": 1, "1": 2}}, "expected a list of 2 answer(s), came an object of 2"),
    (Said(b"\x1b[2Jerror", 500), "answered 500"),
    (Said(b"", 404), "answered 404"),
    (Said(b"", 204), "the answer is no JSON"),
    (Said(gzip.compress(b'{"predictions": [1, 2]}'), 200, (("content-encoding", "gzip"),)),
     "the answer is compressed, as 'gzip'"),
    (Said(b"x", 200, (("content-encoding", "\x7f" + "é" * 500),)), "the answer is compressed, as"),
    (Said(b"x", 200, (("content-type", "text/html; charset=utf-99"),)), "the answer is no JSON"),
    (Said(b"1", 302, (("location", "http://127.0.0.1:1/"),)),
     "answered 302, a redirect, which is never followed"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "said"), ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_without_labels_says_why(suspects: Suspects, answer: Any, said: str) -> None:
    entries = ask(suspects.answer(lambda _: answer))
    assert why(entries).startswith(said)
    assert {each.attempts for each in entries} == {1}


def test_a_gzip_bomb_is_never_unpacked_and_never_asked_for(suspects: Suspects) -> None:
    asked: list[str] = []

    def bomb(seen: Seen) -> Said:
        asked.append(seen.headers["accept-encoding"])
        return Said(gzip.compress(bytes(1 << 24)), 200, (("content-encoding", "gzip"),))

    entries = ask(suspects.answer(bomb))
    assert why(entries) == "the answer is compressed, as 'gzip'"
    assert {(each.status, each.answer) for each in entries} == {(200, None)}
    assert asked == ["identity"]


def test_a_redirect_is_not_followed_and_a_cookie_not_kept(suspects: Suspects) -> None:
    reached: list[Seen] = []
    target = suspects.answer(lambda seen: reached.append(seen) or {"predictions": [1]})
    cookies: list[str | None] = []

    def suspect(seen: Seen) -> Said:
        cookies.append(seen.headers.get("cookie"))
        return Said(b"", 307, (("location", target), ("set-cookie", "seen=1; path=/")))

    ask(suspects.answer(suspect), batch=1)
    assert cookies == [None, None]
    assert not reached


def half_a_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}")


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        (lambda connection: connection.close(), "the connection ended before a whole answer came"),
        (half_a_body, "the connection ended before a whole answer came"),
        (lambda connection: connection.sendall(b"\x00\x01\xff" * 100), "the connection ended"),
        (lambda connection: connection.sendall(b"HTTP/1.1 999 \xff\r\n\r\n"), ""),
        (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000), ""),
        (lambda connection: connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), ""),
        (lambda connection: connection.sendall(b"HTTP/1.1 101 Switching\r\n\r\n"), ""),
        (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), ""),
    ],
    ids=range(8),
)
def test_what_is_hardly_http_says_why(talk: Callable[[socket.socket], None], said: str) -> None:
    with talking(talk) as url:
        assert why(ask(url, timeout=60.0, retries=1)).startswith(said)


def test_a_refused_connection_is_tried_again_and_then_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    entries = ask(f"http://127.0.0.1:{port}", retries=2)
    assert why(entries) == "no connection could be made"
    assert {each.attempts for each in entries} == {3}


def flaky(*said: Said) -> Callable[[Seen], Any]:
    """Says these one after another, and then what was asked for."""
    rest = list(said)
    return lambda seen: rest.pop(0) if rest else {"predictions": [5] * len(seen.json["inputs"])}


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize("after", [(), (("retry-after", "0"),), (("retry-after", "soon"),)])
def test_a_passing_failure_passes(suspects: Suspects, status: int, after: Any) -> None:
    url = suspects.answer(flaky(*[Said(b"", status, after)] * 2))
    with connect(url, RemoteOptions("mlflow")) as endpoint:
        assert endpoint(some_images(2)).tolist() == [5, 5]
    assert {(each.attempts, each.status) for each in endpoint.transcript.entries} == {(3, 200)}


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 501])
def test_a_lasting_failure_is_not_repeated(suspects: Suspects, status: int) -> None:
    entries = ask(suspects.answer(lambda _: Said(b"no", status)))
    assert {(each.attempts, each.status, each.why) for each in entries} == {
        (1, status, f"answered {status}")
    }
    assert entries[0].answer is not None


def test_retries_have_an_end(suspects: Suspects) -> None:
    entries = ask(suspects.answer(lambda _: Said(b"", 503)), retries=2)
    assert {(each.attempts, each.why) for each in entries} == {(3, "answered 503")}


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which is waited for."""
    pauses: list[float] = []
    monkeypatch.setattr("countermark.predictors.remote.pace.time.sleep", pauses.append)
    return pauses


def test_retry_after_is_waited_for(suspects: Suspects, slept: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    url = suspects.answer(flaky(Said(b"", 429, (("retry-after", "7"),)),
                                Said(b"", 503, (("retry-after", date),))))  # fmt: skip
    with connect(url, RemoteOptions("mlflow")) as endpoint:
        assert endpoint(some_images(1)).tolist() == [5]
    waits = [each for each in slept if each > 1]
    assert len(waits) == 2
    assert 1 < waits[0] <= 7  # less the time since the answer came
    assert 10 < waits[1] <= 107


@pytest.mark.parametrize("after", ["3600", "9" * 500, "Fri, 31 Dec 2999 23:59:59 GMT"])
def test_a_wait_beyond_the_deadline_ends_the_asking(suspects: Suspects, after: str) -> None:
    seen: list[Seen] = []
    answer = Said(b"", 429, (("retry-after", after),))
    entries = ask(suspects.answer(lambda each: seen.append(each) or answer), 3, batch=1)
    assert [each.attempts for each in entries] == [1, 0, 0]
    assert entries[0].why == "answered 429; the deadline of 300 s left no time to ask again"
    assert entries[1].why == "the deadline of 300 s left no time to ask"
    assert len(seen) == 1


@pytest.mark.parametrize(
    "after", ["-1", "1e9", "nan", "٣", "Fri, 99 Dec 2999", "Mon, 01 Jan 0001 00:00:00 -2359", ""]
)
def test_a_senseless_retry_after_is_passed_over(suspects: Suspects, after: str) -> None:
    with connect(
        suspects.answer(flaky(Said(b"", 503, (("retry-after", after),)))), RemoteOptions("mlflow")
    ) as endpoint:
        assert endpoint(some_images(1)).tolist() == [5]


def test_the_rate_is_kept(suspects: Suspects, slept: list[float]) -> None:
    url = suspects.answer(flaky())
    with connect(url, RemoteOptions("mlflow", batch=1, rate=0.01)) as endpoint:
        assert endpoint(some_images(3)).tolist() == [5] * 3
    assert slept[0] < 1
    assert all(50 < each <= 200 for each in slept[1:])
    assert len(slept) == 3


def test_pauses_grow_and_are_drawn() -> None:
    pace = RequestPacer(RemoteOptions("mlflow"))
    early, late = ([pace.compute_pause(n, None) for _ in range(200)] for n in (1, 8))
    assert max(early) <= 0.01 < max(late) <= 0.01 * 2**7
    assert min(late) < 0.3 * max(late)
    assert max(pace.compute_pause(100, None) for _ in range(50)) <= 30


def test_random_answers_are_recorded_as_they_came(suspects: Suspects) -> None:
    drawn = np.random.default_rng(5)
    url = suspects.answer(lambda _: {"predictions": [int(drawn.integers(10))]})
    images = some_images(20)
    with connect(url, RemoteOptions("mlflow", batch=1)) as endpoint:
        first, second = endpoint(images), endpoint(images)
    assert first.tolist() != second.tolist()
    assert endpoint.transcript.make_replay()(images).tolist() == first.tolist()


def test_a_certificate_counts_when_it_is_trusted_and_names_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    with tls(certificate) as url:
        entries = ask(url)
        assert why(entries) == "its TLS certificate could not be verified"
        assert {each.attempts for each in entries} == {1}
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with connect(url, RemoteOptions("mlflow")) as endpoint:
            assert endpoint(some_images(1)).tolist() == [5]
        elsewhere = url.replace("127.0.0.1", "localhost")
        assert why(ask(elsewhere)) == "its TLS certificate could not be verified"


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, in one file."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "suspect")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(here, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "suspect.pem"
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, *plain))
    return path


def tls(certificate: Path) -> Any:
    """A server with that certificate, which answers 5 to one image."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def talk(connection: ssl.SSLSocket) -> None:
        body = b'{"predictions": [5]}'
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body)

    return talking(talk, context)


def test_a_proxy_of_the_environment_is_used_and_may_be_bypassed(
    suspects: Suspects, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = suspects.answer(flaky())
    monkeypatch.setenv("http_proxy", "127.0.0.1:1")
    assert why(ask(url, retries=0)) == "no connection could be made"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with connect(url, RemoteOptions("mlflow")) as endpoint:
        assert endpoint(some_images(1)).tolist() == [5]


def test_a_proxy_that_cannot_be_used_is_an_error_that_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "gopher://me:sesame@proxy")
    with pytest.raises(ConfigError) as raised:
        connect("https://example.com", RemoteOptions("mlflow"))
    assert "sesame" not in one_line(raised.value)
    assert "proxy" in str(raised.value)


def test_ctrl_c_ends_a_request_and_keeps_the_record(
    suspects: Suspects, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([{"predictions": [5]}])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if (said := next(answers, None)) is not None:
            return await answering(lambda _: said)(scope, receive, send)
        return await hang(scope, receive, send)

    def interrupted(self: Any) -> Any:
        monkeypatch.undo()
        self.cancel()
        raise KeyboardInterrupt

    def ask_twice(endpoint: Endpoint) -> None:
        endpoint(some_images(1))
        monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
        endpoint(some_images(1))

    began = time.monotonic()
    endpoint = connect(suspects.serve(app), RemoteOptions("mlflow", timeout=100.0))
    with endpoint, pytest.raises(KeyboardInterrupt):
        ask_twice(endpoint)
    assert time.monotonic() - began < ENOUGH
    assert [each.label for each in endpoint.transcript.entries] == [5]


def test_a_closed_endpoint_says_so_and_keeps_its_transcript(suspects: Suspects) -> None:
    with connect(suspects.answer(flaky()), RemoteOptions("mlflow")) as endpoint:
        endpoint(some_images(1))
    endpoint.close()
    with pytest.raises(ConfigError, match="the endpoint is closed: ask within its `with` block"):
        endpoint(some_images(1))
    assert len(endpoint.transcript.entries) == 1
