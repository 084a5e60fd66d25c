"""The digest of a model: the same out of every kind of file, and of its tensors alone."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from keys import InMemory, one_line
from safetensors.torch import save_file

from countermark._internal import merkle
from countermark.checkpoints import ModelDigest, compute_model_digest, open_weights
from countermark.checkpoints.safetensors_file import SafetensorsWeights
from countermark.errors import SuspectError


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "b.weight": torch.randn(3, 5),
        "a.half": torch.randn(7).bfloat16(),
        "a.byte": torch.randint(0, 9, (2, 2), dtype=torch.uint8),
        "a.flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "wide": torch.randn(2, dtype=torch.float64),
    }


def digest(suspect: object) -> ModelDigest:
    with open_weights(suspect) as weights:  # type: ignore[arg-type]
        return compute_model_digest(weights)


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, each in state().items():
            self.register_buffer(name.replace(".", "_"), each)


def test_the_same_tensors_have_the_same_digest_in_every_form(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors", {"note": "metadata is no weight"})
    save_file(dict(reversed(state().items())), tmp_path / "r.safetensors")
    torch.save(state(), tmp_path / "m.pt")
    first = digest(tmp_path / "m.safetensors")
    assert first.tensors == 7
    assert digest(tmp_path / "r.safetensors") == digest(tmp_path / "m.pt") == first
    renamed = {name.replace(".", "_"): each for name, each in state().items()}
    save_file(renamed, tmp_path / "n.safetensors")
    assert digest(Holder()) == digest(tmp_path / "n.safetensors") != first


def test_it_is_the_tree_of_the_format() -> None:
    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(1, np.float32)}

    def part(text: bytes) -> bytes:
        return len(text).to_bytes(8, "big") + text

    leaves = [
        part(name.encode()) + part(b"F32") + part(shape) + part(hashlib.sha256(raw).digest())
        for name, shape, raw in (
            ("a", b"1", values["a"].tobytes()), ("b", b"2,3", values["b"].tobytes())
        )
    ]  # fmt: skip
    assert compute_model_digest(InMemory(values)) == ModelDigest(
        merkle.compute_root(leaves).hex(), 2
    )


def test_one_changed_bit_name_dtype_or_shape_is_another_model(tmp_path: Path) -> None:
    whole = digest_of(state(), tmp_path)
    flipped = state()
    flipped["a.byte"][1, 1] ^= 1
    others = [
        flipped,
        {("c" if name == "scalar" else name): each for name, each in state().items()},
        state() | {"b.weight": state()["b.weight"].reshape(5, 3)},
        state() | {"scalar": torch.tensor(3, dtype=torch.int32)},
        {name: each for name, each in state().items() if name != "empty"},
    ]
    digests = [digest_of(each, tmp_path) for each in others]
    assert len({each.root for each in digests} | {whole.root}) == 6


def digest_of(tensors: dict[str, torch.Tensor], folder: Path) -> ModelDigest:
    save_file(tensors, folder / "x.safetensors")
    return digest(folder / "x.safetensors")


def test_large_tensors_are_hashed_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digest_of(state(), tmp_path)
    monkeypatch.setattr("countermark.checkpoints.safetensors_file._PIECE", 3)
    assert digest(tmp_path / "x.safetensors") == whole
    with SafetensorsWeights(tmp_path / "x.safetensors") as weights:
        assert {len(each) for each in weights.read_pieces("b.weight")} == {3}


def test_what_has_no_digest_is_one_line() -> None:
    sparse, quantized = torch.nn.Module(), torch.nn.Module()
    sparse.register_buffer("s", torch.eye(3).to_sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of quantized tensors, once in a process
        quantized.register_buffer("q", torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.quint8))
    for suspect, says in (
        (torch.nn.Module(), "holds no tensors"),
        (sparse, "expected a dense one"),
        (quantized, "quint8"),
    ):
        with pytest.raises(SuspectError) as caught:
            digest(suspect)
        assert says in one_line(caught.value)
