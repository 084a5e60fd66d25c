"""Suspects that mean no harm: every dtype, only what must be read, live modules, saving."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from keys import one_line

from countermark.checkpoints import (
    ModuleWeights,
    SafetensorsWeights,
    TensorInfo,
    TorchWeights,
    load_state,
    open_weights,
    save_weights,
)
from countermark.errors import SuspectError

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="permissions and devices of POSIX")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHAPES = [(), (1,), (0,), (3, 0, 2), (2, 3, 4), (7, 5)]


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


@pytest.mark.parametrize("word", DTYPES)
def test_every_dtype_is_read_as_the_safetensors_library_reads_it(tmp_path: Path, word: str) -> None:
    dtype, path = DTYPES[word], tmp_path / "m.safetensors"
    state = {f"t{i}": values(dtype, shape) for i, shape in enumerate(SHAPES)}
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    oracle = safetensors.torch.load_file(path)
    with open_weights(path) as weights:
        assert isinstance(weights, SafetensorsWeights)
        assert weights.tensors == {
            f"t{i}": TensorInfo(shape, word) for i, shape in enumerate(SHAPES)
        }
        for name, tensor in oracle.items():
            wide = tensor if dtype == torch.float64 else tensor.float()
            read = weights.read(name)
            assert read.dtype == (np.float64 if dtype == torch.float64 else np.float32)
            assert read.shape == tuple(tensor.shape)
            assert np.array_equal(read, wide.numpy())


@pytest.mark.parametrize("word", DTYPES)
def test_a_torch_file_is_read_alike(tmp_path: Path, word: str) -> None:
    state = {f"t{i}": values(DTYPES[word], shape) for i, shape in enumerate(SHAPES)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pt")
    with open_weights(tmp_path / "m.safetensors") as one, open_weights(tmp_path / "m.pt") as two:
        assert one.tensors.keys() == two.tensors.keys()
        for name in one.tensors:
            assert one.tensors[name].shape == two.tensors[name].shape
            assert np.array_equal(one.read(name), two.read(name))


def test_extreme_bf16_values(tmp_path: Path) -> None:
    extremes = torch.tensor([0.0, -0.0, 3.3895e38, -1.1755e-38, 9.2e-41], dtype=torch.bfloat16)
    safetensors.torch.save_file({"w": extremes}, tmp_path / "m.safetensors")
    with open_weights(tmp_path / "m.safetensors") as weights:
        assert weights.read("w").tobytes() == extremes.float().numpy().tobytes()


def test_an_unreadable_dtype_is_named_and_leaves_the_others_readable(tmp_path: Path) -> None:
    state = {"odd": torch.zeros(4).to(torch.float8_e4m3fn), "even": torch.ones(4)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    with open_weights(tmp_path / "m.safetensors") as weights:
        assert weights.read("even").tolist() == [1.0] * 4
        with pytest.raises(SuspectError, match="odd has dtype F8_E4M3") as caught:
            weights.read("odd")
    one_line(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    tensor = torch.zeros(2, 5, dtype=dtype)
    tensor[1, 2:4] = bad
    module = torch.nn.Module()
    module.register_buffer("w", tensor)
    safetensors.torch.save_file({"w": tensor}, tmp_path / "m.safetensors")
    torch.save({"w": tensor}, tmp_path / "m.pt")
    for suspect in (tmp_path / "m.safetensors", tmp_path / "m.pt", module):
        with open_weights(suspect) as weights:
            with pytest.raises(SuspectError, match="w holds 2 values that are not finite") as got:
                weights.read("w")
            one_line(got.value)


# --- how much is read, and its digests


class Counting(io.FileIO):
    """A file that counts what leaves the disk."""

    count = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer) or 0
        Counting.count += got
        return got


def test_only_header_and_wanted_tensors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    big, small = torch.randn(2_500_000), torch.randn(10, 10)
    safetensors.torch.save_file({"a": big, "small": small, "z": big + 1}, path)
    assert path.stat().st_size > 20_000_000
    monkeypatch.setattr(Counting, "count", 0)
    monkeypatch.setattr(Path, "open", lambda self, _: io.BufferedReader(Counting(self)))
    with open_weights(path) as weights:
        assert np.array_equal(weights.read("small"), small.numpy())
        assert Counting.count < 0.01 * path.stat().st_size
        weights.compute_file_digest()
        assert Counting.count > path.stat().st_size


def test_digests_are_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    state = {"header": torch.randn(3, 4), "h": torch.randn(5).half(), "unread": torch.ones(1)}
    safetensors.torch.save_file(state, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    with open_weights(path) as weights:
        weights.read("header")
        weights.read("h")
        assert weights.digests == {
            "__metadata__": hashlib.sha256(content[8 : 8 + length]).hexdigest(),
            "header": hashlib.sha256(state["header"].numpy().tobytes()).hexdigest(),
            "h": hashlib.sha256(state["h"].numpy().tobytes()).hexdigest(),
        }
        assert weights.compute_file_digest() == hashlib.sha256(content).hexdigest()
        assert np.array_equal(weights.read("header"), state["header"].numpy())
    torch.save(state, tmp_path / "m.pt")
    with open_weights(tmp_path / "m.pt") as weights:
        weights.read("header")
        assert weights.digests.keys() == {"header"}
        whole = hashlib.sha256((tmp_path / "m.pt").read_bytes()).hexdigest()
        assert weights.compute_file_digest() == whole


# --- what is opened as what


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_state_dicts_may_be_wrapped(tmp_path: Path, wrapper: str | None) -> None:
    state = {"0.weight": torch.randn(3, 2), "steps": 7, "note": "text"}
    saved = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": [0.1]}}
    torch.save(saved, tmp_path / "m.pt")
    with open_weights(str(tmp_path / "m.pt")) as weights:
        assert isinstance(weights, TorchWeights)
        assert weights.tensors == {"0.weight": TensorInfo((3, 2), "F32")}
        assert np.array_equal(weights.read("0.weight"), state["0.weight"].numpy())


class Tied(torch.nn.Module):
    """Two names for one tensor, a buffer, and extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 3)
        self.two = torch.nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("seen", torch.tensor(4))

    def get_extra_state(self) -> object:
        return {"epoch": 3}

    def set_extra_state(self, state: object) -> None:
        """Nothing to do."""


def test_a_live_module_is_read_as_it_is_now() -> None:
    module = Tied()
    with open_weights(module) as weights:
        assert isinstance(weights, ModuleWeights)
        assert weights.name == "Tied"
        assert set(weights.tensors) == {
            "one.weight", "one.bias", "two.weight", "two.bias", "seen"
        }  # fmt: skip
        with torch.no_grad():
            module.one.weight.fill_(2.5)
        assert weights.read("one.weight").tolist() == [[2.5] * 3] * 3
        assert np.array_equal(weights.read("two.weight"), weights.read("one.weight"))
        assert weights.read("seen").tolist() == 4.0
        assert weights.compute_file_digest() is None
        assert open_weights(weights) is weights


def test_a_state_dict_is_no_suspect() -> None:
    with pytest.raises(SuspectError, match="a suspect is a dict: expected a path or a torch"):
        open_weights({"2.weight": np.zeros((10, 64))})  # type: ignore[arg-type]


def test_a_module_without_values_is_refused() -> None:
    with open_weights(torch.nn.Linear(2, 2, device="meta")) as weights:
        assert weights.tensors["weight"].shape == (2, 2)
        with pytest.raises(SuspectError, match="expected dense real weights") as caught:
            weights.read("weight")
    one_line(caught.value)


@pytest.mark.parametrize("name", ["nowhere", ".", "empty", "short", "text", "nowhere/x"])
def test_what_is_no_weight_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"PK\3")
    (tmp_path / "text").write_text("{} these are not weights")
    with pytest.raises(SuspectError) as caught:
        open_weights(tmp_path / name)
    assert str(tmp_path) in one_line(caught.value)


@POSIX
@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero"])
def test_devices_are_refused(name: str) -> None:
    with pytest.raises(SuspectError, match="is no regular file"):
        open_weights(name)


# --- saving


def test_saved_weights_are_read_again(tmp_path: Path) -> None:
    module = Tied()
    state = {name: each for name, each in module.state_dict().items() if torch.is_tensor(each)}
    state["turned"] = torch.arange(6.0).reshape(2, 3).t()
    path = tmp_path / "new" / "m.safetensors"
    save_weights(state, path)
    torch.save(state, tmp_path / "m.pt")
    for loaded in (load_state(path), load_state(tmp_path / "m.pt")):
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(loaded[name], tensor)
            assert loaded[name].dtype == tensor.dtype
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_weights({"w": torch.ones(2)}, path)
    before = path.read_bytes()

    def half(_: object, place: Path) -> None:
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        save_weights({"w": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@POSIX
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_weights({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == mode
