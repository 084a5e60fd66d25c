"""OpenSSF model signing: the released file signed in a form that other tools can check.

A claim names the model's tensors, whatever file holds them; an OpenSSF signature is over the bytes
of the file. The package `model-signing` makes and checks it, with keys on NIST curves, not Ed25519.
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

from countermark._internal import files
from countermark._internal.output_paths import require_free_path
from countermark.claims import signing
from countermark.claims.decision import Decision, Finding, PolicyCase
from countermark.errors import ClaimError, MissingExtraError, SuspectError, make_printable

# The curves that model-signing accepts.
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_LARGEST = 1 << 20  # bytes of a signature
_HOW = "`countermark claim keygen NAME --for-files` writes a new one"


def sign_model(model: Path, private: Path, out: Path, *, passphrase: str | None = None) -> None:
    """Sign a model's file.

    Args:
        model: a regular file.
        private: a private key on P-256, P-384 or P-521, as PEM.
        out: the signature to write, a Sigstore bundle.
        passphrase: the passphrase of an encrypted private key.

    Raises:
        ConfigError: a file with the name of the signature already exists.
        ClaimError: the key is of another kind, or the passphrase does not open it.
        SuspectError: there is no such model file.
        MissingExtraError: model-signing is not installed.
    """
    config = _load_library()[0].Config()
    # `files.replace_file` below would overwrite an existing signature.
    require_free_path(out)
    if not model.is_file():
        raise SuspectError(f"{model} is no file: a folder is signed by `model_signing` itself")
    secret = passphrase.encode() if passphrase else None
    # Checked before the library reads the key, so that a wrong key is a `ClaimError`.
    _require_curve(private, load_pem_private_key, secret)
    config.use_elliptic_key_signer(private_key=private, password=secret)
    with files.replace_file(out) as temporary:
        config.sign(model.resolve(), temporary)  # the library refuses links


@dataclass(frozen=True)
class ModelSignedBy:
    """A check that the model's file is signed by a pinned key.

    Attributes:
        model: the file; the check `ModelCheck` makes sure that the claim is about it.
        signature: the signature, as `sign_model` or `model_signing` writes it.
        public: the pinned public key, as PEM.
    """

    model: Path
    signature: Path
    public: Path

    def judge(self, case: PolicyCase) -> Decision:  # noqa: ARG002 - the check is about the file
        """Decide whether the pinned key has signed the model file, in a finding.

        Raises:
            ClaimError: the signature or the public key cannot be parsed.
            MissingExtraError: model-signing is not installed.
        """
        config = _load_library()[1].Config()
        _require_curve(self.public, load_pem_public_key)
        try:
            # The signature is a hostile file: bound its size before the library reads it.
            files.parse_json(files.read_regular(self.signature, _LARGEST))
        except ValueError as error:
            raise ClaimError(
                f"{self.signature}: {make_printable(str(error), 200)}; expected an OpenSSF model "
                "signature"
            ) from None
        why = _explain_refusal(config, self)
        reason = why or f"{self.model} is as the key in {self.public} signed it"
        return Decision((Finding("model signed by", not why, reason),))


def _explain_refusal(config: Any, asked: ModelSignedBy) -> str:
    """Return why a signature is not accepted; empty if it is accepted."""
    try:
        with redirect_stdout(io.StringIO()):  # the library prints remarks on older signatures
            config.use_elliptic_key_verifier(public_key=asked.public)
            config.verify(asked.model.resolve(), asked.signature)
    except InvalidSignature:
        return "the signature is not by this key, or was changed"
    except Exception as error:  # a hostile signature can make it raise anything
        # The library has no exception class of its own for a file that differs.
        if str(error).startswith("Signature mismatch"):
            return f"{asked.model} is another file than the one that was signed"
        return f"it is no signature by this key over this file ({type(error).__name__}: {error})"
    return ""


def _require_curve(path: Path, load: Any, *secret: bytes | None) -> None:
    """Raise `ClaimError` unless a PEM file holds a key on one of the accepted curves."""
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


def _load_library() -> tuple[Any, Any]:
    """Import model-signing's modules for signing and for verifying."""
    try:
        from model_signing import signing as makes
        from model_signing import verifying as checks
    except ImportError:
        raise MissingExtraError("OpenSSF model signing", "evidence") from None
    return makes, checks
