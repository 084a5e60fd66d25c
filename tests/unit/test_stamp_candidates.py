"""Which tensors advice chooses: no codes, no scales of codes, nothing that programs compute anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from keys import one_line
from safetensors.torch import save_file
from torch import Tensor

from coded_forms import FORMS
from countermark.checkpoints import open_weights
from countermark.errors import ConfigError
from countermark.stamping import Advice, StampResult, advise, stamp
from countermark.stamping.making import StampPaths

EMBEDDINGS = {"model.embed_tokens.weight": (900, 128), "lm_head.weight": (900, 128)}
LAYERS = [f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("up", "gate")]


def drawn(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(0, 0.05, shape)).float()


def quantised(form: str, height: int = 256, width: int = 128) -> dict[str, Tensor]:
    """A model whose layers are codes; the embeddings and the head are floats."""
    state = {name: drawn(*shape) for name, shape in EMBEDDINGS.items()}
    for name in LAYERS:
        state |= FORMS[form](drawn(height, width).double().numpy(), name).state
    return {name: each.contiguous() for name, each in state.items()}


def advise_on(path: Path, state: dict[str, Tensor], **fields: object) -> Advice:
    save_file(state, path)
    with open_weights(path) as weights:
        return advise(weights, fields)


@pytest.mark.parametrize("form", FORMS)
def test_advice_says_that_layers_are_codes(tmp_path: Path, form: str) -> None:
    advice = advise_on(tmp_path / "m.safetensors", quantised(form))
    assert advice.tensors.keys() == EMBEDDINGS.keys()
    assert "lm_head.weight, model.embed_tokens.weight" in advice.weak_place
    assert "4 weights are stored as codes (quantised)" in advice.weak_place
    assert LAYERS[0] in advice.weak_place
    assert advice.to_json()["weak_place"] == advice.weak_place


@pytest.mark.parametrize("form", ["awq", "gptq 4", "mlx 4", "compressed int4, zeros"])
def test_large_scales_of_codes_are_not_marked(tmp_path: Path, form: str) -> None:
    state = quantised(form, 2048, 256)
    assert any(
        each.is_floating_point() and each.dim() == 2 and each.numel() >= 4096
        for name, each in state.items() if name not in EMBEDDINGS
    )  # fmt: skip
    assert advise_on(tmp_path / "m.safetensors", state).tensors.keys() == EMBEDDINGS.keys()


def test_advice_says_nothing_of_codes_where_layers_are_floats(tmp_path: Path) -> None:
    whole = {name: drawn(256, 128) for name in LAYERS}
    tables = {name: drawn(*shape) for name, shape in EMBEDDINGS.items()}
    ids = {"embeddings.position_ids": torch.arange(8192), "steps": torch.tensor(3)}
    assert advise_on(tmp_path / "a.safetensors", whole | tables | ids).weak_place == ""
    assert advise_on(tmp_path / "b.safetensors", tables | ids).weak_place == ""
    # Some layers are codes, others are not: the others carry the mark.
    mixed = advise_on(
        tmp_path / "c.safetensors", quantised("awq") | {"model.norm.up": drawn(64, 64)}
    )
    assert (list(mixed.tensors), mixed.weak_place) == (["model.norm.up"], "")


def test_codes_of_an_unknown_format_are_named_too(tmp_path: Path) -> None:
    state = {name: drawn(*shape) for name, shape in EMBEDDINGS.items()}
    state["model.layers.0.B"] = torch.ones(64, 256, dtype=torch.int32)
    assert "model.layers.0.B" in advise_on(tmp_path / "m.safetensors", state).weak_place


def test_a_checkpoint_of_codes_alone_is_refused(tmp_path: Path) -> None:
    state = {n: each for n, each in quantised("fp8 by row").items() if n not in EMBEDDINGS}
    with pytest.raises(ConfigError, match="4 weights are stored as codes") as caught:
        advise_on(tmp_path / "m.safetensors", state)
    one_line(caught.value)


def test_a_stamp_tells_the_same(tmp_path: Path) -> None:
    save_file(quantised("fp8 by row"), tmp_path / "m.safetensors")
    places = StampPaths(tmp_path / "out.safetensors", tmp_path / "a.key")
    done: StampResult = stamp(tmp_path / "m.safetensors", places, owner="ACME")
    assert "quantised" in done.advice.weak_place
    assert set(done.key.tensors) == EMBEDDINGS.keys()


COMPUTED = [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached", "sin_cached",
    "freqs_cis", "model.rope.freqs", "stft.forward_basis_buffer", "spectrogram.stft.conv_real.weight",
    "feature_extractor.mel_filters", "logmel_extractor.melW", "mel_scale.fb", "h.0.attn.bias",
    "gpt_neox.layers.1.attention.bias", "layers.0.attn_mask", "vision.relative_position_index",
    "embeddings.position_ids", "pos_encoder.pe", "alibi", "hann_window", "decoder.alibi_slopes",
]  # fmt: skip
LEARNT = [
    "layers.0.attention.dense.weight", "encoder.mel_linear.weight", "blocks.0.attn.proj.weight",
    "conv.window_proj.weight", "cosine_head.weight", "shift.base.weight", "frequency.weight",
    "attn_bias_proj.weight", "rope_mlp.weight", "pe_proj.weight", "basis.weight",
    "layers.0.mlp.shared_expert.up_proj.weight", "layers.0.mlp.shared_experts.up_proj.weight",
]  # fmt: skip


def test_tensors_that_programs_compute_are_not_marked(tmp_path: Path) -> None:
    state = {name: drawn(64, 128) for name in (*COMPUTED, *LEARNT)}
    advice = advise_on(tmp_path / "m.safetensors", state)
    assert set(advice.tensors) == set(LEARNT)
    every = advise_on(tmp_path / "m.safetensors", state, layer="all")
    assert set(every.tensors) == set(LEARNT)
    # Whoever names one gets it.
    named = advise_on(tmp_path / "m.safetensors", state, layer=[COMPUTED[0]], bits=64)
    assert list(named.tensors) == [COMPUTED[0]]
