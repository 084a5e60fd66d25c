"""Time stamps are believed of whom the examiner pinned, and are about one document."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keys import mutated, one_line

from authority import LocalAuthority, some_claim
from countermark.claims.timestamp import (
    Authority,
    find_confirmed_timestamps,
    make_request,
    read_response,
    request_timestamp,
)
from countermark.errors import ClaimError

OWNER = Ed25519PrivateKey.generate()


def test_a_stamp_says_when_and_by_whom(authority: LocalAuthority) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    claim = authority.stamp(some_claim(OWNER))
    (found,) = find_confirmed_timestamps(claim, [authority.pinned])
    assert before <= found.stamp.time <= datetime.now(UTC) <= found.stamp.latest_time
    assert found.stamp.accuracy == timedelta(seconds=1)
    assert found.to_json()["authority"] == "CN=Pinned root"


def test_nobody_is_believed_by_default(
    authority: LocalAuthority, other_authority: LocalAuthority
) -> None:
    claim = authority.stamp(some_claim(OWNER))
    assert find_confirmed_timestamps(claim, []) == []
    assert find_confirmed_timestamps(claim, [other_authority.pinned]) == []
    both = other_authority.stamp(claim)
    assert len(find_confirmed_timestamps(both, [authority.pinned, other_authority.pinned])) == 2
    assert len(find_confirmed_timestamps(both, [authority.pinned])) == 1


def test_one_authority_counts_once(authority: LocalAuthority, tmp_path: Path) -> None:
    claim = authority.stamp(authority.stamp(some_claim(OWNER)))
    copied = tmp_path / "again.pem"
    copied.write_bytes(authority.root.read_bytes())
    chain = tmp_path / "chain.pem"
    chain.write_bytes(authority.root.read_bytes() + (authority.folder / "signer.pem").read_bytes())
    pinned = [authority.pinned, Authority.load(copied), Authority.load(chain)]
    assert len(find_confirmed_timestamps(claim, pinned)) == 1


def test_a_signer_can_be_pinned_below_its_root(
    authority: LocalAuthority, other_authority: LocalAuthority, tmp_path: Path
) -> None:
    claim = authority.stamp(some_claim(OWNER))
    for signer, count in ((authority, 1), (other_authority, 0)):
        pem = tmp_path / "chain.pem"
        pem.write_bytes(authority.root.read_bytes() + (signer.folder / "signer.pem").read_bytes())
        assert len(find_confirmed_timestamps(claim, [Authority.load(pem)])) == count


def test_a_signer_alone_or_two_of_them_cannot_be_pinned(
    authority: LocalAuthority, other_authority: LocalAuthority, tmp_path: Path
) -> None:
    first, second = (
        (each.folder / "signer.pem").read_bytes() for each in (authority, other_authority)
    )
    for content in (first, authority.root.read_bytes() + first + second):
        (tmp_path / "a.pem").write_bytes(content)
        with pytest.raises(ClaimError) as caught:
            Authority.load(tmp_path / "a.pem")
        assert "expected a self-signed root" in one_line(caught.value)


def test_a_stamp_of_something_else_is_refused(authority: LocalAuthority) -> None:
    claim, other = some_claim(OWNER), some_claim(OWNER)
    response = authority.reply(make_request(claim))
    read_response(response, claim)
    for document in (other, some_claim(OWNER, Ed25519PrivateKey.generate())):
        with pytest.raises(ClaimError) as caught:
            read_response(response, document)
        assert "is of something else than this claim" in one_line(caught.value)
        with pytest.raises(ClaimError):
            find_confirmed_timestamps(document.with_timestamp(response), [authority.pinned])


def test_who_signs_the_claim_cannot_stamp_it(tmp_path: Path) -> None:
    """An Ed25519 root whose key signed the claim as well is the claimant himself."""
    import datetime as dates

    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Own")])
    now = dates.datetime.now(UTC)
    root = (
        x509.CertificateBuilder(name, name, OWNER.public_key(), 1, now, now + timedelta(1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(OWNER, None)
    )
    (tmp_path / "own.pem").write_bytes(root.public_bytes(Encoding.PEM))
    own = Authority.load(tmp_path / "own.pem")
    asked: list[bytes] = []
    object.__setattr__(own, "confirms", lambda response, _: asked.append(response))
    claim = some_claim(OWNER)
    assert find_confirmed_timestamps(claim, [own]) == []
    assert asked == []


def test_damaged_responses_are_refused_in_one_line(authority: LocalAuthority) -> None:
    claim = some_claim(OWNER)
    response, drawn = authority.reply(make_request(claim)), random.Random(2)  # noqa: S311
    pinned = authority.pinned
    for each in (b"", b"x", response[:100], b"\x30\x03\x02\x01\x02", bytes(1 << 17)):
        with pytest.raises(ClaimError) as caught:
            read_response(each, claim)
        one_line(caught.value)
    at = re.search(rb"\x18.20\d{12}", response)
    assert at is not None
    for moment in (b"99991231235959", b"00010101000000"):  # a second more, or less, is no time
        far = response[: at.start() + 2] + moment + response[at.end() :]
        with pytest.raises(ClaimError, match="no time stamp that was granted"):
            read_response(far, claim)
    for changes in range(200):
        damaged = mutated(response, drawn, 1 + changes % 3)
        why = pinned.explain_rejection(damaged, claim.envelope_bytes)
        try:
            stamp = read_response(damaged, claim)
        except ClaimError as error:
            one_line(error)
            continue
        if why is None:  # what is not signed may change: a comment of the authority
            assert stamp == read_response(response, claim)


@pytest.fixture
def served(authority: LocalAuthority) -> Iterator[str]:
    """The authority by HTTP, on loopback; other paths than / answer as they are called."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/timestamp-query"
            body = {"/": b"", "/large": bytes(1 << 17), "/empty": b"", "/no": b"x"}[self.path]
            self.send_response(500 if self.path == "/no" else 200)
            self.end_headers()
            self.wfile.write(authority.reply(asked) if self.path == "/" else body)

        def log_message(self, *_: object) -> None:
            """Nothing is said."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_authority_is_asked_by_http(served: str, authority: LocalAuthority) -> None:
    claim = some_claim(OWNER)
    stamped = claim.with_timestamp(request_timestamp(f"{served}/", make_request(claim)))
    assert len(find_confirmed_timestamps(stamped, [authority.pinned])) == 1
    for url, says in (
        (f"{served}/large", "expected an RFC 3161 response"),
        (f"{served}/empty", "with 0 bytes"),
        (f"{served}/no", "answers 500"),
        ("http://127.0.0.1:9/", "does not answer"),
        ("nonsense", "does not answer"),
        ("ftp://x/", "does not answer"),
    ):
        with pytest.raises(ClaimError) as caught:
            request_timestamp(url, make_request(claim))
        assert says in one_line(caught.value)


def test_a_refusal_is_no_stamp(authority: LocalAuthority) -> None:
    rejected = authority.reply(b"\x30\x03\x02\x01\x01")  # openssl answers: bad request
    with pytest.raises(ClaimError, match="no time stamp that was granted"):
        read_response(rejected, some_claim(OWNER))
    assert authority.pinned.explain_rejection(rejected, b"") is not None
