"""Streams and messages: known answers, independence of blocks, distributions, error correction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rfc8785
from keys import known_key
from numpy.typing import NDArray
from scipy import stats

from countermark.keys.key import KeyMaterial, digest_tensor
from countermark.keys.messages import (
    count_payload_bytes,
    decode_payload,
    derive_message,
    derive_payload,
)
from countermark.keys.streams import KeyStream, frame
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.schemes.uchida.scheme import Uchida

ROOT = Path(__file__).parents[2]
VECTORS: Mapping[str, Any] = json.loads((ROOT / "tests/vectors.json").read_text(encoding="utf-8"))
SECRET, C0 = bytes(range(32)), bytes(range(100, 132))


def stream(purpose: str = "test", tensor: str = "") -> KeyStream:
    return KeyStream(SECRET, C0, purpose, tensor)


# --- known answers; docs/format.md shows and proves the same ones


def test_the_page_shows_the_vectors_that_are_tested() -> None:
    page = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    shown = page.partition("vectors = ")[2].partition("\n```")[0]
    assert json.loads(shown) == VECTORS


def test_known_answers_of_a_key() -> None:
    key = known_key()
    assert key.material.secret.hex() == VECTORS["secret"]
    assert key.material.nonce.hex() == VECTORS["nonce"]
    assert key.commitment == VECTORS["C0"]
    assert np.packbits(key.message).tobytes().hex() == VECTORS["message"]
    assert derive_payload(key.c0, key.owner, 256).hex() == VECTORS["payload"]
    mask = np.arange(512, dtype=np.uint8) % 2
    assert digest_tensor("mask.fc.weight", mask).hex() == VECTORS["mask_digest"]
    assert replace(key, frozen={"mask.fc.weight": mask}).commitment == VECTORS["C0_with_mask"]


def test_known_answers_of_streams() -> None:
    key = known_key()
    rows = bytes.fromhex(VECTORS["rows"])
    assert key.make_stream("rows", "fc.weight").take(32) == rows
    first = next(Uchida(layer="fc.weight").generate_row_blocks(key))[0]
    assert first[:256].tolist() == [2 * int(bit) - 1 for byte in rows for bit in f"{byte:08b}"]
    normal = key.make_stream("rows", "fc.weight").draw_normal_rows(1, 4)[0]
    assert normal.tolist() == pytest.approx(VECTORS["normal"], rel=1e-12)
    assert key.make_stream("rows").draw_permutation(8).tolist() == VECTORS["permutation"]


def test_known_answers_of_triggers() -> None:
    triggers = {"triggers": np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)}
    key = Adi(10, 3).generate_key(
        triggers, owner="ACME Inc.", material=KeyMaterial.from_test_seed(1)
    )
    assert rfc8785.dumps(key.commitment_context).decode() == VECTORS["trigger_context"]
    assert key.material.draw_salts(1)[0].hex() == VECTORS["trigger_salt"]
    assert key.frozen["openings"].tobytes().hex() == VECTORS["trigger_root"]
    assert key.commitment == VECTORS["trigger_C0"]
    assert key.draw_labels(3, 10).tolist() == VECTORS["trigger_labels"]


def test_frame_cannot_be_read_in_two_ways() -> None:
    assert frame() == b""
    assert frame(b"a", b"") == b"\0" * 7 + b"\1a" + b"\0" * 8
    lists = [
        (b"ab", b"c"),
        (b"a", b"bc"),
        (b"abc",),
        (b"abc", b""),
        (b"", b"abc"),
        (frame(b"abc"),),
    ]
    assert len({frame(*parts) for parts in lists}) == len(lists)


# --- blocks


def test_reading_in_blocks_of_any_size_gives_the_same() -> None:
    whole, parts = stream().take(1000), stream()
    assert b"".join(parts.take(n) for n in (0, 1, 15, 16, 17, 951)) == whole
    words, bits = stream().take_words(125), stream().take_bits(8000)
    assert words.tolist() == [int.from_bytes(whole[i : i + 8], "big") for i in range(0, 1000, 8)]
    assert "".join(map(str, bits)) == "".join(f"{byte:08b}" for byte in whole)


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 64])
def test_rows_do_not_depend_on_the_height_of_a_block(width: int) -> None:
    for name in ("take_bit_rows", "draw_normal_rows"):
        whole, parts = getattr(stream(), name)(20, width), stream()
        pieces = [getattr(parts, name)(rows, width) for rows in (0, 1, 7, 12)]
        assert np.array_equal(np.concatenate(pieces), whole)
        assert whole.shape == (20, width)


@pytest.mark.parametrize("key_type", ["sign", "random", "direct", "diff"])
def test_a_scheme_reads_the_same_in_blocks(key_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Uchida.from_fields({"layer": "all", "bits": 128, "key_type": key_type})
    shapes = {"a": (4, 5, 7), "b": (9, 13)}
    key = scheme.generate_key(shapes, owner="A", material=KeyMaterial.from_test_seed(2))
    whole = list(scheme.generate_row_blocks(key))
    monkeypatch.setattr(scheme, "_BLOCK", 1000)
    blocks = list(scheme.generate_row_blocks(key))
    assert len(whole) == 1 < len(blocks)
    assert np.array_equal(np.concatenate(blocks), whole[0])


def test_each_row_starts_on_a_byte_and_bits_drop_the_rest_of_one() -> None:
    whole, parts = stream().take(6), stream()
    first, second = parts.take_bits(9), parts.take_bits(4)
    assert first.tolist() == [int(bit) for bit in f"{whole[0]:08b}{whole[1]:08b}"[:9]]
    assert second.tolist() == [int(bit) for bit in f"{whole[2]:08b}"[:4]]
    rows = stream().take_bit_rows(3, 10)
    assert rows[2].tolist() == [int(bit) for bit in f"{whole[4]:08b}{whole[5]:08b}"[:10]]


# --- distributions, with a fixed secret: these tests cannot fail by chance


def test_bits_are_uniform_and_serially_independent() -> None:
    taken = np.frombuffer(stream().take(1 << 20), dtype=np.uint8)
    assert stats.chisquare(np.bincount(taken, minlength=256)).pvalue > 0.001
    ones = int(stream().take_bits(1 << 20).sum())
    assert stats.binomtest(ones, 1 << 20).pvalue > 0.001
    pairs = taken[:-1].astype(np.int64) % 16 * 16 + taken[1:] % 16
    assert stats.chisquare(np.bincount(pairs, minlength=256)).pvalue > 0.001


def test_normal_rows_are_normal_and_uncorrelated() -> None:
    drawn = stream().draw_normal_rows(1000, 201)
    flat = drawn.reshape(-1)
    assert abs(flat.mean()) * np.sqrt(flat.size) < 4
    assert abs(flat.var() - 1) * np.sqrt(flat.size / 2) < 4
    assert stats.kstest(flat, "norm").pvalue > 0.001
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 4 / np.sqrt(1000)
    assert np.isfinite(flat).all()


def test_the_largest_and_smallest_words_give_finite_normals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for byte in (b"\0", b"\xff"):
        monkeypatch.setattr(KeyStream, "take", lambda _, count, byte=byte: byte * count)
        assert np.isfinite(stream().draw_normal_rows(1, 2)).all()


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_is_one(count: int) -> None:
    order = stream().draw_permutation(count)
    assert sorted(order.tolist()) == list(range(count))


def test_permutations_are_uniform() -> None:
    source = stream()
    seen = [tuple(source.draw_permutation(4).tolist()) for _ in range(4800)]
    counts = [seen.count(order) for order in set(seen)]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001


# --- message and payload


@pytest.mark.parametrize("bits", [128, 256, 257, 1000, 1024, 2040, 4096])
def test_payload_survives_as_many_wrong_bytes_as_promised_and_no_more(bits: int) -> None:
    sent = derive_message(SECRET, C0, "ACME Inc.", bits)
    stated = derive_payload(C0, "ACME Inc.", bits)
    assert len(stated) == count_payload_bytes(bits) == min(32, bits // 32)
    codeword = min(255, bits // 8)
    correctable = (codeword - len(stated)) // 2
    places = np.random.default_rng(bits).permutation(codeword)
    for wrong in {0, 1, correctable // 2, correctable}:
        assert decode_payload(damaged(sent, places[:wrong]), SECRET, C0) == stated
    assert decode_payload(damaged(sent, places[: correctable + 1]), SECRET, C0) != stated


def damaged(sent: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The bits with one bit wrong in each of the given bytes."""
    read = sent.copy()
    read[8 * places + places % 8] ^= 1
    return read


def test_below_128_bits_there_is_no_payload() -> None:
    assert count_payload_bytes(127) == 0
    assert derive_payload(C0, "A", 127) == b""
    assert decode_payload(derive_message(SECRET, C0, "A", 127), SECRET, C0) is None
    assert decode_payload(derive_message(SECRET, C0, "A", 1), SECRET, C0) is None
    pad = stream("message").take_bits(127)
    assert np.array_equal(derive_message(SECRET, C0, "A", 127), pad)


def test_random_bits_never_decode_to_the_payload_nor_stop_the_decoder() -> None:
    random = np.random.default_rng(1)
    stated = derive_payload(C0, "A", 256)
    for _ in range(300):
        read = random.integers(0, 2, 256, dtype=np.uint8)
        assert decode_payload(read, SECRET, C0) != stated


def test_raw_bits_are_uniform_over_keys() -> None:
    """Codeword and padding must not show: every position is a fair coin, neighbours are too."""
    drawn = np.array(
        [derive_message(i.to_bytes(32, "big"), C0, "the same owner", 256) for i in range(2000)]
    )
    ones = drawn.sum(axis=0)
    statistic = float(((ones - 1000) ** 2 / 500).sum())
    assert 0.001 < stats.chi2.sf(statistic, 256) < 0.999
    assert stats.binomtest(int(drawn.sum()), drawn.size).pvalue > 0.001
    unequal = int((drawn[:, 1:] != drawn[:, :-1]).sum())
    assert stats.binomtest(unequal, 2000 * 255).pvalue > 0.001
