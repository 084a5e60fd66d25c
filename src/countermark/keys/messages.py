"""The message: the bits that a mark carries, and the payload that error correction finds in them.

    raw message = codeword(payload), zero-filled to T bits, XOR XOF(secret, C0, "message")
    payload     = the first ⌊T/4⌋ bits (whole bytes, at most 32) of SHA-256(C0 ‖ owner)

The pad makes the T raw bits uniform and independent of the code, so that the p-value is computed on
raw bits. The payload is a second statement, made after decoding. A message below 128 bits carries
no payload.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from reedsolo import ReedSolomonError, RSCodec

from countermark.keys.streams import KeyStream

Bits = NDArray[np.uint8]
"""Bits as an array (T,) of 0 and 1."""

LEAST_BITS_FOR_PAYLOAD = 128
_LONGEST_CODEWORD = 255  # bytes, a Reed-Solomon code over GF(256)


def count_payload_bytes(bits: int) -> int:
    """Return how many payload bytes a message of `bits` raw bits carries; 0 below 128 bits."""
    return 0 if bits < LEAST_BITS_FOR_PAYLOAD else min(32, bits // 32)


def derive_payload(commitment: bytes, owner: str, bits: int) -> bytes:
    """Compute the payload of a message of `bits` raw bits: a digest that names the owner."""
    return hashlib.sha256(commitment + owner.encode()).digest()[: count_payload_bytes(bits)]


def derive_message(secret: bytes, commitment: bytes, owner: str, bits: int) -> Bits:
    """Derive the raw message bits (bits,) of a key.

    Args:
        secret: the key's secret.
        commitment: C0 of the key.
        owner: the owner's name.
        bits: T, the message length.
    """
    # Bits behind the codeword stay zero and become pad alone: they count for p all the same.
    codeword = np.zeros(bits, dtype=np.uint8)
    if count_payload_bytes(bits):
        coded = bytes(_make_code(bits).encode(derive_payload(commitment, owner, bits)))
        codeword[: 8 * len(coded)] = np.unpackbits(np.frombuffer(coded, dtype=np.uint8))
    return codeword ^ _derive_pad(secret, commitment, bits)


def decode_payload(read: Bits, secret: bytes, commitment: bytes) -> bytes | None:
    """Decode the payload out of raw bits that were read from a suspect.

    Corrects up to ⌊(codeword − payload) / 2⌋ wrong bytes, wherever they lie.

    Args:
        read: raw bits (T,).
        secret: the key's secret.
        commitment: C0 of the key.

    Returns: the payload; None if T is too short for one, or too many bytes are wrong.
    """
    if not count_payload_bytes(len(read)):
        return None
    unpadded = read.astype(np.uint8) ^ _derive_pad(secret, commitment, len(read))
    coded = np.packbits(unpadded[: 8 * _count_codeword_bytes(len(read))]).tobytes()
    try:
        return bytes(_make_code(len(read)).decode(coded)[0])
    except ReedSolomonError:
        return None


def draw_trigger_labels(
    salts: Sequence[bytes], commitment: bytes, classes: int
) -> NDArray[np.int64]:
    """Draw the labels (n,) of n triggers, each uniform over 0 … classes − 1.

    Each label is drawn by its own salt: a third party who is shown some of the salts learns nothing
    about the other triggers' labels.

    Args:
        salts: one for each trigger, 32 bytes, from the key's material.
        commitment: C0, which binds the salts and the triggers.
        classes: C, the number of classes.
    """
    return np.array([_draw_label(salt, commitment, classes) for salt in salts], dtype=np.int64)


def _draw_label(salt: bytes, commitment: bytes, classes: int) -> int:
    """Draw one label: the first word of a stream below the last multiple of C, modulo C."""
    stream, end = KeyStream(salt, commitment, "label"), (1 << 64) // classes * classes
    # Words at or above `end` are thrown away: modulo C they would favour the small labels.
    while (word := int.from_bytes(stream.take(8), "big")) >= end:
        pass
    return word % classes


def _derive_pad(secret: bytes, commitment: bytes, bits: int) -> Bits:
    """Expand the pad (bits,) that hides the codeword."""
    return KeyStream(secret, commitment, "message").take_bits(bits)


def _count_codeword_bytes(bits: int) -> int:
    """Return the length in bytes of the codeword in a message of `bits` raw bits."""
    return min(_LONGEST_CODEWORD, bits // 8)


@lru_cache(maxsize=8)
def _make_code(bits: int) -> RSCodec:
    """Return the Reed-Solomon code of a message of `bits` raw bits."""
    # All bytes beyond the payload are parity, three quarters of the codeword.
    return RSCodec(_count_codeword_bytes(bits) - count_payload_bytes(bits))
