"""Small checkpoints for the tests of stamps: files and sharded folders of any dtype."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SHAPES = {
    "embed.weight": (500, 64), "layers.0.up": (256, 128), "layers.0.down": (128, 256),
    "layers.0.bias": (256,), "layers.1.up": (256, 128), "layers.1.down": (128, 256),
}  # fmt: skip
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def tensors(dtype: str = "F32", seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights of two layers of different scales, an embedding and a step counter."""
    drawn = np.random.default_rng(seed)
    found = {
        name: torch.from_numpy(drawn.normal(0, 0.02 * (1 + at), shape)).to(DTYPES[dtype])
        for at, (name, shape) in enumerate(SHAPES.items())
    }
    return {**found, "steps": torch.tensor([7])}


def one_file(path: Path, dtype: str = "F32", seed: int = 1) -> Path:
    save_file(tensors(dtype, seed), path, metadata={"format": "pt", "made": "for tests"})
    return path


def sharded(folder: Path, dtype: str = "BF16") -> Path:
    """A folder as Hugging Face writes it: two shards, an index, a configuration, a subfolder."""
    folder.mkdir()
    found, names = tensors(dtype), [*sorted(SHAPES), "steps"]
    files = {
        "model-00001-of-00002.safetensors": names[:3],
        "model-00002-of-00002.safetensors": names[3:],
    }
    for file, held in files.items():
        save_file({name: found[name] for name in held}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder
