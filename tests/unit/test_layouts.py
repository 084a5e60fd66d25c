"""Tensors under other known names, fused, stacked, transposed or padded, in files and live."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from keys import InMemory
from safetensors.numpy import save_file
from torch import nn

from countermark.alignment import SuspectWithReference
from countermark.checkpoints import derive_tensors, open_weights
from countermark.checkpoints.known_names import ALL, TensorPlace, parse_name, split_block
from countermark.verification.verify import verify
from stamped import Tensors, draw_tensors, stamp_tensors

BLOCKS, WIDTH, EXPERTS = 3, 64, 4
BLOCK = {
    "self_attn.q_proj.weight": (64, 64), "self_attn.k_proj.weight": (32, 64),
    "self_attn.v_proj.weight": (32, 64), "self_attn.o_proj.weight": (64, 64),
    "mlp.gate_proj.weight": (96, 64), "mlp.up_proj.weight": (96, 64),
    "mlp.down_proj.weight": (64, 96),
    "input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,),
}  # fmt: skip
LLAMA = {
    f"model.layers.{block}.{end}": shape for block in range(BLOCKS) for end, shape in BLOCK.items()
} | {
    "model.embed_tokens.weight": (120, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (120, 64),
}
MIXTURE = {
    f"model.layers.{block}.mlp.experts.{expert}.{end}.weight": shape
    for block in range(BLOCKS) for expert in range(EXPERTS)
    for end, shape in {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}.items()
}  # fmt: skip
GPT = {
    f"h.{block}.{end}": shape for block in range(BLOCKS)
    for end, shape in {
        "attn.c_attn.weight": (64, 192), "attn.c_proj.weight": (64, 64),
        "mlp.c_fc.weight": (64, 256), "mlp.c_proj.weight": (256, 64),
    }.items()
}  # fmt: skip

META = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "model.layers": "layers", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def rename(tensors: Tensors, names: dict[str, str]) -> Tensors:
    found = {}
    for name, each in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)  # noqa: PLW2901
        found[name] = each
    return found


def fuse(tensors: Tensors) -> Tensors:
    """Join q, k and v, and gate and up, as Phi-3 stores them."""
    found = {n: each for n, each in tensors.items() if not n.endswith(("q_proj.weight", "k_proj.weight",
        "v_proj.weight", "gate_proj.weight", "up_proj.weight"))}  # fmt: skip
    for block in range(BLOCKS):
        at = f"model.layers.{block}"
        qkv = [tensors[f"{at}.self_attn.{each}_proj.weight"] for each in "qkv"]
        found[f"{at}.self_attn.qkv_proj.weight"] = np.concatenate(qkv)
        both = [tensors[f"{at}.mlp.{each}_proj.weight"] for each in ("gate", "up")]
        found[f"{at}.mlp.gate_up_proj.weight"] = np.concatenate(both)
    return found


def transpose(tensors: Tensors) -> Tensors:
    """Transpose all matrices, as GPT-2's Conv1D stores them."""
    return {name: np.ascontiguousarray(each.T) for name, each in tensors.items()}


def stack_blocks(tensors: Tensors) -> Tensors:
    """Put the tensors of all blocks behind each other, as a scan over layers stores them."""
    found = {n: each for n, each in tensors.items() if ".layers." not in n}
    for end in BLOCK:
        blocks = [tensors[f"model.layers.{block}.{end}"] for block in range(BLOCKS)]
        found[f"model.layers.{end}"] = np.stack(blocks)
    return found


def pad(tensors: Tensors) -> Tensors:
    """Pad the width with zeros, and add words that are not zero."""

    def widen(name: str, each: np.ndarray) -> np.ndarray:
        added = [(0, 8 if size == WIDTH else 0) for size in each.shape]
        wide = np.pad(each, added)
        if "embed" in name or "lm_head" in name:
            wide = np.concatenate([wide, np.ones((7, WIDTH + 8), dtype=np.float32)])
        return wide

    return {name: widen(name, each) for name, each in tensors.items()}


def stack_experts(tensors: Tensors, *, turned: bool = False) -> Tensors:
    """Put all experts of a block into two tensors, as transformers 5 does."""
    found = {}
    for block in range(BLOCKS):
        at = f"model.layers.{block}.mlp.experts"
        gates, ups, downs = (
            [tensors[f"{at}.{expert}.{end}_proj.weight"] for expert in range(EXPERTS)]
            for end in ("gate", "up", "down")
        )
        gate_up = np.stack([np.concatenate(each) for each in zip(gates, ups, strict=True)])
        down = np.stack(downs)
        found[f"{at}.gate_up_proj"] = gate_up.transpose(0, 2, 1) if turned else gate_up
        found[f"{at}.down_proj"] = down.transpose(0, 2, 1) if turned else down
    return {name: np.ascontiguousarray(each) for name, each in found.items()}


def split_heads(tensors: Tensors) -> Tensors:
    """Store GPT-2 as linear layers, with q, k and v apart."""
    found = transpose(rename(tensors, {"attn.c_proj": "attn.o_proj"}))
    for block in range(BLOCKS):
        parts = np.split(found.pop(f"h.{block}.attn.c_attn.weight"), 3)
        found |= {
            f"h.{block}.attn.{n}_proj.weight": each for n, each in zip("qkv", parts, strict=True)
        }
    return found


CHANGES: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[Tensors], Tensors]]] = {
    "names of the original Llama": (LLAMA, lambda t: rename(t, META)),
    "fused": (LLAMA, fuse),
    "fused, under other names": (LLAMA, lambda t: rename(fuse(t), {"model.": "transformer."})),
    "transposed": (LLAMA, transpose),
    "fused and transposed": (LLAMA, lambda t: transpose(fuse(t))),
    "blocks stacked": (LLAMA, stack_blocks),
    "padded": (LLAMA, pad),
    "experts stacked": (MIXTURE, stack_experts),
    "experts stacked and transposed": (MIXTURE, lambda t: stack_experts(t, turned=True)),
    "experts of Mixtral": (MIXTURE, lambda t: rename(t, {
        "mlp.experts": "block_sparse_moe.experts", "gate_proj": "w1", "down_proj": "w2",
        "up_proj": "w3"})),
    "Conv1D as linear layers": (GPT, transpose),
    "heads split": (GPT, split_heads),
}  # fmt: skip
BACK = {"fused": fuse, "blocks stacked": stack_blocks}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_layout_is_read_in_one_test(kind: str, tmp_path: Path) -> None:
    shapes, change = CHANGES[kind]
    plain = draw_tensors(shapes)
    layer = [name for name, shape in shapes.items() if len(shape) > 1]
    marked, key = stamp_tensors(plain, tmp_path, keep_before=False, layer=layer)
    verdict = verify(InMemory(change(marked)), key)
    assert (verdict.outcome, verdict.matched, verdict.test_count) == ("owned", key.bits, 1)
    assert verdict.subject.missing == ()
    there = change(plain)
    for name, source in (verdict.subject.tensors or {}).items():
        assert name in there or source != name  # the suspect's own tensors are named
    innocent = verify(InMemory(there), key)
    assert (innocent.outcome, innocent.test_count) == ("not_proven", 1)


@pytest.mark.parametrize("kind", BACK)
def test_a_key_of_fused_tensors_reads_split_ones(kind: str, tmp_path: Path) -> None:
    plain = draw_tensors(LLAMA)
    whole = BACK[kind](plain)
    layer = [n for n, each in whole.items() if each.ndim > 1 and ("layers" in n)]
    marked, key = stamp_tensors(whole, tmp_path, layer=layer)
    with derive_tensors(InMemory(marked), LLAMA) as weights:
        split = {name: weights.read(name) for name in LLAMA}
    verdict = verify(InMemory(split), key)
    assert (verdict.outcome, verdict.matched, verdict.test_count) == ("owned", key.bits, 1)
    assert verify(InMemory(plain), key).outcome == "not_proven"


def test_a_key_of_stacked_experts_reads_split_ones(tmp_path: Path) -> None:
    plain = draw_tensors(MIXTURE)
    marked, key = stamp_tensors(stack_experts(plain), tmp_path)
    split = {}
    for block in range(BLOCKS):
        at = f"model.layers.{block}.mlp.experts"
        for expert in range(EXPERTS):
            gate, up = np.split(marked[f"{at}.gate_up_proj"][expert], 2)
            split |= {f"{at}.{expert}.gate_proj.weight": gate, f"{at}.{expert}.up_proj.weight": up}
            split[f"{at}.{expert}.down_proj.weight"] = marked[f"{at}.down_proj"][expert]
    assert verify(InMemory(split), key).owned
    assert verify(InMemory(plain), key).outcome == "not_proven"


def test_moved_blocks_are_found_in_another_layout(tmp_path: Path) -> None:
    plain = draw_tensors(LLAMA)
    marked, key = stamp_tensors(plain, tmp_path)
    for tensors, outcome in ((marked, "owned"), (plain, "not_proven")):
        names = {f"layers.{block}.": f"layers.{block + 1}." for block in reversed(range(BLOCKS))}
        moved = rename(rename(fuse(tensors), names), {"model.": "transformer."})
        new = rename(fuse(draw_tensors(LLAMA, 8)), {"model.": "transformer."})
        front = {n: each for n, each in new.items() if ".layers.0." in n}
        verdict = verify(InMemory(moved | front), key)
        assert (verdict.outcome, verdict.test_count) == (outcome, 2)


def test_a_live_module_with_stacked_experts_is_read_as_its_file_is(tmp_path: Path) -> None:
    plain = draw_tensors(MIXTURE)
    marked, key = stamp_tensors(plain, tmp_path)
    for tensors, outcome in ((marked, "owned"), (plain, "not_proven")):
        model = nn.Module()
        for name, each in stack_experts(tensors).items():
            *path, last = name.split(".")
            inner = model
            for part in path:
                if part not in inner._modules:
                    inner.add_module(part, nn.Module())
                inner = inner.get_submodule(part)
            inner.register_parameter(last, nn.Parameter(torch.from_numpy(each)))
        torch.save(model.state_dict(), tmp_path / "live.pt")
        for suspect in (model, tmp_path / "live.pt"):
            verdict = verify(suspect, key)
            assert (verdict.outcome, verdict.test_count) == (outcome, 1)


@pytest.mark.parametrize("turned", [False, True])
def test_a_reference_aligns_another_layout_with_moved_blocks(turned: bool, tmp_path: Path) -> None:
    plain = draw_tensors(LLAMA)
    marked, key = stamp_tensors(plain, tmp_path, keep_before=False)
    names = {"layers.0.": "layers.x.", "layers.2.": "layers.0.", "layers.1.": "layers.2."}
    names |= {"layers.x.": "layers.1."}
    for tensors, owned in ((marked, True), (plain, False)):
        moved = fuse(rename(tensors, names))
        suspect = InMemory(transpose(moved) if turned else moved)
        verdict = verify(SuspectWithReference(suspect, tmp_path / "plain.safetensors"), key)
        assert verdict.owned == owned
        assert verdict.test_count == 2
    assert not verify(suspect, key).owned


def test_only_what_is_read_is_loaded(tmp_path: Path) -> None:
    shapes = {"model.layers.mlp.experts.down_proj": (8, 16, 64, 48)}
    wanted = {
        f"model.layers.{b}.mlp.experts.{e}.down_proj.weight": (64, 48)
        for b in range(8) for e in range(16)
    }  # fmt: skip
    tensors = draw_tensors(shapes)
    save_file(tensors, tmp_path / "stacked.safetensors")
    with derive_tensors(open_weights(tmp_path / "stacked.safetensors"), wanted) as weights:
        name = "model.layers.5.mlp.experts.7.down_proj.weight"
        own = tensors["model.layers.mlp.experts.down_proj"][5, 7]
        assert np.array_equal(weights.read(name), own)
        assert np.array_equal(weights.read_part(name, 100, 50), own.reshape(-1)[100:150])
        parts = weights.read_parts(name, [0, 7], 3)
        assert np.array_equal(parts, [own[0, :3], own[0, 7:10]])
        assert b"".join(weights.read_pieces(name)) == own.tobytes()
        assert list(weights.digests)[1:] == ["model.layers.mlp.experts.down_proj, in part"]
        assert weights.describe_source(name) == "part of model.layers.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.7.self_attn.q_proj.weight", ("", 7, None, "q", "weight")),
        ("layers.7.attention.wq.weight", ("", 7, None, "q", "weight")),
        ("transformer.h.7.attn.c_attn.bias", ("", 7, None, "qkv", "bias")),
        ("params.layers_7.mlp.gate_proj.kernel", ("", 7, None, "gate", "weight")),
        ("model.layers.7.mlp.experts.3.up_proj.weight", ("", 7, 3, "experts.up", "weight")),
        ("model.layers.7.mlp.experts.down_proj", ("", 7, ALL, "experts.down", "weight")),
        ("mlp.experts.gate_up_proj_bias", ("", None, ALL, "experts.gate_up", "bias")),
        ("model.layers.mlp.up_proj.weight", ("", ALL, None, "up", "weight")),
        ("model.decoder.layers.7.fc1.weight", ("decoder", 7, None, "in", "weight")),
        ("model.embed_tokens.weight", ("", None, None, "embeddings", "weight")),
        ("output.weight", ("", None, None, "head", "weight")),
        ("fc.weight", ("", None, None, "fc", "weight")),
        ("weight", ("", None, None, "weight", "weight")),
        ("", ("", None, None, "", "weight")),
        ("model.", ("", None, None, "", "weight")),
        ("experts.", ("", None, ALL, "experts.", "weight")),
        ("..", ("", None, None, "..", "weight")),
    ],
)
def test_names_have_places(name: str, place: tuple[str, int | None, int | None, str, str]) -> None:
    assert parse_name(name) == TensorPlace(*place)


def test_only_plain_numbers_number_blocks() -> None:
    assert split_block("h.12.w") == ("h.", 12, ".w")
    assert split_block("3.weight") == ("", 3, ".weight")
    for name in ("h.007.w", "h12.w", "h.w", "h.w.12", "h.12345678.w", ""):
        assert split_block(name) is None


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.layers.0.self_attn.qkv_proj.weight": (40, 64)},
        {"model.layers.0.self_attn.qkv_proj.weight": ()},
        {"model.layers.0.self_attn.qkv_proj.weight": (0, 64)},
        {"model.layers.self_attn.q_proj.weight": (0, 64, 64)},
        {"layers.0.attention.wq.weight": (64, 64), "h.0.attn_q.weight": (64, 64)},
        {f"layers.{block}.other": (1,) for block in range(3000)},
        {"model.layers.mlp.experts.gate_up_proj": (1 << 40, 2, 192, 64)},
    ],
)
def test_layouts_that_do_not_fit_give_nothing(shapes: dict[str, tuple[int, ...]]) -> None:
    class Shaped(InMemory):
        def __init__(self) -> None:
            super().__init__({})
            from countermark.checkpoints import TensorInfo

            self.tensors = {name: TensorInfo(shape, "F32") for name, shape in shapes.items()}

    weights = Shaped()
    assert derive_tensors(weights, LLAMA) is weights
