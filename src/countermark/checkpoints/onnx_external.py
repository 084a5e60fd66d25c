"""Read values of an ONNX model that lie in other files, as torch.onnx.export writes them.

The location of such values is text out of a hostile file. It has to be a plain path below the
model's own folder, and the file that it leads to has to be there, too, after all links.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from countermark.checkpoints.base import Identity, hash_unchanged_file, make_file_identity
from countermark.checkpoints.model_folders import resolve_inside

_MOST_FILES = 4096
# Tied tensors may share their bytes; beyond this, a small file claims to be a large model.
_MOST_SHARING = 8
# Bits of a value by ONNX's number of the dtype.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4,
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor lie: file, first byte and byte count."""

    location: str
    offset: int
    length: int


class ExternalData:
    """The files with values that belong to an ONNX model.

    Args:
        model: path of the model.
        tensors: all tensors of the model by name.

    Raises:
        ValueError: a location leads out of the folder, a file is missing, or a tensor has other
            bytes than its shape and dtype need.
    """

    def __init__(self, model: Path, tensors: Mapping[str, Any]) -> None:
        self._places = {n: _find_place(n, t) for n, t in tensors.items() if is_external(t)}
        locations = sorted({each.location for each in self._places.values()})
        if len(locations) > _MOST_FILES:
            raise ValueError(f"its values lie in {len(locations):,} other files")
        self._files: dict[str, tuple[Path, Identity]] = {}
        for location in locations:
            path = resolve_inside(model.parent, location)
            self._files[location] = path, make_file_identity(path.stat())
        self._require_room()

    def _require_room(self) -> None:
        """Raise `ValueError` if a tensor ends behind its file, or too many share their bytes."""
        sizes = {location: identity[2] for location, (_, identity) in self._files.items()}
        for name, place in self._places.items():
            if place.offset + place.length > sizes[place.location]:
                raise ValueError(
                    f"{name} ends at byte {place.offset + place.length:,} of {place.location}, "
                    f"which has {sizes[place.location]:,}"
                )
        claimed = sum(place.length for place in self._places.values())
        if claimed > _MOST_SHARING * sum(sizes.values()):
            raise ValueError(f"its tensors claim {claimed:,} bytes of smaller files")

    def read(self, name: str) -> bytes:
        """Read the bytes of one tensor.

        Raises:
            ValueError: the file was changed since the model was opened.
        """
        place = self._places[name]
        path, identity = self._files[place.location]
        with path.open("rb") as file:
            if make_file_identity(os.fstat(file.fileno())) != identity:
                raise ValueError(f"{place.location} was changed while it was read")
            file.seek(place.offset)
            return file.read(place.length)

    def compute_digests(self) -> dict[str, str]:
        """Compute the SHA-256 of each file by its location."""
        return {each: hash_unchanged_file(*found) for each, found in self._files.items()}


def is_external(tensor: Any) -> bool:
    """Return true if the values of a tensor lie in another file."""
    return bool(tensor.data_location or tensor.external_data)


def _find_place(name: str, tensor: Any) -> _Place:
    """Return where the values of a tensor lie.

    Raises:
        ValueError: the entries are no numbers, or do not fit shape and dtype.
    """
    about = {each.key: each.value for each in tensor.external_data}
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise ValueError(f"{name} has the dtype {tensor.data_type}, whose size is not known")
    needed = -(-prod(tensor.dims) * bits // 8) if all(n >= 0 for n in tensor.dims) else -1
    numbers = [about.get("offset", "0"), about.get("length", "")]
    # Twenty digits hold every 64-bit number; converting many digits takes long.
    if not all(each.isascii() and len(each) <= 20 and (each or "0").isdigit() for each in numbers):
        raise ValueError(f"offset or length of {name} are no byte numbers")
    offset, length = int(numbers[0] or 0), int(numbers[1] or needed)
    if length != needed:
        raise ValueError(f"{name} claims {needed:,} bytes by its shape and {length:,} in its file")
    return _Place(str(about.get("location", "")), offset, length)
