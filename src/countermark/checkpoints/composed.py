"""Read weights that are stored as several tensors as the weight that a layer computes with.

    NAME_orig, NAME_mask                        torch pruning          orig * mask
    NAME_g, NAME_v                              weight norm            g * v / |v|
    LAYER.parametrizations.NAME.original0, .original1   weight norm    the same
    LAYER.base_layer.weight, LAYER.lora_A.ADAPTER.weight, LAYER.lora_B.ADAPTER.weight
                                                LoRA                   base + scaling * B A

The scaling of LoRA is in no tensor: it is read from `adapter_config.json` beside the file. Without
it the base weight is all that can be read, under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark._internal.files import parse_json, read_regular
from countermark.checkpoints.base import Array, Weights
from countermark.checkpoints.wrapped import ComputedWeights

_LARGEST_CONFIG = 1 << 20  # bytes
_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ComposedTensor:
    """A weight that is computed from other tensors.

    Attributes:
        parts: their names.
        shape: of the weight.
        compose: computes it.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    compose: Callable[..., NDArray[Any]]


def compose_weights(weights: Weights) -> Weights:
    """Add a view for every weight of open weights that is stored as several tensors.

    Returns: `weights` itself if there is none; closing either closes the file.
    """
    found = {
        name: each
        for name, each in [*_find_pruned(weights), *_find_normed(weights), *_find_adapted(weights)]
        if name not in weights.tensors
    }
    return ComposedWeights(weights, found) if found else weights


class ComposedWeights(ComputedWeights):
    """Open weights with a view for each weight that is stored as several tensors.

    Args:
        weights: open weights; closing this object closes them.
        composed: the weights that are stored as several tensors, by name.
    """

    def __init__(self, weights: Weights, composed: dict[str, ComposedTensor]) -> None:
        super().__init__(weights, {name: each.shape for name, each in composed.items()})
        self._composed = composed

    def _compute(self, name: str) -> NDArray[Any]:
        """Compose one weight."""
        composed = self._composed[name]
        with np.errstate(all="ignore"):  # `read` refuses values that are not finite
            return composed.compose(*map(self._weights.read, composed.parts)).astype(np.float32)


def _find_pruned(weights: Weights) -> Iterator[tuple[str, ComposedTensor]]:
    """Yield the weights that are stored as a tensor and a mask over it."""
    for name, info in weights.tensors.items():
        base = name.removesuffix("_orig")
        mask = weights.tensors.get(f"{base}_mask")
        if base != name and mask is not None and mask.shape == info.shape:
            yield base, ComposedTensor((name, f"{base}_mask"), info.shape, np.multiply)


def _find_normed(weights: Weights) -> Iterator[tuple[str, ComposedTensor]]:
    """Yield the weights that are stored as a direction and its length."""
    for name, info in weights.tensors.items():
        if name.endswith("_v"):
            base, length = name.removesuffix("_v"), f"{name.removesuffix('_v')}_g"
        elif ".parametrizations." in name and name.endswith(".original1"):
            length = f"{name.removesuffix('1')}0"
            base = name.removesuffix(".original1").replace(".parametrizations.", ".", 1)
        else:
            continue
        if length not in weights.tensors:
            continue
        sizes = weights.tensors[length].shape
        # The length has one value, or one for each step along an axis; its other sizes are 1.
        if all(n in (1, whole) for n, whole in zip(sizes, info.shape, strict=False)) and (
            len(sizes) in (0, len(info.shape))
        ):
            yield base, ComposedTensor((length, name), info.shape, _apply_length)


def _apply_length(length: Array, direction: Array) -> Array:
    """Return the weight of a layer with weight norm.

    Args:
        length: one value, or one for each step along an axis.
        direction: the tensor whose norm over all other axes becomes this length.
    """
    axes = tuple(at for at in range(direction.ndim) if length.ndim == 0 or length.shape[at] == 1)
    wide = direction.astype(np.float64)
    found: Array = wide * (length / np.sqrt(np.square(wide).sum(axis=axes, keepdims=True)))
    return found


def _find_adapted(weights: Weights) -> Iterator[tuple[str, ComposedTensor]]:
    """Yield the weights of layers with one LoRA adapter whose scaling is known."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for name in weights.tensors:
        layer, _, rest = name.partition(".lora_A.")
        if rest and f"{layer}.lora_B.{rest}" in weights.tensors:
            pairs.setdefault(layer, []).append((name, f"{layer}.lora_B.{rest}"))
    if not pairs or (config := _read_adapter_config(weights)) is None:
        return
    for layer, ((a, b), *others) in pairs.items():
        base = f"{layer}.base_layer.weight"
        if others or base not in weights.tensors:
            continue
        whole, (low, high) = weights.tensors[base].shape, (weights.tensors[n].shape for n in (a, b))
        if len(low) == len(high) == 2 and low[:1] == high[1:] and whole == (high[0], low[1]):
            rank = math.sqrt(low[0]) if config[1] else low[0]
            scaling = config[0] / rank if rank else 0.0
            yield f"{layer}.weight", ComposedTensor((base, b, a), whole, _make_adder(scaling))


def _make_adder(scaling: float) -> Callable[[Array, Array, Array], Array]:
    """Make the function that adds a scaled product of two matrices to a third."""
    return lambda base, high, low: base + scaling * (high.astype(np.float64) @ low)


def _read_adapter_config(weights: Weights) -> tuple[float, bool] | None:
    """Read alpha and whether it is divided by the root of the rank; None if that is not all."""
    place = Path(weights.name)
    folder = place if place.is_dir() else place.parent
    try:
        config = parse_json(read_regular(folder / _ADAPTER_CONFIG, _LARGEST_CONFIG))
        alpha = config["lora_alpha"]
        # Layers with an alpha or a rank of their own, and other ways to add, are not known here.
        special = any(config.get(each) for each in ("rank_pattern", "alpha_pattern", "use_dora"))
        by_root = bool(config.get("use_rslora"))
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        return None
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    return (float(alpha), by_root) if is_number and not special else None
