"""An ONNX file as a suspect: its initializers, and the values of its Constant nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from countermark.errors import MissingExtraError, SuspectError, printable
from countermark.weights.base import TensorInfo, Weights

_LARGEST = 2 << 30  # bytes; protobuf itself reads no more
_MOST_TENSORS = 100_000


class OnnxWeights(Weights):
    """An ONNX model in one file. Nothing of its graph is run; values in other files are refused.

    Raises:
        SuspectError: it is no ONNX model, too large, or names other files.
        MissingExtraError: onnx is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._tensors = self._read()
        self.tensors = {
            name: TensorInfo(tuple(tensor.dims), _dtype(tensor))
            for name, tensor in self._tensors.items()
        }

    def _read(self) -> dict[str, Any]:
        try:
            import onnx
        except ImportError:
            raise MissingExtraError(f"{self.name} is an ONNX file and reading it", "onnx") from None
        if self._path.stat().st_size > _LARGEST:
            raise self._refuse("it is larger than 2 GiB")
        try:
            model = onnx.load_model_from_string(self._path.read_bytes())
        except Exception as error:  # protobuf raises a kind of its own for each backend
            said = printable(str(error).strip().partition("\n")[0], 120)
            raise self._refuse(f"it cannot be parsed ({said})") from None
        found: dict[str, Any] = {}
        for name, tensor in _values(model.graph):
            if len(found) >= _MOST_TENSORS:
                raise self._refuse(f"it has more than {_MOST_TENSORS:,} tensors")
            if name in found:
                raise self._refuse(f"{printable(name, 200)} is there twice")
            found[name] = tensor
        if not found:
            raise self._refuse("it holds no weights")
        return found

    def _load(self, name: str) -> NDArray[Any]:
        from onnx import numpy_helper

        tensor = self._tensors[name]
        shown = printable(name, 200)
        if tensor.data_location or tensor.external_data:
            raise self._refuse(f"{shown} lies in another file")
        size = tensor.ByteSize()
        if any(each < 0 for each in tensor.dims) or prod(tensor.dims) > 8 * size:
            raise self._refuse(f"{shown} claims {prod(tensor.dims):,} values in {size:,} bytes")
        try:
            values: NDArray[Any] = numpy_helper.to_array(tensor)
            if values.dtype.kind not in "fiub":
                raise TypeError(f"dtype {values.dtype}")
        except Exception as error:  # whatever a hostile tensor runs into
            said = printable(str(error).strip().partition("\n")[0], 120)
            raise self._refuse(f"{shown} cannot be read ({said})") from None
        self.digests[name] = hashlib.sha256(values.tobytes()).hexdigest()
        return values

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, little-endian."""
        values = self._load(name)
        yield values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()

    def file_digest(self) -> str:
        """SHA-256 of the whole file, in hexadecimal."""
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Let go of the tensors."""
        self._tensors = {}

    def _refuse(self, why: str) -> SuspectError:
        return SuspectError(
            f"{self.name} is refused: {why}; expected an ONNX model in one file, or its weights "
            "as .safetensors"
        )


def _dtype(tensor: Any) -> str:
    """The dtype in numpy's word; a number of ONNX's own where numpy has none."""
    from onnx import helper

    try:
        return str(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError:
        return f"onnx {tensor.data_type}"


def _values(graph: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of a graph by name."""
    yield from ((each.name, each) for each in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and node.output:
                yield node.output[0], attribute.t
