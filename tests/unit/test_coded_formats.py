"""Every form of codes of published checkpoints: numbers, marks, and damaged companions."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keys import one_line
from safetensors.torch import load_file, save_file
from torch import Tensor

from coded_forms import FORMS, Coded, expert_blocks
from countermark.checkpoints import CachedWeights, Weights, dequantise_weights, open_weights
from countermark.errors import SuspectError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.stamp.scheme import Stamp
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.verify import verify

NAME, KEYS, MANY_KEYS, FEW, MANY = "a.weight", 200, 500, 8, 300


def drawn(*shape: int, seed: int = 3) -> Any:
    return np.random.default_rng(seed).normal(0, 0.05, shape)


def write(folder: Path, coded: Coded) -> Path:
    folder.mkdir(exist_ok=True)
    extra = {"b.bias": torch.ones(8)}
    state = {name: each.contiguous() for name, each in (coded.state | extra).items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(coded.config))
    return folder


def opened(path: Path) -> Weights:
    return dequantise_weights(open_weights(path))


@pytest.mark.parametrize("shape", [(96, 128), (160, 384)])
@pytest.mark.parametrize("form", FORMS)
def test_codes_are_read_as_numbers(tmp_path: Path, form: str, shape: tuple[int, int]) -> None:
    coded = FORMS[form](drawn(*shape), NAME)
    with opened(write(tmp_path / "m", coded)) as weights:
        assert weights.tensors[NAME].shape == shape
        read = weights.read(NAME)
        np.testing.assert_allclose(read, coded.numbers, rtol=1e-5, atol=1e-7)
        flat = read.reshape(-1)
        for start, count in (
            (0, 1),
            (shape[1] - 1, 2),
            (3 * shape[1] + 5, 700),
            (len(flat) - 3, 3),
        ):
            assert np.array_equal(weights.read_part(NAME, start, count), flat[start:][:count])
        assert weights.read_part(NAME, shape[1], 0).shape == (0,)
        assert weights.read("b.bias").tolist() == [1.0] * 8


def test_the_experts_of_gpt_oss_are_read_in_their_own_order(tmp_path: Path) -> None:
    coded = expert_blocks(drawn(3, 64, 40), "mlp.experts.gate_up_proj")
    with opened(write(tmp_path / "m", coded)) as weights:
        read = weights.read("mlp.experts.gate_up_proj")
        np.testing.assert_allclose(read, coded.numbers, rtol=1e-6)
        part = weights.read_part("mlp.experts.gate_up_proj", 2500, 900)
        assert np.array_equal(part, read.reshape(-1)[2500:3400])


@pytest.mark.parametrize("form", ["fp8 by row", "mlx 4", "mlx nvfp4", "modelopt nvfp4"])
def test_stacked_experts_are_read_as_well(tmp_path: Path, form: str) -> None:
    whole = drawn(3, 32, 128)
    each = [FORMS[form](expert, NAME) for expert in whole]
    together = {
        # One scale for each expert, where an expert has one scale.
        name: torch.stack([one.state[name].view(torch.uint8) if one.state[name].element_size() == 1
                           else one.state[name] for one in each]).view(first.dtype)
        for name, first in each[0].state.items()
    }  # fmt: skip
    with opened(write(tmp_path / "m", Coded(together, whole, each[0].config))) as weights:
        numbers = np.stack([one.numbers for one in each])
        np.testing.assert_allclose(weights.read(NAME), numbers, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        (NAME, "a.scale_weight"), (NAME, "a.qscale_weight"), (NAME, "a.scale"),
        ("a.weight._data", "a.weight._scale"), ("a._weight_qdata", "a._weight_scale"),
    ],
)  # fmt: skip
def test_scales_have_several_names(tmp_path: Path, codes: str, scale: str) -> None:
    coded = FORMS["fp8 by tensor"](drawn(32, 64), NAME)
    state = {codes: coded.state[NAME], scale: coded.state[f"{NAME}_scale"]}
    with opened(write(tmp_path / "m", Coded(state, coded.numbers))) as weights:
        np.testing.assert_allclose(weights.read(NAME), coded.numbers, rtol=1e-6)


def test_only_the_rows_of_a_part_are_read(tmp_path: Path) -> None:
    coded = FORMS["compressed int4, zeros"](drawn(96, 128), NAME)
    with opened(write(tmp_path / "m", coded)) as weights:
        weights.read_part(NAME, 128, 10)
        assert "a.weight_packed, in part" in weights.digests
        assert "a.weight_packed" not in weights.digests
        weights.read(NAME)
        assert "a.weight_packed" in weights.digests


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz,
     torch.float8_e5m2fnuz],
)  # fmt: skip
def test_all_8_bit_floats_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every.view(torch.uint8)[every.float().isfinite()].view(dtype)
    torch.save({"t": finite, "whole": every}, tmp_path / "m.pt")
    with open_weights(tmp_path / "m.pt") as weights:
        assert np.array_equal(weights.read("t"), finite.float().numpy())
        with pytest.raises(SuspectError, match="not finite"):
            weights.read("whole")


def test_a_number_that_is_stored_beside_its_codes_is_taken(tmp_path: Path) -> None:
    coded = FORMS["gptq 4"](drawn(32, 64), NAME)
    stored = Coded(coded.state | {NAME: torch.full((32, 64), 0.5)}, coded.numbers)
    with opened(write(tmp_path / "m", stored)) as weights:
        assert np.array_equal(weights.read(NAME), np.full((32, 64), 0.5))


HOSTILE = {
    "quantization_config": {
        "bits": True, "group_size": -1, "format": ["gptq_v2"], "weight_block_size": [0, 1e9],
    }
}  # fmt: skip


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"quantization_config": 3}', '{"a": 1, "a": 2}', json.dumps(HOSTILE)]
)
def test_an_invalid_configuration_says_nothing(tmp_path: Path, content: str) -> None:
    coded = FORMS["gptq 4"](drawn(32, 64), NAME)
    (write(tmp_path / "m", coded) / "config.json").write_text(content)
    with opened(tmp_path / "m") as weights:
        np.testing.assert_allclose(weights.read(NAME), coded.numbers, rtol=1e-5, atol=1e-7)


# --- marks


LLAMA = {
    f"model.layers.{layer}.{part}.weight": shape
    for layer in range(2)
    for part, shape in {
        "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128), "self_attn.o_proj": (128, 128), "mlp.gate_proj": (256, 128),
        "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256),
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama before the mark and after, and the key."""
    place = tmp_path_factory.mktemp("llama")
    state = {
        name: torch.from_numpy(drawn(*shape, seed=at)).float()
        for at, (name, shape) in enumerate(LLAMA.items())
    }
    state["model.embed_tokens.weight"] = torch.from_numpy(drawn(300, 128)).float()
    save_file(state, place / "plain.safetensors")
    stamp(
        place / "plain.safetensors", StampPaths(place / "marked.safetensors", place / "a.key"),
        owner="ACME", fields={"bits": 256, "margin": 5.0},
        material=KeyMaterial(bytes(range(32)), bytes(16)),
    )  # fmt: skip
    return place


def encode(source: Path, folder: Path, form: str) -> Path:
    """The layers of a checkpoint in one form of codes."""
    state: dict[str, Tensor] = {}
    config: Mapping[str, Any] = {}
    for name, values in load_file(source).items():
        if name not in LLAMA:
            state[name] = values.bfloat16()
            continue
        coded = FORMS[form](values.double().numpy(), name)
        state, config = state | coded.state, coded.config
    return write(folder, Coded(state, np.zeros(0), config))


@pytest.mark.parametrize("form", FORMS)
def test_a_mark_is_read_from_codes(marked: Path, tmp_path: Path, form: str) -> None:
    found = verify(encode(marked / "marked.safetensors", tmp_path / "m", form), marked / "a.key")
    assert (found.outcome, found.matched, found.test_count) == ("owned", 256, 1)
    other = verify(encode(marked / "plain.safetensors", tmp_path / "p", form), marked / "a.key")
    assert other.outcome == "not_proven"


def read_with_fresh_keys(marked: Path, folder: Path, form: str, count: int) -> list[int]:
    """The matching bits of so many fresh keys in the model without a mark, decoded once."""
    key = Key.load(marked / "a.key")
    scheme = Stamp.from_fields({**key.fields, "values": 1500})
    where = {name: name for name in key.tensors}
    found = []
    with CachedWeights(opened(encode(marked / "plain.safetensors", folder, form))) as weights:
        for name in key.tensors:
            weights.read(name)
        for number in range(count):
            material = KeyMaterial.from_test_seed(1000 + number)
            fresh = scheme.generate_key(key.tensors, owner="ACME", material=material)
            tensors = scheme.read_suspect_tensors(weights, where, fresh)
            found.append(scheme.extract(tensors, fresh).match_count)
    return found


def require_chance(counts: list[int]) -> None:
    """The mean within four standard deviations, and none further off than the longest chance."""
    mean, deviation = 128, 8
    assert abs(np.mean(counts) - mean) < 4 * deviation / math.sqrt(len(counts))
    assert 0.75 * deviation < np.std(counts) < 1.25 * deviation
    assert max(abs(each - mean) for each in counts) < 5 * deviation


@pytest.mark.parametrize("form", ["fp8 by row", "gptq 4", "mlx 4"])
def test_codes_without_a_mark_read_as_chance(marked: Path, tmp_path: Path, form: str) -> None:
    require_chance(read_with_fresh_keys(marked, tmp_path / "m", form, KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_form_reads_better_than_chance_with_many_keys(
    marked: Path, tmp_path: Path, form: str
) -> None:
    require_chance(read_with_fresh_keys(marked, tmp_path / "m", form, MANY_KEYS))


# --- damaged companions


def change_values(tensor: Tensor, choices: random.Random) -> Tensor:
    raw = bytearray(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    for _ in range(choices.choice((1, 8, 64))):
        raw[choices.randrange(len(raw))] = choices.choice((0, 1, 0x7F, 0x80, 0xFF))
    return torch.frombuffer(raw, dtype=tensor.dtype).reshape(tensor.shape)


def change_dtype(tensor: Tensor, choices: random.Random) -> Tensor:
    """The same shape in another dtype, or the same bytes as bytes."""
    if choices.random() < 0.5:
        return tensor.reshape(-1).view(torch.uint8)
    others = (torch.int32, torch.uint8, torch.int8, torch.float16, torch.float8_e4m3fn,
              torch.uint32, torch.int64, torch.float64, torch.complex64)  # fmt: skip
    return torch.ones(tensor.shape).to(choices.choice(others))


def change_shape(tensor: Tensor, choices: random.Random) -> Tensor:
    flat = tensor.reshape(-1)
    return choices.choice(
        (
            flat.reshape(-1, 1), flat.reshape(1, -1), flat.reshape(1, 1, -1), flat[:0], flat[:1],
            flat[: choices.randrange(flat.numel() + 1)], torch.cat([flat, flat]),
            tensor.T if tensor.dim() == 2 else flat, flat.reshape(-1, 1).expand(-1, 7),
        )
    )  # fmt: skip


def damaged(state: dict[str, Tensor], choices: random.Random) -> dict[str, Tensor]:
    """The same tensors, of which one or two have other values, sizes, dtypes or names."""
    state = dict(state)
    for _ in range(choices.choice((1, 1, 2))):
        name = choices.choice(sorted(state))
        tensor = state.pop(name)
        change = choices.choice((change_values, change_dtype, change_shape, None))
        if change is not None and tensor.numel():
            state[name] = change(tensor, choices).contiguous()
        elif choices.random() < 0.5:  # left out, or in the place of another
            state[choices.choice(sorted(state)) if state else f"{name}_"] = tensor
        if not state:
            break
    return state


def damage(form: str, folder: Path, numbers: Iterator[int]) -> int:
    """Read a form of codes that is damaged once for each number; return how often it was refused."""
    coded, refused = FORMS[form](drawn(32, 128), NAME), 0
    for number in numbers:
        drawn_choices = random.Random(f"{form} {number}")  # noqa: S311
        state = damaged(coded.state, drawn_choices)
        path = write(folder, Coded(state, coded.numbers, coded.config))
        try:
            with opened(path) as weights:
                for name in weights.tensors:
                    read = weights.read(name)
                    assert read.shape == weights.tensors[name].shape, (form, number)
                    assert np.isfinite(read).all(), (form, number)
                    assert read.size <= 64 * (path / "model.safetensors").stat().st_size
        except SuspectError as error:
            one_line(error)
            refused += 1
        except Exception as error:
            error.add_note(f"{form}, mutation {number}")
            raise
    return refused


@pytest.mark.parametrize("form", FORMS)
def test_damaged_companions_are_refused_or_read(tmp_path: Path, form: str) -> None:
    damage(form, tmp_path / "m", iter(range(FEW)))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_companions_damaged_in_many_ways_are_refused_or_read(tmp_path: Path, form: str) -> None:
    assert damage(form, tmp_path / "m", iter(range(MANY)))
