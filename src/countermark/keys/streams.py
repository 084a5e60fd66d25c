"""Keyed streams: every random value of a key is expanded here from the key's secret.

    subkey = SHAKE-256(frame("countermark/xof/v1", secret, commitment, purpose, tensor))[:32]
    stream = AES-256-CTR(subkey, counter from 0) over zero bytes

Streams of different purposes or tensor names are independent of each other. One changed byte of the
commitment redraws a stream completely. `docs/format.md` has the byte orders and known-answer
vectors.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_BLOCK_BYTES = 16  # of AES


def frame(*parts: bytes) -> bytes:
    """Join byte strings so that no two lists of byte strings give the same result.

    frame(a, b, …) = len(a) ‖ a ‖ len(b) ‖ b ‖ …, each length 8 bytes, big-endian.
    """
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


class KeyStream:
    """The expansion of one secret for one purpose, read from front to back.

    Args:
        secret: the secret to expand.
        commitment: bytes that the stream depends on besides the secret, mostly C0 of a key.
        purpose: name of the stream.
        tensor: name of the tensor that the values are for, if any.
    """

    def __init__(self, secret: bytes, commitment: bytes, purpose: str, tensor: str = "") -> None:
        parts = (b"countermark/xof/v1", secret, commitment, purpose.encode(), tensor.encode())
        self._subkey = hashlib.shake_256(frame(*parts)).digest(32)
        self._at = 0
        self._seek()

    def _seek(self) -> None:
        """Restart the cipher at the byte `_at`: block n is encrypted from the counter n."""
        block, within = divmod(self._at, _BLOCK_BYTES)
        # Counter mode can start at any block, so skipping gigabytes costs no more than one block.
        counter = modes.CTR(block.to_bytes(_BLOCK_BYTES, "big"))
        self._cipher = Cipher(algorithms.AES256(self._subkey), counter).encryptor()
        self._cipher.update(bytes(within))

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        self._at += count
        return self._cipher.update(bytes(count))

    def skip(self, count: int) -> None:
        """Skip the next `count` bytes without computing them."""
        self._at += count
        self._seek()

    def take_bits(self, count: int) -> NDArray[np.uint8]:
        """Return the next `count` bits (count,), 0 or 1, most significant bit of each byte first.

        Whole bytes are consumed: the unused bits of the last byte are dropped.
        """
        taken = np.frombuffer(self.take(-(-count // 8)), dtype=np.uint8)
        return np.unpackbits(taken, count=count)

    def take_words(self, count: int) -> NDArray[np.uint64]:
        """Return the next `count` big-endian 64-bit words (count,)."""
        return np.frombuffer(self.take(8 * count), dtype=">u8").astype(np.uint64)

    def take_bit_rows(self, rows: int, width: int) -> NDArray[np.uint8]:
        """Return the next bits as (rows, width); each row starts on a new byte."""
        size = -(-width // 8)
        taken = np.frombuffer(self.take(rows * size), dtype=np.uint8).reshape(rows, size)
        return np.unpackbits(taken, axis=1, count=width)  # (rows, width)

    def draw_normal_rows(self, rows: int, width: int) -> NDArray[np.float64]:
        """Draw values (rows, width) from N(0, 1), by Box and Muller; each row has pairs of its own.

        A pair is two words; the upper 53 bits of each, plus ½, over 2⁵³ are uniform in (0, 1].
        """
        pairs = -(-width // 2)
        # A double holds 53 bits exactly. The ½ keeps zero out of the logarithm below.
        words = self.take_words(2 * rows * pairs) >> np.uint64(11)
        uniform = ((words.astype(np.float64) + 0.5) / 2.0**53).reshape(rows, pairs, 2)
        radius, angle = np.sqrt(-2 * np.log(uniform[..., 0])), 2 * np.pi * uniform[..., 1]
        both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
        return both.reshape(rows, 2 * pairs)[:, :width]  # (rows, width)

    def draw_permutation(self, count: int) -> NDArray[np.int64]:
        """Draw a permutation (count,) of 0 … count−1: the stable order of `count` words."""
        # Stable, so that equal words give the same permutation with every version of numpy.
        return np.argsort(self.take_words(count), kind="stable").astype(np.int64)
