"""Checkpoints in several files as suspects: read by name, and refused where the index lies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keys import one_line

from checkpoints import SHAPES, one_file, sharded, tensors
from countermark.checkpoints import compute_model_digest, load_state, open_weights
from countermark.errors import SuspectError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_folder_of_shards_is_one_suspect(tmp_path: Path) -> None:
    folder, whole = sharded(tmp_path / "m"), one_file(tmp_path / "one.safetensors", "BF16")
    with open_weights(folder) as weights, open_weights(whole) as one:
        assert weights.name == str(folder)
        assert dict(weights.tensors) == dict(one.tensors)
        assert compute_model_digest(weights) == compute_model_digest(one)
        for name in SHAPES:
            assert np.array_equal(weights.read(name), one.read(name))
            part = weights.read_part(name, 17, 100)
            assert np.array_equal(part, one.read(name).reshape(-1)[17:117])
            assert weights.digests[name] == one.digests[name]
            raw = b"".join(weights.read_pieces(name))[34:234]
            assert weights.digests[f"{name}, in part"] == hashlib.sha256(raw).hexdigest()
        assert set(weights.digests) >= {INDEX, f"{FIRST} __metadata__", f"{SECOND} __metadata__"}
        listed = "".join(
            f"{hashlib.sha256((folder / each).read_bytes()).hexdigest()}  {each}\n"
            for each in (FIRST, SECOND)
        )
        assert weights.compute_file_digest() == hashlib.sha256(listed.encode()).hexdigest()
    with open_weights(folder / INDEX) as weights:
        assert len(weights.tensors) == len(SHAPES) + 1
    state = load_state(folder)
    assert all((state[name] == each).all() for name, each in tensors("BF16").items())


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    one_file(tmp_path / "m" / "model.safetensors")
    with open_weights(tmp_path / "m") as weights:
        assert weights.name == str(tmp_path / "m" / "model.safetensors")
    one_file(tmp_path / "m" / "other.safetensors")
    assert "holds 2 of *.safetensors" in refused(tmp_path / "m")
    (tmp_path / "m" / "key.json").touch()
    assert "it is a key" in refused(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refused(tmp_path / "empty")


def refused(path: Path) -> str:
    with pytest.raises(SuspectError) as caught:
        open_weights(path)
    return one_line(caught.value)


def moved(index: dict[str, Any], to: str) -> dict[str, Any]:
    return index | {"weight_map": index["weight_map"] | {"steps": to}}


LIES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda index: moved(index, "../secret.safetensors"), "no name of a file beside it"),
    (lambda index: moved(index, "/etc/passwd"), "no name of a file beside it"),
    (lambda index: moved(index, ".hidden.safetensors"), "no name of a file beside it"),
    (lambda index: moved(index, "a/b.safetensors"), "no name of a file beside it"),
    (lambda index: moved(index, "absent.safetensors"), "absent.safetensors cannot be read"),
    (lambda index: moved(index, "folder.safetensors"), "folder.safetensors cannot be read"),
    (lambda index: index | {"weight_map": {}}, "it names 0 files"),
    (lambda index: index | {"weight_map": {"a": 1}}, "no map from tensors to files"),
    (lambda index: index | {"weight_map": ["a"]}, "no map from tensors to files"),
    (lambda _: {"metadata": {}}, "weight_map"),
    (lambda _: ["weight_map"], "no index of a checkpoint"),
    (
        lambda _: {"weight_map": {f"t{n}": f"s{n}.safetensors" for n in range(5000)}},
        "it names 5000 files",
    ),
]


@pytest.mark.parametrize(("lie", "says"), LIES, ids=[says for _, says in LIES])
def test_an_index_that_lies_is_refused(
    tmp_path: Path, lie: Callable[[dict[str, Any]], Any], says: str
) -> None:
    folder = sharded(tmp_path / "m")
    one_file(tmp_path / "secret.safetensors")
    (folder / "folder.safetensors").mkdir()
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(lie(index)))
    assert says in refused(folder)


def test_an_index_that_names_other_tensors_than_its_files_is_a_caveat(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {"more": FIRST}
    del index["weight_map"]["steps"]
    (folder / INDEX).write_text(json.dumps(index))
    with open_weights(folder) as weights:
        assert weights.tensors.keys() == {*SHAPES, "steps"}
        assert weights.notes == (
            f"{INDEX} names tensors that its files do not hold: 1, of which the first is more",
            f"{INDEX} does not name tensors that its files hold: 1, of which the first is steps",
        )


def test_an_index_may_name_torch_files(tmp_path: Path) -> None:
    state = {name: torch.ones(2, 3) * at for at, name in enumerate("abc")}
    torch.save({"a": state["a"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({n: state[n] for n in "bc"}, tmp_path / "pytorch_model-2.bin")
    home = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin", "c": "pytorch_model-2.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": home}))
    for place in (tmp_path, index):
        with open_weights(place) as weights:
            assert weights.tensors.keys() == state.keys()
            assert all(np.array_equal(weights.read(n), state[n].numpy()) for n in state)
            assert weights.read_part("c", 1, 2).tolist() == [2.0, 2.0]
    assert all(torch.equal(each, state[n]) for n, each in load_state(tmp_path).items())
    (tmp_path / "pytorch_model-2.bin").unlink()
    assert "pytorch_model-2.bin cannot be read" in refused(tmp_path)
    os.mkfifo(tmp_path / "pytorch_model-2.bin")
    assert "no regular file" in refused(tmp_path)
    index.unlink()
    assert "holds no checkpoint" in refused(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with open_weights(tmp_path) as weights:
        assert weights.tensors.keys() == state.keys()


def test_a_shard_that_is_cut_or_gone_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:-1])
    assert SECOND in refused(folder)
    (folder / SECOND).unlink()
    assert f"{SECOND} cannot be read" in refused(folder)
    assert "expected every file of the checkpoint" in refused(folder)
