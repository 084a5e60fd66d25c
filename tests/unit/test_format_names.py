"""Formats that are not read are called by their names, with the way to convert them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from keys import one_line
from safetensors.numpy import save_file

from countermark.checkpoints import open_weights
from countermark.errors import SuspectError


def refused(path: Path) -> str:
    with pytest.raises(SuspectError) as caught:
        open_weights(path)
    return one_line(caught.value).replace(str(path), "SUSPECT")


def zipped(*names: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return made.getvalue()


def tarred() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return made.getvalue()


def saved(write: Callable[[io.BytesIO], Any]) -> bytes:
    made = io.BytesIO()
    write(made)
    return made.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
FILES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (bytes, "an empty file", "obtain"),
    "m.safetensors": (lambda: LFS, "a Git LFS pointer", "git lfs pull"),
    "m.onnx": (lambda: LFS, "a Git LFS pointer", "git lfs pull"),
    "m.npz": (lambda: saved(lambda made: np.savez(made, a=np.ones(3))), "NumPy arrays (.npz)",
              "safetensors.numpy"),
    "m.npy": (lambda: saved(lambda made: np.save(made, np.ones(3))), "NumPy array (.npy)",
              "safetensors.numpy"),
    "m.h5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5", "keras"),
    "m.keras": (lambda: zipped("metadata.json", "model.weights.h5"), "a Keras model", "keras"),
    "m.tflite": (lambda: b"\x1c\0\0\0TFL3" + bytes(99), "TensorFlow Lite", "tflite2onnx"),
    "m.mlmodel": (lambda: b"\x08\x04" + bytes(99), "Core ML", "safetensors"),
    "saved_model.pb": (lambda: b"\x08\x01" + bytes(99), "SavedModel", "tf2onnx"),
    "m.msgpack": (lambda: b"\x82\xa6params\x81\xa1w\xc0", "msgpack, as Flax", "safetensors.flax"),
    "ggml-model.bin": (lambda: b"tjgg" + bytes(99), "a GGML file", "GGUF"),
    "m.pkl": (lambda: pickle.dumps({"coef_": [1.0]}), "a pickle that torch.save has", "safetensors"),
    "m.tar": (tarred, "a tar archive", "unpack"),
    "m.tar.gz": (lambda: b"\x1f\x8b\x08" + bytes(99), "a compressed archive", "unpack"),
    "m.zip": (lambda: zipped("model.safetensors"), "a zip archive without the data.pkl",
              "safetensors"),
    "config.json": (lambda: b'{"hidden": {"size": 3}}', "JSON", "weight file"),
    "list.json": (lambda: b'  [{"a": 1}]', "JSON", "weight file"),
    "page.safetensors": (lambda: b"\n<!DOCTYPE html><html>Sign in", "HTML", "download"),
    "m.png": (lambda: saved(lambda made: PIL.Image.new("L", (2, 2)).save(made, "png")),
              "a picture", "images"),
    "noise": (lambda: b"\xff" * 99, "not known here", "safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    make, called, advice = FILES[name]
    (tmp_path / name).write_bytes(make())
    said = refused(tmp_path / name)
    assert called in said
    assert advice in said


FOLDERS: dict[str, tuple[list[str], str, str]] = {
    "distributed": (["__0_0.distcp"], "without its .metadata", "whole folder"),
    "pipeline": (["model_index.json", "unet/a.safetensors"], "diffusers pipeline", "sub-folder"),
    "saved model": (["saved_model.pb", "variables/variables.index"], "SavedModel", "tf2onnx"),
    "core ml": (["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"], "Core ML", "safetensors"),
    "flax": (["config.json", "flax_model.msgpack"], "Flax", "safetensors.flax"),
    "orbax": (["_CHECKPOINT_METADATA", "d/0"], "Orbax", "safetensors"),
    "tensorflow": (["checkpoint", "m.ckpt.index"], "TensorFlow checkpoint", "safetensors"),
    "hub": (["models--a--b/refs/main", "models--a--c/refs/main"], "cache of the Hub", "models--"),
    "nothing": (["readme.md"], "holds no checkpoint", "safetensors"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    files, called, advice = FOLDERS[name]
    for each in files:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_bytes(b"{}")
    said = refused(tmp_path)
    assert called in said
    assert advice in said


def test_a_folder_of_a_model_in_another_form_is_read_as_before(tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 2), np.float32)}, tmp_path / "m.safetensors")
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x81")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with open_weights(tmp_path) as weights:
        assert weights.tensors.keys() == {"a"}
