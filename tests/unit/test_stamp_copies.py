"""What `stamp` copies of a folder beside the checkpoint: the other modules, and no other model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import one_file, tensors
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths

DENSE = {"linear.weight": torch.ones(64, 32)}


def stamped(folder: Path, modules: object) -> tuple[set[str], set[str]]:
    """Files of the copy and files that were left out, of a sentence-transformers folder."""
    source = folder / "m"
    for name in ("2_Dense", "3_Twin", "original"):
        (source / name).mkdir(parents=True)
    one_file(source / "model.safetensors")
    save_file(DENSE, source / "2_Dense" / "model.safetensors")
    torch.save(DENSE, source / "2_Dense" / "pytorch_model.bin")
    (source / "2_Dense" / "odd.bin").write_bytes(b"no weights")
    half = {name: each.half() for name, each in tensors().items()}
    save_file(half, source / "3_Twin" / "model.safetensors")
    save_file({"renamed": half["embed.weight"]}, source / "original" / "model.safetensors")
    (source / "modules.json").write_text(json.dumps(modules))
    with pytest.warns(UserWarning, match=r"left out.*original/model\.safetensors"):
        result = stamp(source, StampPaths(folder / "out", folder / "a.key"), owner="ACME")
    found = {str(each.relative_to(folder / "out")) for each in (folder / "out").rglob("*.*")}
    return found, set(result.left_out)


def test_other_modules_are_kept_and_other_models_are_left_out(tmp_path: Path) -> None:
    modules = [{"path": ""}, {"path": "2_Dense"}, {"path": "3_Twin"}, {"path": "../../etc"}]
    found, left_out = stamped(tmp_path, modules)
    assert found == {
        "model.safetensors", "modules.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"
    }  # fmt: skip
    assert left_out == {
        "2_Dense/odd.bin", "3_Twin/model.safetensors", "original/model.safetensors"
    }  # fmt: skip
    for name in ("model.safetensors", "pytorch_model.bin"):
        copied, source = (tmp_path / each / "2_Dense" / name for each in ("out", "m"))
        assert copied.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("modules", [[], {}, "2_Dense", [{"path": 2}], [["path"]], None])
def test_without_a_list_of_modules_weight_files_are_left_out(
    tmp_path: Path, modules: object
) -> None:
    found, left_out = stamped(tmp_path, modules)
    assert found == {"model.safetensors", "modules.json"}
    assert "2_Dense/model.safetensors" in left_out
