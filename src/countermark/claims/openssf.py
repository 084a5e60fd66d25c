"""OpenSSF model signing: the released file signed in a form that other tools check as well.

A claim names the model's tensors, whatever file they lie in; such a signature is over the bytes of
the file. The package `model-signing` makes and checks it, with keys on NIST curves, not Ed25519.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from countermark import files
from countermark.claims import signing
from countermark.claims.decision import Case, Decision, Finding
from countermark.errors import ClaimError, MissingExtraError, SuspectError, printable
from countermark.places import require_free

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_LARGEST = 1 << 20  # bytes of a signature
_HOW = "`countermark claim keygen NAME --for-files` writes a new one"


def sign_model(model: Path, private: Path, out: Path, *, passphrase: str | None = None) -> None:
    """Sign a model's file.

    Args:
        model: a regular file.
        private: a private key on P-256, P-384 or P-521, PEM.
        out: the signature to write, a Sigstore bundle.
        passphrase: of the private key, where it is encrypted.

    Raises:
        ConfigError: something has the name of the signature already.
        ClaimError: the key is of another kind, or does not open.
        SuspectError: there is no such model.
        MissingExtraError: model-signing is not installed.
    """
    config = _library()[0].Config()
    require_free(out)
    if not model.is_file():
        raise SuspectError(f"{model} is no file: a folder is signed by `model_signing` itself")
    secret = passphrase.encode() if passphrase else None
    _require_curve(private, load_pem_private_key, secret)
    config.use_elliptic_key_signer(private_key=private, password=secret)
    with files.replacing(out) as temporary:
        config.sign(model.resolve(), temporary)  # it refuses links, which caches are full of


@dataclass(frozen=True)
class ModelSignedBy:
    """The model's file is signed by this key.

    Attributes:
        model: the file; `OfModel` says that the claim is about it.
        signature: as `sign_model` or `model_signing` writes it.
        public: the pinned public key, PEM.
    """

    model: Path
    signature: Path
    public: Path

    def judge(self, case: Case) -> Decision:  # noqa: ARG002 - it is about the file
        """Whether the signature is by that key over that file.

        Raises:
            ClaimError: the signature or the public key is no file of its kind.
            MissingExtraError: model-signing is not installed.
        """
        config = _library()[1].Config()
        _require_curve(self.public, load_pem_public_key)
        try:
            files.parse_json(files.read_regular(self.signature, _LARGEST))
        except ValueError as error:
            raise ClaimError(
                f"{self.signature}: {printable(str(error), 200)}; expected an OpenSSF model "
                "signature"
            ) from None
        why = _refusal(config, self)
        reason = why or f"{self.model} is as the key in {self.public} signed it"
        return Decision((Finding("model signed by", not why, reason),))


def _refusal(config: Any, asked: ModelSignedBy) -> str:
    """Why a signature is not accepted; empty where it is."""
    try:
        with redirect_stdout(io.StringIO()):  # it prints what it thinks of older signatures
            config.use_elliptic_key_verifier(public_key=asked.public)
            config.verify(asked.model.resolve(), asked.signature)
    except InvalidSignature:
        return "the signature is not by this key, or was changed"
    except Exception as error:  # what a hostile signature makes the library raise is not fixed
        if str(error).startswith("Signature mismatch"):
            return f"{asked.model} is another file than the one that was signed"
        return f"it is no signature by this key over this file ({type(error).__name__}: {error})"
    return ""


def _require_curve(path: Path, load: Any, *secret: bytes | None) -> None:
    """Raise `ClaimError` unless a PEM file holds a key that OpenSSF signatures are made with."""
    try:
        key = load(signing.read_pem(path), *secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ClaimError(
            f"{path} holds no key that opens: expected one on {', '.join(_CURVES)} and its "
            f"passphrase; {_HOW}"
        ) from None
    known = isinstance(key, EllipticCurvePrivateKey | EllipticCurvePublicKey)
    if not known or key.curve.name not in _CURVES:
        raise ClaimError(
            f"{path} holds another kind of key: expected one on {', '.join(_CURVES)}; {_HOW}"
        )


def _library() -> tuple[Any, Any]:
    """The modules that sign and verify."""
    try:
        from model_signing import signing as makes
        from model_signing import verifying as checks
    except ImportError:
        raise MissingExtraError("OpenSSF model signing", "evidence") from None
    return makes, checks
