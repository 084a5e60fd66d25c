"""Time-stamping authorities on this machine, by `openssl ts`, and keys to sign with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from countermark.claims.signed import Claim, TreeHead
from countermark.claims.statement import Commitment
from countermark.claims.timestamp import Authority, make_request

Document = TypeVar("Document", Claim, TreeHead)

EXTENSIONS = """
[req]
distinguished_name = dn
[dn]
[root]
basicConstraints = critical, CA:TRUE
[signer]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = critical, timeStamping
"""
CONFIG = """
[tsa]
default_tsa = here
[here]
serial = {folder}/serial
signer_cert = {folder}/signer.pem
signer_key = {folder}/signer.key
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
accuracy = secs:{accuracy}
clock_precision_digits = 6
ess_cert_id_alg = sha256
"""


class LocalAuthority:
    """A root and a signer below it; stamps by this machine's clock."""

    def __init__(self, folder: Path, name: str = "Test", accuracy: int = 1) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "openssl.cnf").write_text(EXTENSIONS)
        (folder / "ts.cnf").write_text(CONFIG.format(folder=folder, accuracy=accuracy))
        (folder / "serial").write_text("01\n")
        curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config openssl.cnf"
        self.openssl(
            f"req -x509 {curve} -keyout root.key -out root.pem -days 3650 -extensions root",
            "-subj", f"/CN={name} root",
        )  # fmt: skip
        self.openssl(f"req -new {curve} -keyout signer.key -out signer.csr", "-subj", f"/CN={name}")
        self.openssl(
            "x509 -req -in signer.csr -CA root.pem -CAkey root.key -set_serial 7 -days 3650 "
            "-extfile openssl.cnf -extensions signer -out signer.pem"
        )

    @property
    def root(self) -> Path:
        """The certificate to pin."""
        return self.folder / "root.pem"

    @property
    def pinned(self) -> Authority:
        return Authority.load(self.root)

    def openssl(self, words: str, *more: str) -> None:
        subprocess.run(
            ["openssl", *words.split(), *more], cwd=self.folder, check=True, capture_output=True
        )

    def reply(self, request: bytes) -> bytes:
        """The response to a request, in DER."""
        (self.folder / "request").write_bytes(request)
        self.openssl("ts -reply -config ts.cnf -queryfile request -out response")
        return (self.folder / "response").read_bytes()

    def stamp(self, document: Document) -> Document:
        """The same document, stamped now."""
        return document.with_timestamp(self.reply(make_request(document)))


def some_claim(
    *signers: Ed25519PrivateKey, commitment: str | None = None, model: str = "cd" * 32
) -> Claim:
    """A signed claim, of a commitment of its own by default."""
    digest = commitment or os.urandom(32).hex()
    claim = Claim.make_unsigned(Commitment(kind="C0", sha256=digest), "ACME Inc.", model, 4)
    for each in signers:
        claim = claim.with_signature(each)
    return claim


def write_keys(folder: Path, name: str) -> Ed25519PrivateKey:
    """A fresh private key, in NAME.pem, and its public part in NAME.pub."""
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(pem)
    (folder / f"{name}.pub").write_bytes(public)
    return private
