"""Stores that name weight files by digest or by links: the Hub's cache, Ollama, OCI layouts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keys import one_line
from safetensors.numpy import save

from checkpoints import sharded
from countermark.checkpoints import open_weights
from countermark.errors import SuspectError
from gguf_files import write_gguf

WEIGHTS = save({"a": np.ones((2, 2), np.float32)})
OLLAMA, TITLE = "application/vnd.ollama.image.model", "org.opencontainers.image.title"


def put_blob(store: Path, content: bytes, between: str = "-") -> str:
    """Put a blob into a store; returns its digest."""
    found = hashlib.sha256(content).hexdigest()
    place = store / "blobs" / f"sha256{between}{found}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return f"sha256:{found}"


def names_of(path: Path) -> set[str]:
    with open_weights(path) as weights:
        return set(weights.tensors)


def refused(path: Path) -> str:
    with pytest.raises(SuspectError) as caught:
        open_weights(path)
    return one_line(caught.value)


def cached(folder: Path, revision: str = "0123") -> Path:
    """A repository of the Hub's cache with one snapshot, whose files are links to blobs."""
    root, whole = folder / "models--acme--m", sharded(folder / revision)
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for each in whole.iterdir():
        if each.is_file():
            found = put_blob(root, each.read_bytes()).replace(":", "-")
            (snapshot / each.name).symlink_to(f"../../blobs/{found}")
    return root


def test_the_one_snapshot_of_a_cached_repository_is_read(tmp_path: Path) -> None:
    root = cached(tmp_path)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123")
    assert "embed.weight" in names_of(root)
    cached(tmp_path, "4567")
    said = refused(root)
    assert "2 snapshots: snapshots/0123, snapshots/4567" in said
    assert "embed.weight" in names_of(root / "snapshots" / "0123")


def test_values_of_a_cached_onnx_model_are_read_through_links(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.onnx.data")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    root = tmp_path / "models--acme--m"
    snapshot = root / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    files = {"m.onnx": model.SerializeToString(), "m.onnx.data": np.ones(2, "f4").tobytes()}
    for name, content in files.items():
        found = put_blob(root, content).replace(":", "-")
        (snapshot / name).symlink_to(f"../../blobs/{found}")
    with open_weights(root) as weights:
        assert np.array_equal(weights.read("t"), np.ones(2))
    (tmp_path / "elsewhere").write_bytes(bytes(8))
    (snapshot / "m.onnx.data").unlink()
    (snapshot / "m.onnx.data").symlink_to("../../../elsewhere")
    assert "leads out of the model's own folder" in refused(root)


def manifest(*layers: tuple[str, str, str]) -> dict[str, Any]:
    """A manifest of layers, each as media type, digest and file name."""
    return {
        "schemaVersion": 2,
        "layers": [
            {"mediaType": media, "digest": digest, "size": 1}
            | ({"annotations": {TITLE: title}} if title else {})
            for media, digest, title in layers
        ],
    }


def ollama(store: Path, *layers: tuple[str, str, str]) -> Path:
    path = store / "manifests" / "registry.ollama.ai" / "library" / "m" / "latest"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest(*layers)))
    return path


def test_a_model_of_ollama_is_read(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "m", {"output.weight": np.ones((2, 2), np.float32)})
    store = tmp_path / "models"
    digest = put_blob(store, content.read_bytes())
    notice = put_blob(store, b"do as you like")
    path = ollama(store, ("application/vnd.ollama.image.license", notice, ""), (OLLAMA, digest, ""))
    assert names_of(path) == names_of(store) == {"lm_head.weight"}
    (path.parent / "small").write_bytes(path.read_bytes())
    assert "2 manifests: manifests/registry.ollama.ai/library/m/latest" in refused(store)


def layout(folder: Path, *layers: tuple[str, str, str]) -> Path:
    digest = put_blob(folder, json.dumps(manifest(*layers)).encode(), "/")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    index = {"schemaVersion": 2, "manifests": [{"mediaType": "m", "digest": digest, "size": 1}]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_the_weights_of_an_oci_layout_are_read(tmp_path: Path) -> None:
    weights = put_blob(tmp_path, WEIGHTS, "/")
    other = put_blob(tmp_path, b"{}", "/")
    for number, layer in enumerate([
        ("application/octet-stream", weights, "model.safetensors"),
        ("application/vnd.docker.ai.safetensors", weights, ""),
        ("application/vnd.cncf.model.weight.v1.raw", weights, ""),
    ]):  # fmt: skip
        folder = layout(tmp_path, ("application/json", other, "config.json"), layer)
        assert names_of(folder) == {"a"}, number
        assert names_of(folder / "index.json") == {"a"}


SHA = "sha256:" + "0" * 64
LIES = [
    ([(OLLAMA, SHA, "")], "cannot be read"),
    ([(OLLAMA, "sha256:../../secret", "")], "no SHA-256 digest"),
    ([(OLLAMA, "sha256:" + "A" * 64, "")], "no SHA-256 digest"),
    ([(OLLAMA, SHA, ""), (OLLAMA, SHA, "")], "2 layers with weights"),
    ([("application/json", SHA, "")], "0 layers with weights"),
    ([(OLLAMA, SHA, "template.txt")], "0 layers with weights"),
]


@pytest.mark.parametrize(("layers", "why"), LIES, ids=[why for _, why in LIES])
def test_a_manifest_that_lies_is_refused(
    tmp_path: Path, layers: list[tuple[str, str, str]], why: str
) -> None:
    put_blob(tmp_path, b"other")
    assert why in refused(ollama(tmp_path, *layers))
    assert why in refused(layout(tmp_path / "oci", *layers))


def test_a_blob_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(WEIGHTS)
    store = tmp_path / "models"
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / SHA.replace(":", "-")).symlink_to("../../secret")
    assert "leads out" in refused(ollama(store, (OLLAMA, SHA, "")))


def test_a_blob_that_is_a_manifest_again_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    path = ollama(tmp_path, (OLLAMA, SHA, ""))
    (tmp_path / "blobs" / SHA.replace(":", "-")).write_bytes(path.read_bytes())
    assert "JSON" in refused(path)


@pytest.mark.parametrize(
    "content",
    [b'{"schemaVersion": 2}', b'{"schemaVersion": 2, "layers": [3]}',
     b'{"schemaVersion": 2, "layers": 3}', b'{"schemaVersion": 2, "layers": [{}]}',
     b'{"schemaVersion": 2, "layers": [{"annotations": 3}]}',
     b'{"schemaVersion": 2, "manifests": [3]}', b'{"schemaVersion": 2, "manifests": []}'],
)  # fmt: skip
def test_a_document_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "manifest.json").write_bytes(content)
    assert "leads to no weights" in refused(tmp_path / "manifest.json")


def test_a_manifest_without_blobs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest((OLLAMA, SHA, ""))))
    assert "no folder blobs" in refused(tmp_path / "manifest.json")
