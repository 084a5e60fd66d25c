"""An ONNX file as a suspect: its initializers, the values of its Constant nodes, its layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from countermark.errors import MissingExtraError, SuspectError, printable
from countermark.weights.base import TensorInfo, Weights, digest_of, identity_of
from countermark.weights.onnx_graph import Linear, linears, parts_of

_LARGEST = 2 << 30  # bytes; protobuf itself reads no more
_MOST_TENSORS = 100_000


class OnnxWeights(Weights):
    """An ONNX model in one file. Nothing of its graph is run; values in other files are refused.

    Linear layers whose weights are stored (in, out), or as whole numbers with scales, are there
    once more, (out, in), by the layer's name where its bias has kept one.

    Raises:
        SuspectError: it is no ONNX model, too large, or names other files.
        MissingExtraError: onnx is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._identity = path, identity_of(path.stat())
        self._tensors, self._linears = self._read()
        self.tensors = {
            name: TensorInfo(tuple(tensor.dims), _dtype(tensor))
            for name, tensor in self._tensors.items()
        } | {name: TensorInfo(each.shape, "float32") for name, each in self._linears.items()}
        self.views = frozenset(self._linears)

    def _read(self) -> tuple[dict[str, Any], dict[str, Linear]]:
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
        parts = []
        try:
            for part, seen, own in parts_of(model.graph):
                found |= own
                parts.append((part, seen))
                if len(found) > _MOST_TENSORS:
                    raise ValueError(f"it has more than {_MOST_TENSORS:,} tensors")
            shapes = {name: tuple(tensor.dims) for name, tensor in found.items()}
            second: dict[str, Linear] = {}
            for part, seen in parts:
                second |= linears(part, seen, shapes)
        except (ValueError, IndexError) as error:
            raise self._refuse(printable(str(error), 200)) from None
        if not found:
            raise self._refuse("it holds no weights")
        return found, second

    def _load(self, name: str) -> NDArray[Any]:
        if name not in self._linears:
            values = self._stored(name)
        else:
            try:
                linear = self._linears[name]
                values = linear.values(self._stored)
                if values.shape != linear.shape:
                    raise ValueError(f"its shape is {list(values.shape)}")
            except (ValueError, IndexError) as error:
                said = printable(f"{name} cannot be read ({error})", 300)
                raise self._refuse(said) from None
        self.digests[name] = hashlib.sha256(values.tobytes()).hexdigest()
        return values

    def _stored(self, name: str) -> NDArray[Any]:
        """One tensor as the file has it."""
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
        return values

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, little-endian."""
        values = self._load(name)
        yield values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()

    def file_digest(self) -> str:
        """SHA-256 of the whole file, in hexadecimal."""
        return digest_of(self._path, self._identity)

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
