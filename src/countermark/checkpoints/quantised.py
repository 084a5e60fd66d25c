"""Read weights that are stored as codes as the numbers that the codes stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from countermark._internal.files import parse_json, read_regular
from countermark.checkpoints.base import Array, Weights
from countermark.checkpoints.code_source import CodeSource
from countermark.checkpoints.coded_formats import FORMATS
from countermark.checkpoints.coded_tensor import CodedTensor
from countermark.checkpoints.module import ModuleWeights
from countermark.checkpoints.wrapped import ComputedWeights
from countermark.errors import SuspectError, make_printable

# Files beside a checkpoint that say how its codes are made, with the part that says it.
_CONFIGURATIONS = (
    ("config.json", "quantization_config"),
    ("config.json", "quantization"),  # MLX
    ("quantize_config.json", None),  # GPTQ, before transformers knew it
)
_LARGEST_CONFIGURATION = 10_000_000  # bytes; MLX may list every layer


def dequantise_weights(weights: Weights) -> Weights:
    """Add a view with numbers for every tensor of open weights that is stored as codes.

    Returns: `weights` itself if nothing is stored as codes; closing either closes the file.

    Raises:
        SuspectError: a tensor that tells how codes are packed cannot be read; the file is closed
            in this case.
    """
    try:
        found = find_coded_tensors(weights)
    except SuspectError:
        weights.close()
        raise
    return DequantisedWeights(weights, found) if found else weights


def find_coded_tensors(weights: Weights) -> dict[str, CodedTensor]:
    """Find the tensors of open weights that are stored as codes, by the weights they stand for.

    Raises:
        SuspectError: a tensor that tells how codes are packed cannot be read.
    """
    source = CodeSource(weights, _read_configuration(weights))
    return dict(_find_coded_tensors(source))


class DequantisedWeights(ComputedWeights):
    """Open weights with a view for each tensor that is stored as codes; closing it closes them.

    Args:
        weights: open weights.
        codes: the tensors that are stored as codes, by the name of the weight that they stand for.
    """

    def __init__(self, weights: Weights, codes: dict[str, CodedTensor]) -> None:
        super().__init__(weights, {name: each.shape for name, each in codes.items()})
        self._codes = codes

    def _compute(self, name: str) -> NDArray[Any]:
        """Compute the numbers of all codes of a weight."""
        shape = self._codes[name].shape
        return self._compute_part(name, 0, prod(shape)).reshape(shape)

    def _compute_part(self, name: str, start: int, count: int) -> Array:
        """Compute numbers (count,) of a tensor that is stored as codes.

        Raises:
            SuspectError: scales or zero points do not fit the codes.
        """
        try:
            return self._codes[name].read_part(start, count)
        except ValueError as error:
            said = make_printable(f"{name} cannot be read ({error})", 300)
            raise SuspectError(
                f"{self.name}: {said}: expected codes with one scale, or one for each row or block"
            ) from None


def _find_coded_tensors(source: CodeSource) -> Iterator[tuple[str, CodedTensor]]:
    """Yield the tensors that are stored as codes, by the name of the weight that they stand for."""
    taken = set(source.weights.tensors)
    for name in source.weights.tensors:
        found = next(filter(None, (find(source, name) for find in FORMATS)), None)
        # A weight that is stored as numbers as well is read from these.
        if found and (found[0] == name or found[0] not in taken):
            taken.add(found[0])
            yield found


def _read_configuration(weights: Weights) -> Mapping[str, Any]:
    """Read what a checkpoint's configuration says about codes; {} if it says nothing valid."""
    if isinstance(weights, ModuleWeights):  # its name is no path
        return {}
    place = Path(weights.name)
    folder = place if place.is_dir() else place.parent
    for file, part in _CONFIGURATIONS:
        try:
            said = parse_json(read_regular(folder / file, _LARGEST_CONFIGURATION))
        except (OSError, ValueError):
            continue
        if isinstance(found := said.get(part) if part and isinstance(said, dict) else said, dict):
            return found
    return {}
