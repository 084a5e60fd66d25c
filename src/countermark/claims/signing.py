"""Ed25519 keys and X.509 certificates as PEM files, of signers and of trusted authorities."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from countermark._internal import files
from countermark.errors import ClaimError, ConfigError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_LARGEST = 1 << 20  # bytes of a PEM file, which may come from anybody
_HOW = "`countermark claim keygen` and `openssl genpkey -algorithm ed25519` write new ones"


def compute_key_id(public: Ed25519PublicKey) -> str:
    """Return the name of a public key: its 32 bytes (RFC 8032) in hexadecimal."""
    return public.public_bytes_raw().hex()


def load_private_key(path: Path, passphrase: str | None = None) -> Ed25519PrivateKey:
    """Load a private key from a PEM file (PKCS #8).

    Raises:
        ClaimError: the file cannot be read or holds no Ed25519 key, or the passphrase is missing or
            wrong.
    """
    content = read_pem(path)
    try:
        key = load_pem_private_key(content, passphrase.encode() if passphrase else None)
    # cryptography raises TypeError for a passphrase that is missing or not needed.
    except TypeError:
        raise ClaimError(
            f"{path} is encrypted or is not, and the passphrase does not fit that: give it at the "
            "prompt of a terminal, or a file with it in COUNTERMARK_PASSPHRASE_FILE"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ClaimError(
            f"{path} holds no private key that opens: expected PEM and its passphrase; {_HOW}"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ClaimError(f"{path} holds another kind of key: expected Ed25519; {_HOW}")
    return key


def write_key_pair(path: Path, passphrase: str | None = None, *, for_files: bool = False) -> str:
    """Write a new key pair: `path`.pem (mode 0600, PKCS #8) and `path`.pub.

    Args:
        path: the path without suffix.
        passphrase: encrypts the private key, if given.
        for_files: make a key on P-256, which signs the model's file, instead of Ed25519.

    Returns:
        The key's name as `compute_key_id` gives it; for P-256 the SHA-256 of `path`.pub, by which OpenSSF
        signatures name a key.

    Raises:
        ConfigError: one of the two files already exists.
    """
    private = generate_private_key(SECP256R1()) if for_files else Ed25519PrivateKey.generate()
    cipher = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    secret, public = path.with_name(f"{path.name}.pem"), path.with_name(f"{path.name}.pub")
    # Checked before anything is written, so that no half of a new pair lies beside an old key.
    for each in (secret, public):
        if os.path.lexists(each):
            raise ConfigError(f"{each} exists, and a key is never overwritten: choose another name")
    files.write_secret(secret, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, cipher))
    # The SHA-256 of exactly these bytes is the name of a P-256 key.
    shown = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    files.write_bytes(public, shown)
    if isinstance(private, Ed25519PrivateKey):
        return compute_key_id(private.public_key())
    return hashlib.sha256(shown).hexdigest()


def is_encrypted(path: Path) -> bool:
    """Return true if a PEM file needs a passphrase."""
    # Both PEM forms say so in plain text: "BEGIN ENCRYPTED PRIVATE KEY" and "Proc-Type:
    # 4,ENCRYPTED".
    return b"ENCRYPTED" in read_pem(path)


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Load a public key from a PEM file.

    Raises:
        ClaimError: the file cannot be read or holds no Ed25519 public key.
    """
    try:
        key = load_pem_public_key(read_pem(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ClaimError(
            f"{path} holds no Ed25519 public key: expected PEM as `openssl pkey -pubout` writes it"
        )
    return key


def encode_pem(known: Ed25519PublicKey | Certificate) -> bytes:
    """Encode a public key or a certificate as PEM, and nothing else."""
    if isinstance(known, Ed25519PublicKey):
        return known.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return known.public_bytes(Encoding.PEM)


def load_certificates(path: Path) -> list[Certificate]:
    """Load one or more X.509 certificates from a PEM file.

    Raises:
        ClaimError: the file cannot be read or holds no certificate.
    """
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(read_pem(path))
    except (ValueError, UnsupportedAlgorithm):
        raise ClaimError(f"{path} holds no certificate: expected PEM of a time-stamping authority "
                         "with its root") from None  # fmt: skip


def is_valid_signature(public: str, signature: bytes, message: bytes) -> bool:
    """Return true if a signature over a message is valid.

    Args:
        public: the public key in hexadecimal, as `compute_key_id` names it.
        signature: the Ed25519 signature, 64 bytes.
        message: the signed bytes.
    """
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, message)
    # ValueError: the name is not the encoding of 32 bytes.
    except (InvalidSignature, ValueError):
        return False
    return True


def require_threshold(least: int, of: Sequence[object], what: str) -> None:
    """Raise `ConfigError` unless 1 ≤ `least` ≤ the number of keys, authorities or checks."""
    if not 1 <= least <= len(of):
        raise ConfigError(f"{least} of {len(of)} {what}: expected at least 1, and so many of them")


def read_pem(path: Path) -> bytes:
    """Read the content of a PEM file.

    Raises:
        ClaimError: the file cannot be read, or is too large for PEM.
    """
    try:
        return files.read_regular(path, _LARGEST)
    except ValueError as error:
        raise ClaimError(f"{path}: {error}; expected a PEM file") from None
