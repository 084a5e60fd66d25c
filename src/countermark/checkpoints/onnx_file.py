"""Read an ONNX file as a suspect: its initializers, the values of Constant nodes, linear layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from countermark.checkpoints.base import (
    TensorInfo,
    Weights,
    hash_unchanged_file,
    make_file_identity,
)
from countermark.checkpoints.onnx_external import ExternalData, is_external
from countermark.checkpoints.onnx_graph import OnnxLinearWeight, find_linear_weights, iterate_graphs
from countermark.errors import MissingExtraError, SuspectError, make_printable

_LARGEST = 2 << 30  # bytes; protobuf itself does not parse larger messages
_MOST_TENSORS = 100_000


class OnnxWeights(Weights):
    """An ONNX model, whose values may lie in files beside it. Its graph is never run.

    Linear layers whose weights are stored (in, out), or as integers with scales, get a second
    entry with the weight (out, in). The entry has the layer's name if the layer's bias, or the
    exporter's note at the product, has kept it.

    Raises:
        SuspectError: the file is no ONNX model, is too large, or refers to files elsewhere.
        MissingExtraError: onnx is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._identity = path, make_file_identity(path.stat())
        self._tensors, self._linears = self._parse_model()
        try:
            self._external = ExternalData(path, self._tensors)
        except ValueError as error:
            raise self._make_refusal(make_printable(str(error), 300)) from None
        self.tensors = {
            name: TensorInfo(tuple(tensor.dims), _name_dtype(tensor))
            for name, tensor in self._tensors.items()
        } | {name: TensorInfo(each.shape, "float32") for name, each in self._linears.items()}
        self.views = frozenset(self._linears)

    def _parse_model(self) -> tuple[dict[str, Any], dict[str, OnnxLinearWeight]]:
        """Parse the model and list its tensors and its linear layers by name.

        Raises:
            SuspectError: the file is too large, cannot be parsed, or holds no weights.
            MissingExtraError: onnx is not installed.
        """
        try:
            import onnx
        except ImportError:
            raise MissingExtraError(f"{self.name} is an ONNX file and reading it", "onnx") from None
        if self._path.stat().st_size > _LARGEST:
            raise self._make_refusal("it is larger than 2 GiB")
        try:
            model = onnx.load_model_from_string(self._path.read_bytes())
        except Exception as error:  # each backend of protobuf raises its own class
            said = make_printable(str(error).strip().partition("\n")[0], 120)
            raise self._make_refusal(f"it cannot be parsed ({said})") from None
        found: dict[str, Any] = {}
        parts = []
        try:
            for part, seen, own in iterate_graphs(model.graph):
                found |= own
                parts.append((part, seen))
                # Checked within the loop, before a hostile graph can fill the memory with names.
                if len(found) > _MOST_TENSORS:
                    raise ValueError(f"it has more than {_MOST_TENSORS:,} tensors")
            shapes = {name: tuple(tensor.dims) for name, tensor in found.items()}
            second: dict[str, OnnxLinearWeight] = {}
            for part, seen in parts:
                second |= find_linear_weights(part, seen, shapes)
        except (ValueError, IndexError) as error:
            raise self._make_refusal(make_printable(str(error), 200)) from None
        if not found:
            raise self._make_refusal("it holds no weights")
        return found, second

    def _load(self, name: str) -> NDArray[Any]:
        """Load a stored tensor, or compute the weight of a linear layer from its stored tensors."""
        if name not in self._linears:
            values = self._read_stored(name)
        else:
            try:
                linear = self._linears[name]
                values = linear.compute_values(self._read_stored)
                # The tensor was announced with this shape; callers rely on it.
                if values.shape != linear.shape:
                    raise ValueError(f"its shape is {list(values.shape)}")
            except (ValueError, IndexError) as error:
                said = make_printable(f"{name} cannot be read ({error})", 300)
                raise self._make_refusal(said) from None
        self.digests[name] = hashlib.sha256(values.tobytes()).hexdigest()
        return values

    def _read_stored(self, name: str) -> NDArray[Any]:
        """Read one tensor as the file stores it.

        Raises:
            SuspectError: the tensor claims more values than it has bytes for, cannot be
                converted, or its file was changed.
        """
        from onnx import TensorProto, numpy_helper

        tensor = self._tensors[name]
        shown = make_printable(name, 200)
        if is_external(tensor):
            try:
                raw = self._external.read(name)
            except (ValueError, OSError) as error:
                raise self._make_refusal(make_printable(str(error), 200)) from None
            tensor = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
        size = tensor.ByteSize()
        # No dtype packs more than eight values into a byte, so larger claims would only make numpy
        # allocate memory for values that are not there.
        if any(each < 0 for each in tensor.dims) or prod(tensor.dims) > 8 * size:
            raise self._make_refusal(
                f"{shown} claims {prod(tensor.dims):,} values in {size:,} bytes"
            )
        try:
            values: NDArray[Any] = numpy_helper.to_array(tensor)
            if values.dtype.kind not in "fiub":
                raise TypeError(f"dtype {values.dtype}")
        except Exception as error:  # a hostile tensor may raise anything in numpy or onnx
            said = make_printable(str(error).strip().partition("\n")[0], 120)
            raise self._make_refusal(f"{shown} cannot be read ({said})") from None
        return values

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, little-endian."""
        values = self._load(name)
        yield values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()

    def compute_file_digest(self) -> str:
        """Compute the SHA-256 of the file; with other files, of the lines of sha256sum for all."""
        own = hash_unchanged_file(self._path, self._identity)
        others = self._external.compute_digests()
        if not others:
            return own
        lines = [f"{digest}  {name}\n" for name, digest in others.items()]
        return hashlib.sha256("".join([f"{own}  {self._path.name}\n", *lines]).encode()).hexdigest()

    def close(self) -> None:
        """Drop the tensors."""
        self._tensors = {}

    def _make_refusal(self, why: str) -> SuspectError:
        """Make the error that refuses this file, with a reason."""
        return SuspectError(
            f"{self.name} is refused: {why}; expected an ONNX model with its data files beside "
            "it, or its weights as .safetensors"
        )


def _name_dtype(tensor: Any) -> str:
    """Return the dtype as numpy spells it, or ONNX's own number where numpy has no such dtype."""
    from onnx import helper

    try:
        return str(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError:
        return f"onnx {tensor.data_type}"
