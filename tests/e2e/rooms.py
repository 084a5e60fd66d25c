"""A server's folders with everything in them, without training: two owners, two stamped copies."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cli_calls import call
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi.testclient import TestClient
from safetensors.numpy import save_file

from authority import LocalAuthority, some_claim
from countermark.checkpoints import compute_model_digest, open_weights
from countermark.claims.ledger import Ledger
from countermark.claims.signed import Claim
from countermark.claims.signing import load_private_key, write_key_pair
from countermark.claims.statement import Commitment
from countermark.keys.key import Key
from countermark.web.access import digest_token
from countermark.web.app import make_application
from countermark.web.settings import ServerLimits, ServerSettings
from countermark.web.site import AppState

TOKEN = "for-tests-only-0123456789"
SHAPES = {"embed.weight": (200, 64), "layers.0.up": (128, 64), "layers.0.down": (64, 128)}


def stock(folder: Path, authority: LocalAuthority) -> None:
    """Fill a folder: keys, suspects, claims of both owners under a stamped tree head."""
    drawn = np.random.default_rng(1)
    (folder / "keys").mkdir(parents=True)
    (folder / "suspects").mkdir()
    plain = {n: drawn.normal(0, 0.02, s).astype(np.float32) for n, s in SHAPES.items()}
    save_file(plain, folder / "suspects" / "unmarked.safetensors")
    write_key_pair(folder / "registry")
    registry = load_private_key(folder / "registry.pem")
    with Ledger.create(str(folder / "claims.db"), _identity(registry)) as ledger:
        before = folder / "suspects" / "unmarked.safetensors"
        for owner, firm in (("acme", "ACME Inc."), ("beta", "Beta Ltd.")):
            before, claim = _stamped(folder, before, owner, firm)
            ledger.add(authority.stamp(claim))
            claim.save(folder / f"{owner}.json")
            ledger.add(some_claim(Ed25519PrivateKey.generate()))
            ledger.add(authority.stamp(ledger.make_head().with_signature(registry)))
    shutil.copy(authority.root, folder / "root.pem")


def _identity(private: Ed25519PrivateKey) -> str:
    return private.public_key().public_bytes_raw().hex()


def _stamped(folder: Path, source: Path, owner: str, firm: str) -> tuple[Path, Claim]:
    out, key = folder / "suspects" / f"{owner}.safetensors", folder / "keys" / f"{owner}.key"
    words = ("stamp", str(source), "--owner", firm, "--bits", "128")
    said = call(*words, "--key", str(key), "--out", str(out))
    assert said.code == 0, said
    with open_weights(out) as weights:
        digest = compute_model_digest(weights)
    loaded = Key.load(key)
    kind: Any = "C1" if loaded.c1 else "C0"
    commitment = Commitment(kind=kind, sha256=loaded.commitment)
    write_key_pair(folder / owner)
    private = load_private_key(folder / f"{owner}.pem")
    claim = Claim.make_unsigned(commitment, firm, digest.root, digest.tensors)
    return out, claim.with_signature(private)


def settings_of(folder: Path, **limits: Any) -> ServerSettings:
    """What a server of such a folder serves."""
    quick = replace(ServerLimits(requests=1000, burst=10_000, logins=1000, seconds=100), **limits)
    return ServerSettings(
        str(folder / "claims.db"), folder / "state", digest_token(TOKEN), folder / "keys",
        folder / "suspects", None, (folder / "root.pem",), quick,
    )  # fmt: skip


class Visitor:
    """Somebody with a browser: follows redirects, keeps cookies, sends back what forms hold."""

    def __init__(self, site: AppState) -> None:
        self.site = site
        served = make_application(site)
        self.http = TestClient(served, raise_server_exceptions=False)
        self.program = TestClient(
            served, headers={"authorization": f"Bearer {TOKEN}"},
            raise_server_exceptions=False,
        )  # fmt: skip

    @property
    def csrf(self) -> str:
        """What the forms of the session bear."""
        page = self.http.get("/").text
        return page.partition('name="csrf" value="')[2].partition('"')[0]

    def log_in(self) -> None:
        assert self.http.post("/login", data={"token": TOKEN}).status_code == 200

    def verify(self, content: bytes, name: str = "x.safetensors", **fields: str) -> Any:
        """Upload a suspect by the API, and wait for what becomes of it."""
        files = {"file": (name, content)}
        said = self.program.post("/api/verify", data={"key": "acme.key", **fields}, files=files)
        assert said.status_code == 202, said.text
        return self.ended(said.json()["job"]["id"])

    def ended(self, identity: str, patience: float = 200) -> Any:
        """A job, once it is over."""
        ends = time.monotonic() + patience
        while time.monotonic() < ends:
            said = self.program.get(f"/api/jobs/{identity}").json()
            if said["job"]["state"] in ("done", "failed"):
                return said
            time.sleep(0.05)
        raise AssertionError(f"{identity} does not end: {said}")


@contextmanager
def visited(settings: ServerSettings) -> Iterator[Visitor]:
    """A site that runs, and somebody who has not logged in yet."""
    with AppState(settings) as site:
        yield Visitor(site)


def digest_of(visitor: Visitor, owner: str) -> str:
    """The digest of an owner's claim."""
    return Claim.load(visitor.site.settings.state.parent / f"{owner}.json").digest
