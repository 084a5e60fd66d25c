"""Stamp tensors that lie in memory, and give them to `verify` as a suspect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from countermark.keys.key import Key
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths

Tensors = dict[str, NDArray[np.float32]]


def draw_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> Tensors:
    """Draw the weights of a model by name."""
    drawn = np.random.default_rng(seed)
    return {n: drawn.normal(0, 0.02, shape).astype(np.float32) for n, shape in shapes.items()}


def stamp_tensors(
    tensors: Tensors, folder: Path, *, keep_before: bool = True, **fields: object
) -> tuple[Tensors, Key]:
    """Return marked tensors, and the key of their mark."""
    save_file(tensors, folder / "plain.safetensors")
    places = StampPaths(folder / "marked.safetensors", folder / "key")
    made = stamp(
        folder / "plain.safetensors", places, owner="ACME", fields=fields, keep_before=keep_before
    )
    return dict(load_file(places.out)), made.key
