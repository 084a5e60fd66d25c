"""The owner's secret key, and the commitment that fixes everything before the message is drawn.

    C0 = SHA-256(frame("countermark/C0/v1", context, SHA-256(secret), frozen, owner, nonce))

`commitment_context` is the canonical JSON of the scheme, all its fields, the tensors that it reads with their
shapes, and the test flag. `frozen` holds the digests of all tensors that are fixed before the
message is drawn. Key rows and message are expanded from (secret, C0). Nobody can therefore fit them
to a victim's model: one changed field redraws every bit. A reader that is trained on the message is
fixed afterwards, by

    C1 = SHA-256(frame("countermark/C1/v1", C0, learnt))

`learnt` holds the digests of the reader and of everything that was measured with it. Both
commitments follow from digests, so that a third party who is shown the digests can check a
commitment without the secret. The module `keys.storage` stores keys on disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rfc8785
from numpy.typing import NDArray

from countermark.errors import ConfigError
from countermark.keys.messages import (
    Bits,
    count_payload_bytes,
    decode_payload,
    derive_message,
    derive_payload,
    draw_trigger_labels,
)
from countermark.keys.streams import KeyStream, frame

SECRET_BYTES, NONCE_BYTES, SALT_BYTES = 32, 16, 32
REFERENCE = "reference"
"""Name of the pre-commit tensor that commits to the whole model before the mark."""
OPENINGS = "openings"
"""Name of the frozen tensor against which a part of a key is opened; its digest stands first."""


@dataclass(frozen=True)
class KeyMaterial:
    """The random part of a key: a secret (32 bytes) and a nonce (16 bytes).

    `repr` shows neither of them. Real keys draw both from the operating system. Benchmarks and
    tests derive both from a number, which anybody can repeat: such a key is flagged as a test key
    and never yields *owned* outside experiments.
    """

    secret: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    # Part of `Key.commitment_context`, hence of C0: nobody can pass a test key off as a real one later.
    test_key: bool = False

    @classmethod
    def generate(cls) -> KeyMaterial:
        """Draw a secret and a nonce from the operating system."""
        return cls(os.urandom(SECRET_BYTES), os.urandom(NONCE_BYTES))

    @classmethod
    def from_test_seed(cls, seed: int) -> KeyMaterial:
        """Derive a secret and a nonce from a number, for benchmarks and tests."""
        # The test prefix keeps these secrets apart from every other use of SHAKE-256 in a key.
        drawn = hashlib.shake_256(frame(b"countermark/test-key/v1", str(seed).encode())).digest(48)
        return cls(drawn[:SECRET_BYTES], drawn[SECRET_BYTES:], test_key=True)

    def make_stream(self, purpose: str) -> KeyStream:
        """Return the random stream for values that are made before the commitment and enter it.

        Args:
            purpose: name of the stream; streams of different names are independent.
        """
        return KeyStream(self.secret, self.nonce, purpose)

    def draw_salts(self, count: int) -> list[bytes]:
        """Draw the salts of `count` triggers, 32 bytes each.

        A salt hides its trigger in the key's tree, and draws the trigger's label.
        """
        drawn = self.make_stream("salts").take(SALT_BYTES * count)
        return [drawn[at : at + SALT_BYTES] for at in range(0, len(drawn), SALT_BYTES)]


@dataclass(frozen=True)
class Key:
    """An owner's key to one mark.

    Attributes:
        scheme: name of the scheme.
        fields: all fields of the scheme, as JSON values; `bits` is the message length T.
        tensors: name and shape of each tensor that is read; their order is the reading order.
        owner: the owner's name, which the payload is a digest of.
        material: secret and nonce.
        frozen: tensors fixed before the message was drawn (a selection mask, …).
        learnt: tensors trained on the message or measured with it (a reader, …); empty for linear
            keys.
        model, model_arguments: how the command line built the marked model, if it did.
        trusted: the module:factory that reading may run. It is never stored, so that a key from a
            folder runs no code until its holder names the code again.
    """

    scheme: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    owner: str
    material: KeyMaterial = field(repr=False)
    frozen: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)
    learnt: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)
    model: str | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    trusted: str | None = field(default=None, compare=False)

    @property
    def bits(self) -> int:
        """T, the number of raw message bits."""
        return int(self.fields["bits"])

    @property
    def test_key(self) -> bool:
        """True if the secret was derived from a number, so that the key proves nothing."""
        return self.material.test_key

    @property
    def commitment_context(self) -> dict[str, Any]:
        """The part of C0 that is no secret, as JSON values: scheme, fields, tensors, test flag."""
        return {
            "scheme": self.scheme,
            "fields": dict(self.fields),
            "tensors": [[name, list(shape)] for name, shape in self.tensors.items()],
            "test_key": self.test_key,
        }

    @cached_property
    def c0(self) -> bytes:
        """C0, the 32-byte commitment to everything that is fixed before the message is drawn.

        Raises:
            ConfigError: a field has no canonical JSON (RFC 8785).
        """
        return compute_c0(
            self.commitment_context,
            digest_tensors(self.frozen),
            # Only the digest of the secret enters C0, so that C0 can be checked without the secret.
            secret=hashlib.sha256(self.material.secret).digest(),
            owner=self.owner,
            nonce=self.material.nonce,
        )

    @cached_property
    def c1(self) -> bytes | None:
        """C1, the 32-byte commitment to C0 and the learnt tensors; None if nothing was learnt."""
        return compute_c1(self.c0, digest_tensors(self.learnt)) if self.learnt else None

    @property
    def commitment(self) -> str:
        """C1 if the key has one, else C0, in hexadecimal; reveals nothing of the secret."""
        return (self.c1 or self.c0).hex()

    def make_stream(self, purpose: str, tensor: str = "") -> KeyStream:
        """Return the key's random stream for one purpose and one tensor."""
        return KeyStream(self.material.secret, self.c0, purpose, tensor)

    @cached_property
    def message(self) -> Bits:
        """The raw message bits (T,)."""
        return derive_message(self.material.secret, self.c0, self.owner, self.bits)

    def draw_labels(self, count: int, classes: int) -> NDArray[np.int64]:
        """Draw the labels (count,) of the key's triggers, each uniform over 0 … classes − 1.

        Args:
            count: number of triggers.
            classes: number of classes of the model.
        """
        return draw_trigger_labels(self.material.draw_salts(count), self.c0, classes)

    def check_payload(self, read: Bits) -> bool | None:
        """Return whether raw bits decode to this key's payload.

        Args:
            read: raw bits (T,), as they were read out of a suspect.

        Returns: None if T is too short for a payload.
        """
        if not count_payload_bytes(self.bits):
            return None
        decoded = decode_payload(read, self.material.secret, self.c0)
        return decoded == derive_payload(self.c0, self.owner, self.bits)

    def with_model(self, name: str, arguments: Mapping[str, Any]) -> Key:
        """Return a copy that also records how the command line built the marked model.

        Args:
            name: name of the built-in model, or its module:factory.
            arguments: the arguments that the model was built with.
        """
        return replace(self, model=name, model_arguments=dict(arguments))

    def with_trusted_code(self, code: str | None) -> Key:
        """Return a copy whose reader may run this module:factory; None allows no code."""
        # Not part of C0: trust is a decision of whoever reads the key, not a property of the key.
        return replace(self, trusted=code)

    def save(self, path: str | Path, passphrase: str | None = None) -> None:
        """Write the key to a new folder; see `storage.save_key`."""
        # Imported here because `storage` imports `Key` from this module.
        from countermark.keys.storage import save_key

        save_key(self, Path(path), passphrase)

    @staticmethod
    def load(path: str | Path, passphrase: str | None = None) -> Key:
        """Read a key folder; see `storage.load_key`."""
        from countermark.keys.storage import load_key

        return load_key(Path(path), passphrase)


def compute_c0(
    context: Mapping[str, Any], frozen: Sequence[bytes], *, secret: bytes, owner: str, nonce: bytes
) -> bytes:
    """Compute the commitment C0 (32 bytes) of a key, from values that may be shown to others.

    Args:
        context: as `Key.commitment_context`.
        frozen: digests of the frozen tensors, in the order in which a key lists them.
        secret: SHA-256 of the secret.
        owner: the owner's name.
        nonce: 16 bytes.

    Raises:
        ConfigError: a value of the context has no canonical JSON (RFC 8785).
    """
    try:
        # RFC 8785 fixes the order of names and the form of numbers: one context has one encoding.
        canonical = rfc8785.dumps(dict(context))
    except rfc8785.CanonicalizationError as error:
        raise ConfigError(
            f"a field of the scheme cannot be committed to ({error}): "
            "expected finite numbers, and whole numbers below 2^53"
        ) from None
    parts = (canonical, secret, frame(*frozen), owner.encode(), nonce)
    return hashlib.sha256(frame(b"countermark/C0/v1", *parts)).digest()


def compute_c1(c0: bytes, learnt: Sequence[bytes]) -> bytes:
    """Compute C1 (32 bytes) from C0 and the ordered digests of the learnt tensors."""
    return hashlib.sha256(frame(b"countermark/C1/v1", c0, frame(*learnt))).digest()


def digest_tensors(tensors: Mapping[str, NDArray[Any]]) -> list[bytes]:
    """Return the digests of named tensors, in the order of their names, but `OPENINGS` first.

    A digest does not show the name that went into it. Because the place of `OPENINGS` is fixed,
    nobody can commit to several trigger trees and later show the one that suits them.
    """
    names = sorted(tensors, key=lambda name: (name != OPENINGS, name))
    return [digest_tensor(name, tensors[name]) for name in names]


def digest_tensor(name: str, tensor: NDArray[Any]) -> bytes:
    """Compute SHA-256 over a tensor's name, dtype, shape and little-endian bytes in C order."""
    # Byte order and memory layout depend on the machine, and a digest must not. The shape is taken
    # from `tensor`, as numpy's `ascontiguousarray` turns a scalar into an array of one axis.
    ordered = np.ascontiguousarray(tensor)
    ordered = ordered.astype(ordered.dtype.newbyteorder("<"), copy=False)
    about = f"{ordered.dtype.name} {list(tensor.shape)}"
    return hashlib.sha256(frame(name.encode(), about.encode(), ordered.tobytes())).digest()
