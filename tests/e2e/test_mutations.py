"""Keys, claims, bundles and checkpoints that were changed: refused in one line, or without effect.

Every mutation goes through the command that judges such a file. The folder to work in lies deep in
one that is watched as a whole, home and temporary folder included: nothing may appear in it.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785
import typer
from cli_calls import Said, call, listing, process
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from authority import LocalAuthority, some_claim
from clock import AFTER_STAMPS_TEXT
from countermark.checkpoints import compute_model_digest, open_weights
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim
from countermark.claims.signing import load_private_key, write_key_pair
from countermark.claims.statement import Commitment
from countermark.cli.app import app
from countermark.keys.key import Key

EACH = 150  # mutations of every kind, 600 in all
BOUND = 128 << 20  # bytes that a judging command may take, whatever it is given
HOSTILE = (
    None, True, -1, 0, 1.5, 1 << 41, 1 << 64, 10**400, "", "../../outside", "/dev/outside",
    "x" * 5000, "\x00", "\x1b[2J", "00" * 32, "C9", [], {}, [[[[]]]] * 50, {"x": {"y": []}},
    "2026-02-30T00:00:00Z", "9999-12-31T23:59:59.999999Z",
)  # fmt: skip
Change = Callable[[Path], None]
DEEP = Path("one", "two", "work")


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory, made: Path, authority: LocalAuthority) -> Path:
    """A folder with a marked model and all the evidence about it; read only."""
    folder = tmp_path_factory.mktemp("dated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(made / "marked.safetensors", "m.safetensors")
        shutil.copytree(made / "acme.key", "acme.key")
        shutil.copy(authority.root, "root.pem")
        name, key = write_key_pair(Path("acme")), Key.load("acme.key")
        private = load_private_key(Path("acme.pem"))
        with open_weights("m.safetensors") as weights:
            digest = compute_model_digest(weights)
        commitment = Commitment(kind="C0", sha256=key.commitment)
        claim = Claim.make_unsigned(
            commitment, key.owner, digest.root, digest.tensors
        ).with_signature(private)
        claim = authority.stamp(claim)
        claim.save("claim.json")
        with Ledger.create("claims.db", name) as ledger:
            ledger.add(some_claim(Ed25519PrivateKey.generate()))
            ledger.add(claim)
            head = authority.stamp(ledger.make_head().with_signature(private))
            ledger.add(head)
        head.save("head.json")
        said = call(
            "report", "m.safetensors", "--key", "acme.key", "--out", "report.html", "--bundle",
            "bundle", "--claim", "claim.json", "--authority", "root.pem", "--suspect-date",
            AFTER_STAMPS_TEXT, "--ledger", "claims.db",
        )  # fmt: skip
        assert said.code == 0, said
    return folder


@pytest.fixture
def work(dated: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, three folders down in an empty one."""
    shutil.copytree(dated, here / DEEP)
    for name, variable in (("home", "HOME"), ("temporary", "TMPDIR")):
        (here / name).mkdir()
        monkeypatch.setenv(variable, str(here / name))
    monkeypatch.setattr("tempfile.tempdir", str(here / "temporary"))
    command = typer.main.get_command(app)  # built once: that is most of what a call costs
    monkeypatch.setattr("typer.main.get_command", lambda _: command)
    monkeypatch.chdir(here / DEEP)
    return here / DEEP


# --- what judges each kind, and what must be as it was where it still says yes

JUDGED: dict[str, tuple[str, tuple[str, ...], Callable[[Any], Any]]] = {
    "key": (
        "verify m.safetensors --key acme.key",
        ("acme.key/key.json", "acme.key/key.safetensors"),
        lambda told: told,
    ),
    "claim": (
        (
            "claim check claim.json --signer acme.pub --authority root.pem "
            f"--before {AFTER_STAMPS_TEXT}"
        ),
        ("claim.json",),
        lambda told: {name: told[name] for name in told if name != "stamps"},
    ),
    "bundle": (
        "report --replay bundle",
        ("bundle/record.json", "bundle/claim.json", "bundle/tree-head.json",
         "bundle/inclusion.json", "bundle/authority-0.pem"),
        lambda told: told["recorded_verdict"],
    ),
    "checkpoint": (
        "ledger verify --ledger claims.db --since head.json --authority root.pem",
        ("head.json",),
        lambda told: (told["root"], told["checkpoint"]["digest"]),
    ),
}  # fmt: skip


YES = {"key": 0, "claim": 0, "bundle": 3, "checkpoint": 0}
"""How a call ends where nothing was changed; a bundle alone is a record and no more."""


def judge(kind: str) -> Said:
    return call(*JUDGED[kind][0].split(), "--json")


def told_alike(kind: str, said: Said) -> Any:
    """What an answer is about, without what may differ between two answers that are one."""
    return JUDGED[kind][2](said.json)


# --- mutations


def damaged(content: bytes, drawn: random.Random) -> bytes:
    """Some bytes flipped, cut out, put in twice or overwritten; or the end cut off."""
    changed = bytearray(content)
    for _ in range(drawn.randrange(1, 5)):
        at, size = drawn.randrange(len(changed) + 1), drawn.randrange(1, 40)
        match drawn.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([drawn.randrange(256)])
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = changed[at : at + size]
            case 3:
                changed[at : at + 1] = drawn.choice((b'"', b"{", b"]", b",", b"-", b"9", b"null"))
            case _:
                del changed[at + drawn.randrange(1 + len(changed)) :]
    return bytes(changed)


def rewritten(document: Any, drawn: random.Random) -> Any:
    """One place of a document with something hostile in it, without it, or with a name more."""
    places = list(inside(document))
    holder, name = drawn.choice(places)
    match drawn.randrange(4):
        case 0:
            del holder[name]
        case 1 if isinstance(holder, dict):
            holder[drawn.choice(("colour", "__class__", "x" * 300))] = drawn.choice(HOSTILE)
        case _:
            holder[name] = drawn.choice(HOSTILE)
    return document


def inside(document: Any) -> list[tuple[Any, Any]]:
    """Every place of a document: what holds it, and its name or number there."""
    names = document if isinstance(document, dict) else range(len(document))
    found = [(document, name) for name in names]
    for name in names:
        if isinstance(document[name], dict | list) and document[name]:
            found += inside(document[name])[:2000]
    return found


def written(document: Any) -> bytes:
    """Canonical JSON, as far as it can be."""
    try:
        return rfc8785.dumps(document)
    except rfc8785.CanonicalizationError:
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def mutate(path: Path, drawn: random.Random) -> None:
    """One mutation of one file: of its bytes, its JSON, or the statement that is signed in it."""
    content, how = path.read_bytes(), drawn.randrange(4)
    if path.suffix != ".json" or how == 0:
        path.write_bytes(damaged(content, drawn))
        return
    document = json.loads(content)
    if "envelope" in document and how == 1:
        statement = json.loads(base64.b64decode(document["envelope"]["payload"]))
        text = written(rewritten(statement, drawn))
        document["envelope"]["payload"] = base64.b64encode(text).decode()
    elif "envelope" in document and how == 2:
        stamp = damaged(base64.b64decode(document["timestamps"][0]), drawn)
        document["timestamps"] = [base64.b64encode(stamp).decode()]
    else:
        rewritten(document, drawn)
    path.write_bytes(written(document))


@pytest.mark.parametrize("kind", JUDGED)
def test_mutations_are_refused_or_without_effect(kind: str, work: Path, here: Path) -> None:
    names, codes = JUDGED[kind][1], Counter[int]()
    whole, before = {each: (work / each).read_bytes() for each in names}, judge(kind)
    assert before.code == YES[kind]

    @settings(
        max_examples=EACH,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(name=st.sampled_from(names), seed=st.integers(0, (1 << 32) - 1))
    def try_one(name: str, seed: int) -> None:
        mutate(work / name, random.Random(seed))  # noqa: S311
        there = listing(here)
        said = judge(kind)
        assert listing(here) == there
        require_clean(kind, said, before)
        codes[said.code] += 1
        (work / name).write_bytes(whole[name])

    try_one()
    assert codes.total() >= EACH
    assert codes[2] + codes[1] > EACH // 2  # they do change something


def require_clean(kind: str, said: Said, before: Said) -> None:
    """Stopped by one line of its own, a plain no, or the same yes."""
    assert "internal error" not in said.err, said.err
    if said.code == 2:
        assert said.out == ""
        assert said.why.isprintable()
        assert len(said.why) < 2000
    else:
        assert said.err.splitlines() == said.notes
        assert said.code in (YES[kind], 1), said
    if said.code == YES[kind]:
        assert told_alike(kind, said) == told_alike(kind, before)


# --- what is too large, too deep, or no file


def no_file(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nobody_writes(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def deep(path: Path) -> None:
    path.write_bytes(b'{"a":' * 150_000)


def long_number(path: Path) -> None:
    path.write_bytes(b'{"type":' + b"1" * 900_000 + b"}")


def wide(path: Path) -> None:
    names = b",".join(b'"%x":0' % n for n in range(20_000))
    path.write_bytes(b'{"type":{' + names + b"}}")


def claims_to_be_large(path: Path) -> None:
    path.write_bytes((1 << 62).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1]}}')


BOMBS = (
    no_file, endless, nobody_writes, sparse, deep, long_number, wide, claims_to_be_large
)  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS, ids=[each.__name__ for each in BOMBS])
def test_bombs_are_refused_in_bounded_memory(bomb: Change, work: Path, here: Path) -> None:
    for kind, (_, names, _) in JUDGED.items():
        for name in names:
            path, aside = work / name, here / "aside"
            path.rename(aside)
            bomb(path)
            tracemalloc.start()
            try:
                said = judge(kind)
                taken = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert taken < BOUND, (name, taken)
            require_clean(kind, said, said)
            assert said.code == 2
            path.rmdir() if path.is_dir() else path.unlink()
            aside.rename(path)
    assert judge("bundle").code == YES["bundle"]


@pytest.mark.parametrize("part", [b"0,", b"[],"], ids=["numbers", "lists"])
@pytest.mark.slow
def test_a_record_of_as_many_parts_as_may_be(work: Path, part: bytes) -> None:
    """A digit or an empty list takes the most memory for its length; two gigabytes are enough."""
    most = (1 << 20) - 100 if part == b"[]," else (1 << 21) - 100
    Path("bundle/record.json").write_bytes(b'{"reading":[' + part * most + b"0]}")
    limited = f"ulimit -v {2 << 20}; exec {sys.executable} -m countermark report --replay bundle"
    said = process(["bash", "-c", limited], work)
    assert said.code == 2
    assert "bundle/record.json: type: Field required" in said.why


def test_a_record_of_more_parts_is_not_parsed(work: Path) -> None:
    Path("bundle/record.json").write_bytes(b"[" * (1 << 21) + b",")
    assert "it has more than 2,097,152 parts" in judge("bundle").why
