"""Suspects that are stored as codes: the numbers that these stand for are read."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from keys import one_line
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints import SHAPES, one_file
from codes import forms, stepped
from countermark.checkpoints import dequantise_weights, load_state, open_weights
from countermark.errors import SuspectError
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import VerificationOptions
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.identify import identify
from countermark.verification.verify import verify

WEIGHT = torch.randn(8, 40, generator=torch.Generator().manual_seed(3))


def expected(form: str) -> Tensor:
    codes, scale = stepped(WEIGHT, *((7, 8) if form.startswith("4") else (127, 40)))
    return codes * scale.repeat_interleave(40 // scale.shape[1], dim=1)


@pytest.mark.parametrize("form", forms(WEIGHT))
def test_codes_are_read_as_numbers(tmp_path: Path, form: str) -> None:
    save_file(forms(WEIGHT)[form] | {"a.bias": torch.ones(8)}, tmp_path / "m.safetensors")
    with dequantise_weights(open_weights(tmp_path / "m.safetensors")) as weights:
        assert weights.tensors["a.weight"].shape == (8, 40)
        assert "a.weight" in weights.views
        read = weights.read("a.weight")
        np.testing.assert_allclose(read, expected(form).numpy(), rtol=1e-5, atol=1e-7)
        assert np.array_equal(weights.read_part("a.weight", 41, 7), read.reshape(-1)[41:48])
        assert np.array_equal(weights.read("a.bias"), np.ones(8))
        assert any(name.startswith("a.weight") for name in weights.digests)


def test_what_has_no_codes_stays_as_it_is(tmp_path: Path) -> None:
    save_file({"a.weight": WEIGHT, "b": torch.ones(3).char()}, tmp_path / "m.safetensors")
    with open_weights(tmp_path / "m.safetensors") as weights:
        assert dequantise_weights(weights) is weights


@pytest.mark.parametrize("scales", [torch.ones(3), torch.ones(8, 3), torch.ones(0), torch.ones(9)])
def test_scales_that_do_not_fit_are_one_line(tmp_path: Path, scales: Tensor) -> None:
    codes = torch.ones(8, 40).char()
    save_file({"a.weight": codes, "a.weight_scale": scales}, tmp_path / "m.safetensors")
    with (
        dequantise_weights(open_weights(tmp_path / "m.safetensors")) as weights,
        pytest.raises(SuspectError, match="one scale, or one for each row or block") as caught,
    ):
        weights.read("a.weight")
    one_line(caught.value)


@pytest.mark.parametrize("shape", [(8, 41), (7, 40), (8, 1 << 40), (0, 0)])
def test_a_shape_that_is_not_there_is_not_believed(tmp_path: Path, shape: tuple[int, int]) -> None:
    found = forms(WEIGHT)["4 packed"] | {"a.weight_shape": torch.tensor(shape)}
    save_file(found, tmp_path / "m.safetensors")
    with dequantise_weights(open_weights(tmp_path / "m.safetensors")) as weights:
        assert "a.weight" not in weights.tensors


@pytest.mark.parametrize("form", ["8 by row", "8 bitsandbytes", "4 packed"])
def test_a_mark_is_found_in_codes(tmp_path: Path, form: str) -> None:
    source = one_file(tmp_path / "m.safetensors")
    places = StampPaths(tmp_path / "marked.safetensors", tmp_path / "keys" / "a.key")
    layers = [name for name in SHAPES if ".up" in name or ".down" in name]
    fields = {"bits": 128, "margin": 3.0, "layer": layers}
    secret = KeyMaterial(bytes(range(32)), bytes(16))  # coarse codes may cost some a bit
    stamp(source, places, owner="ACME", fields=fields, material=secret)
    state = load_state(places.out)
    for name in layers:
        state |= forms(state.pop(name), name)[form]
    save_file(state, tmp_path / "codes.safetensors")
    key = Key.load(places.key)
    found = verify(tmp_path / "codes.safetensors", key)
    assert (found.outcome, found.matched, found.test_count) == ("owned", 128, 1)
    assert identify(tmp_path / "codes.safetensors", [places.key], VerificationOptions()).found


def test_a_shape_that_is_no_number_is_one_line_and_closes_the_file(tmp_path: Path) -> None:
    found = forms(WEIGHT)["4 packed"] | {"a.weight_shape": torch.tensor([float("nan"), 1.0])}
    save_file(found, tmp_path / "m.safetensors")
    with pytest.raises(SuspectError, match="not finite"):
        dequantise_weights(open_weights(tmp_path / "m.safetensors"))


def test_layers_that_torch_quantised_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own quantisation deprecated
        made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        torch.save(made.state_dict(), tmp_path / "m.pt")
        with open_weights(tmp_path / "m.pt") as weights:
            assert {"0.weight", "0.bias", "2.weight"} <= weights.tensors.keys()
            read = weights.read("0.weight")
    weight = model.get_parameter("0.weight").detach().numpy()
    assert np.abs(read - weight).max() < np.abs(weight).max() / 127
