"""GGUF files as suspects: every type against llama.cpp's own decoder, names, and hostile headers."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from keys import one_line
from safetensors.numpy import save_file

from countermark.checkpoints import (
    CachedWeights,
    GgufWeights,
    compute_model_digest,
    load_state,
    open_weights,
)
from countermark.errors import SuspectError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.stamp.scheme import Stamp
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.verify import verify
from gguf_files import FORMS, encode, pair_rows, write_gguf, write_llama

WIDTH, HEADS, PAIRS, HIDDEN, LAYERS, WORDS = 256, 4, 2, 512, 2, 300
SECRET = KeyMaterial(bytes(range(32)), bytes(16))


def llama_tensors(seed: int = 1) -> dict[str, Any]:
    """The weights of a Llama whose rows hold whole blocks of every type."""
    drawn = np.random.default_rng(seed)
    half = WIDTH * PAIRS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for part, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (half, WIDTH),
            "self_attn.v_proj": (half, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN), "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }.items():  # fmt: skip
            shapes[f"{at}.{part}.weight"] = shape
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}
    return {
        name: drawn.normal(float(len(shape) == 1), 0.02, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@dataclass(frozen=True)
class Marked:
    """A marked model with its key, and the model from before."""

    key: Path
    before: dict[str, Any]
    after: dict[str, Any]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Marked:
    folder = tmp_path_factory.mktemp("marked")
    before = llama_tensors()
    save_file(before, folder / "m.safetensors")
    places = StampPaths(folder / "marked.safetensors", folder / "a.key")
    layers = [name for name in before if "layers" in name and before[name].ndim > 1]
    fields = {"bits": 256, "margin": 4.0, "layer": layers}
    stamp(folder / "m.safetensors", places, owner="ACME", fields=fields, material=SECRET)
    with open_weights(places.out) as weights:
        after = {name: weights.read(name) for name in weights.tensors}
    return Marked(places.key, before, after)


@pytest.mark.parametrize("form", FORMS)
def test_every_type_is_decoded_as_llama_cpp_decodes_it(tmp_path: Path, form: str) -> None:
    values = np.random.default_rng(3).normal(0, 0.02, (6, 512)).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_v.weight": values}, form=form)
    (stored,) = gguf.GGUFReader(path).tensors
    expected = stored.data
    if form != "F64":
        expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    name = "model.layers.0.self_attn.v_proj.weight"
    with GgufWeights(path) as weights:
        read = weights.read(name)
        assert weights.tensors[name].shape == read.shape == (6, 512)
        assert np.array_equal(read, expected.reshape(read.shape))
        # The encoders of the tests are near to the values, so the decoder was tried on real blocks.
        assert np.corrcoef(read.reshape(-1), values.reshape(-1))[0, 1] > 0.94
        for start, count in ((0, 1), (255, 2), (517, 700), (3071, 1)):
            part = weights.read_part(name, start, count)
            assert np.array_equal(part, read.reshape(-1)[start : start + count])


@pytest.mark.parametrize("form", FORMS)
def test_a_mark_is_found_in_every_type(tmp_path: Path, marked: Marked, form: str) -> None:
    counts = {"heads": HEADS, "pairs": PAIRS}
    path = write_llama(tmp_path / "m.gguf", marked.after, form=form, **counts)
    found = verify(path, Key.load(marked.key))
    assert (found.outcome, found.matched, found.test_count) == ("owned", 256, 1)
    plain = write_llama(tmp_path / "plain.gguf", marked.before, form=form, **counts)
    assert verify(plain, Key.load(marked.key)).outcome == "not_proven"


def test_an_unmarked_file_reads_as_chance(tmp_path: Path, marked: Marked) -> None:
    path = write_llama(tmp_path / "m.gguf", marked.before, form="Q4_K", heads=HEADS, pairs=PAIRS)
    layers = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")
    scheme = Stamp(layers, 256)
    counts = []
    with CachedWeights(open_weights(path)) as weights:
        shapes = {name: weights.tensors[name].shape for name in layers}
        for number in range(400):
            material = KeyMaterial.from_test_seed(number)
            key = scheme.generate_key(shapes, owner="ACME", material=material)
            where = {name: name for name in layers}
            reading = scheme.extract(scheme.read_suspect_tensors(weights, where, key), key)
            counts.append(reading.match_count)
    # Binomial with n = 256 and p = 1/2: mean 128 and variance 64, within four standard errors.
    assert abs(np.mean(counts) - 128) < 4 * 8 / 20
    assert abs(np.var(counts) - 64) < 4 * 64 * (2 / 400) ** 0.5


def test_names_and_rows_are_those_of_transformers(tmp_path: Path) -> None:
    before = llama_tensors()
    path = write_llama(tmp_path / "m.gguf", before, form="F32", heads=HEADS, pairs=PAIRS)
    save_file(before, tmp_path / "m.safetensors")
    with open_weights(path) as weights, open_weights(tmp_path / "m.safetensors") as other:
        assert isinstance(weights, GgufWeights)
        assert dict(weights.tensors) == dict(other.tensors)
        assert all(np.array_equal(weights.read(name), other.read(name)) for name in before)
        assert compute_model_digest(weights) == compute_model_digest(other)
        assert weights.digests.keys() == before.keys() | {"__metadata__"}
        assert len(weights.compute_file_digest()) == 64
    assert load_state(path).keys() == before.keys()


def test_only_the_needed_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {f"blk.{n}.attn_v.weight": np.ones((64, 512), np.float32) for n in range(40)}
    path = write_gguf(tmp_path / "m.gguf", values, form="F16")
    sizes: list[int] = []
    read = GgufWeights._read_at

    def counted(self: GgufWeights, offset: int, size: int) -> bytes:
        sizes.append(len(read(self, offset, size)))
        return read(self, offset, size)

    monkeypatch.setattr(GgufWeights, "_read_at", counted)
    with open_weights(path) as weights:
        sizes.clear()
        weights.read_part("model.layers.7.self_attn.v_proj.weight", 1000, 10)
        assert sizes == [20]
        weights.read("model.layers.7.self_attn.v_proj.weight")
        assert sizes == [20, 64 * 512 * 2]


def stored(*shape: int, seed: int = 5) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_experts_are_taken_apart(tmp_path: Path) -> None:
    stack = stored(3, 4, 64)
    tensors = {"blk.2.ffn_up_exps.weight": stack, "blk.2.ffn_gate_inp.weight": stored(3, 64)}
    for arch, name, gate in (
        ("qwen3moe", "mlp.experts.{}.up_proj", "mlp.gate"),
        ("llama", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.gate"),
    ):
        path = write_gguf(tmp_path / f"{arch}.gguf", tensors, form="Q8_0", arch=arch)
        with open_weights(path) as weights:
            names = [f"model.layers.2.{name.format(expert)}.weight" for expert in range(3)]
            assert weights.tensors.keys() == {*names, f"model.layers.2.{gate}.weight"}
            read = np.stack([weights.read(each) for each in names])
            assert np.abs(read - stack).max() < np.abs(stack).max() / 127
            part = weights.read_part(names[1], 70, 40)
            assert np.array_equal(part, read[1].reshape(-1)[70:110])


@pytest.mark.parametrize(
    ("arch", "own", "name", "change"),
    [
        ("gpt2", "blk.0.attn_qkv.weight", "transformer.h.0.attn.c_attn.weight", "turned"),
        ("gpt2", "token_embd.weight", "transformer.wte.weight", ""),
        ("gemma", "blk.1.attn_norm.weight", "model.layers.1.input_layernorm.weight", "shifted"),
        ("gemma2", "blk.1.ffn_norm.weight", "model.layers.1.pre_feedforward_layernorm.weight",
         "shifted"),
        ("gemma3", "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight", ""),
        ("phi3", "blk.1.ffn_up.weight", "model.layers.1.mlp.gate_up_proj.weight", ""),
        ("phi3", "blk.1.attn_qkv.weight", "model.layers.1.self_attn.qkv_proj.weight", ""),
        ("qwen2", "blk.1.attn_q.bias", "model.layers.1.self_attn.q_proj.bias", ""),
        ("qwen3", "blk.1.attn_q_norm.weight", "model.layers.1.self_attn.q_norm.weight", ""),
        ("bert", "blk.1.attn_q.weight", "encoder.layer.1.attention.self.query.weight", ""),
        ("bert", "token_embd_norm.bias", "embeddings.LayerNorm.bias", ""),
        ("anything", "output.weight", "lm_head.weight", ""),
        ("anything", "first_stage.conv.weight", "first_stage.conv.weight", ""),
        # The heads are not told, so the rows cannot be put in order.
        ("llama", "blk.1.attn_q.weight", "blk.1.attn_q.weight", ""),
    ],
)  # fmt: skip
def test_tensors_are_found_by_the_names_of_transformers(
    tmp_path: Path, arch: str, own: str, name: str, change: str
) -> None:
    values = stored(64) if own.endswith(("norm.weight", ".bias")) else stored(8, 64)
    path = write_gguf(tmp_path / "m.gguf", {own: values}, arch=arch)
    expected = {"turned": values.T, "shifted": values - 1, "": values}[change]
    with open_weights(path) as weights:
        assert np.array_equal(weights.read(name), expected)
        assert weights.tensors[name].shape == expected.shape
        assert np.array_equal(weights.read_part(name, 3, 9), expected.reshape(-1)[3:12])
        assert weights.tensors.keys() == {name}
        assert b"".join(weights.read_pieces(name)) == expected.tobytes()


def test_a_bias_of_a_llama_is_put_in_order(tmp_path: Path) -> None:
    bias = stored(32)
    path = write_gguf(
        tmp_path / "m.gguf", {"blk.0.attn_k.bias": pair_rows(bias, 2)},
        numbers={"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2},
    )  # fmt: skip
    with open_weights(path) as weights:
        assert np.array_equal(weights.read("model.layers.0.self_attn.k_proj.bias"), bias)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    writer.add_tensor("output.weight", np.zeros((4, 66), np.uint8), raw_dtype=kind)
    writer.add_tensor("token_embd.weight", stored(2, 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_weights(tmp_path / "m.gguf") as weights:
        assert weights.tensors["lm_head.weight"].shape == (4, 256)
        assert weights.read("model.embed_tokens.weight").shape == (2, 2)
        with pytest.raises(SuspectError, match="type IQ2_XXS, which cannot be read yet") as caught:
            weights.read("lm_head.weight")
    one_line(caught.value)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(*dims: int, name: bytes = b"a", kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def header(*parts: bytes, version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(parts)


HUGE = 1 << 62
HOSTILE: list[tuple[bytes, str]] = [
    (b"GGUF", "its header ends at byte 8"),
    (header(version=1), "GGUF version 1,"),
    (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(16), "big-endian"),
    (header(tensors=HUGE), "its header ends"),
    (header(pairs=HUGE), "its header ends"),
    (header(bytes(5_000_000), tensors=100_001), "100,001 tensors"),
    (header(pair(b"a", 8, struct.pack("<Q", HUGE)), pairs=1), "its header ends"),
    (header(pair(b"a", 9, struct.pack("<IQ", 8, HUGE)), pairs=1), "its header ends"),
    (header(pair(b"a", 9, struct.pack("<IQ", 4, HUGE)), pairs=1), "its header ends"),
    (header(pair(b"a", 9, struct.pack("<IQ", 9, 1)), pairs=1), "unknown type 9"),
    (header(pair(b"a", 99, b""), pairs=1), "unknown type 99"),
    (header(text(b"a" * 70_000), pairs=1), "70,000 bytes"),
    (header(text(b"\xff"), bytes(20), pairs=1), "utf-8"),
    (header(2 * pair(b"a", 4, bytes(4)), pairs=2), "twice"),
    (header(pair(b"general.alignment", 4, struct.pack("<I", 3)), pairs=1), "alignment is 3"),
    (header(pair(b"general.alignment", 4, bytes(4)), pairs=1), "alignment is 0"),
    (header(pair(b"split.count", 2, b"\2\0"), pairs=1), "one of 2 parts"),
    (header(tensor(1, 1, 1, 1, 1), tensors=1), "5 dimensions"),
    (header(tensor(HUGE, HUGE), tensors=1), "and the file has"),
    (header(tensor(8, kind=77), tensors=1), "unknown type 77"),
    (header(tensor(8, kind=12), tensors=1), "Q4_K cannot"),
    (header(tensor(0, 8), tensors=1), "shape"),
    (header(tensor(8, offset=HUGE), bytes(99), tensors=1), "and the file has"),
    (header(tensor(8, offset=4), bytes(99), tensors=1), "not aligned"),
    (header(tensor(1), tensor(1, name=b"b"), bytes(99), tensors=2), "overlap"),
    (header(tensor(1), tensor(1, offset=32), bytes(99), tensors=2), "twice"),
    (header(tensor(1, name=b"output.weight"), tensor(1, name=b"lm_head.weight", offset=32),
            bytes(99), tensors=2), "both"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "why"), HOSTILE, ids=[why for _, why in HOSTILE])
def test_hostile_headers_are_refused_in_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(SuspectError, match="GGUF") as caught:
        open_weights(tmp_path / "m.gguf")
    assert why in one_line(caught.value)


def test_many_texts_are_skipped_and_too_many_refused(tmp_path: Path) -> None:
    for count, why in ((300_000, ""), ((1 << 22) + 1, "texts")):
        words = struct.pack("<IQ", 8, count) + bytes(8 * count)
        (tmp_path / "m.gguf").write_bytes(
            header(pair(b"tokens", 9, words), tensor(1), bytes(64), tensors=1, pairs=1)
        )
        if not why:
            with open_weights(tmp_path / "m.gguf") as weights:
                assert weights.read("a").shape == (1,)
            continue
        with pytest.raises(SuspectError, match=why):
            open_weights(tmp_path / "m.gguf")


def test_a_file_that_is_cut_after_opening_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"output.weight": stored(8, 64)})
    with open_weights(path) as weights:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(SuspectError, match="ends after"):
            weights.read("lm_head.weight")


def test_infinite_scales_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"output.weight": stored(8, 64)}, form="Q8_0")
    content = bytearray(path.read_bytes())
    at = len(content) - encode(stored(8, 64), "Q8_0").size
    content[at : at + 2] = b"\x00\x7c"
    path.write_bytes(content)
    with open_weights(path) as weights, pytest.raises(SuspectError, match="not finite"):
        weights.read("lm_head.weight")
