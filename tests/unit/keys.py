"""Keys, suspects and damage for the tests of this folder, and what an error must look like."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from countermark.checkpoints import TensorInfo, Weights
from countermark.errors import CountermarkError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.uchida.scheme import Uchida

SHAPE = (16, 32)


def known_key() -> Key:
    """The key of docs/format.md: 256 bits in one tensor of 512 weights, of an earlier version."""
    key = Uchida(layer="fc.weight", bits=256, reading="plain").generate_key(
        {"fc.weight": SHAPE}, owner="ACME Inc.", material=KeyMaterial.from_test_seed(1)
    )
    return replace(key, fields={n: each for n, each in key.fields.items() if n != "reading"})


def one_line(error: CountermarkError) -> str:
    """The message of an error, which must be one printable line of a readable length."""
    said = str(error)
    assert said, "an error without words"
    assert said.isprintable(), said
    assert len(said) <= 2000
    return said


class InMemory(Weights):
    """Weights out of a dictionary."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        super().__init__("in memory")
        self.values = tensors
        self.tensors = {name: TensorInfo(each.shape, "F32") for name, each in tensors.items()}

    def _load(self, name: str) -> NDArray[Any]:
        return self.values[name]

    def read_pieces(self, name: str) -> Iterator[bytes]:
        yield self.values[name].tobytes()

    def compute_file_digest(self) -> None:
        """There is no file."""

    def close(self) -> None:
        """Nothing was opened."""


def mutated(content: bytes, drawn: random.Random, changes: int) -> bytes:
    """The content after some random edits, of which many leave JSON that still parses."""
    damaged = bytearray(content)
    for _ in range(changes):
        at, size = drawn.randrange(len(damaged)), drawn.randrange(1, 9)
        match drawn.randrange(5):
            case 0:
                damaged[at] ^= 1 << drawn.randrange(8)
            case 1:
                damaged[at] = drawn.choice(b'"{}[],:0123456789nulltruefalse\\-')
            case 2:
                del damaged[at : at + size]
            case 3:
                damaged[at:at] = damaged[at // 2 : at // 2 + size]
            case _:
                damaged[at : at + 1] = drawn.randbytes(size)
        damaged = damaged or bytearray(b" ")
    return bytes(damaged)
