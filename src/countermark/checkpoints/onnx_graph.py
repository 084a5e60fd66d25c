"""Find the tensors of an ONNX graph and the linear layers that read them.

Exporters store the weight (out, in) of a linear layer as (in, out), for MatMul, and give it a name
of their own, but keep the name of the layer's bias, or note the module at the product. Quantisers
store integers with scales beside them. This module gives such a tensor a second entry in the form
that the layer has. The graph is never run.
"""

from __future__ import annotations

import re
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
TRANSPOSED = ", transposed"
"""Suffix of the name of the transposed copy of a matrix whose orientation no bias shows."""

_PRODUCTS = ("MatMul", "MatMulInteger", "Gemm")
# Nodes that quantisers put between an integer product and its bias.
_PASSED = ("Cast", "Mul")
# How many nodes may stand between a product and its bias.
_MOST_BETWEEN = 4
# Reading a graph takes time for every name that it sees, so the sum over all graphs is bounded: a
# hostile file could nest many graphs that each see many tensors.
_MOST_PARTS, _MOST_SEEN = 1 << 12, 1 << 22
# torch notes the modules around a node as a list of names that ends with module and operation.
_SCOPES, _MODULE = "pkg.torch.onnx.name_scopes", re.compile(r"'([^'\\]+)', '[^']*'\]\Z")
_LONGEST_SCOPES = 4096
_ZERO = 8  # zero point of 4-bit numbers without a tensor of zero points


@dataclass(frozen=True)
class OnnxLinearWeight:
    """The recipe that computes the weight of a layer from stored tensors.

    Attributes:
        shape: (out, in), or the shape of the stored tensor.
        stored, scale, zero: names of the tensors that hold values, scales and zero points.
        axis: the axis of the stored tensor along which scales and zero points differ.
        block: how many values of a row of 4-bit numbers share a scale; 0 for other numbers.
        turned: the stored tensor is (in, out).
    """

    shape: tuple[int, ...]
    stored: str
    scale: str | None = None
    zero: str | None = None
    axis: int = 0
    block: int = 0
    turned: bool = False

    def compute_values(self, read: Callable[[str], Array]) -> Array:
        """Compute the values in `shape`.

        Args:
            read: returns a stored tensor by name.

        Raises:
            ValueError: the scales do not fit the values.
        """
        stored = read(self.stored)
        if self.scale is None:
            return stored.T if self.turned else stored
        scale = read(self.scale).astype(np.float32)
        if self.block:
            return self._unpack_four_bits(stored, scale)
        zero = read(self.zero).astype(np.float32) if self.zero else np.zeros(1, np.float32)
        wide = stored.astype(np.float32) - self._spread_along_axis(zero, stored)
        with np.errstate(over="ignore", invalid="ignore"):  # `Weights.read` refuses infinities
            found = wide * self._spread_along_axis(scale, stored)
        return found.T if self.turned else found

    def _spread_along_axis(self, each: Array, stored: Array) -> Array:
        """Reshape one number, or one number a place along the axis, to broadcast over `stored`.

        Raises:
            ValueError: the count of numbers does not fit the axis.
        """
        if each.size == 1:
            return each.reshape(1)
        if each.size != stored.shape[self.axis]:
            raise ValueError(f"{each.size} scales for {stored.shape[self.axis]} places")
        # All other axes have length 1, so that numpy broadcasts along them.
        shape = [-1 if axis == self.axis else 1 for axis in range(stored.ndim)]
        return each.reshape(shape)

    def _unpack_four_bits(self, stored: Array, scale: Array) -> Array:
        """Unpack blocks of 4-bit numbers to a weight (out, in).

        Args:
            stored: uint8 (out, blocks, block / 2); the lower half of a byte is the first number.
            scale: one scale for each block, in order.

        Raises:
            ValueError: the scales or the dtype do not fit the stored numbers.
        """
        rows, width = self.shape
        if scale.size * self.block != 2 * stored.size:
            raise ValueError(f"{scale.size} scales for {2 * stored.size} numbers")
        if stored.dtype != np.uint8:
            raise ValueError(f"4-bit numbers as {stored.dtype}")
        halves = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.float32)
        blocks = halves.reshape(rows, -1, self.block) - _ZERO  # (out, blocks, block)
        found = blocks * scale.reshape(rows, -1, 1)
        return found.reshape(rows, -1)[:, :width]


def iterate_graphs(graph: Any) -> Iterator[tuple[Any, Mapping[str, str], dict[str, Any]]]:
    """Yield a graph and all graphs nested in it, with the tensor names that each graph sees.

    Yields:
        The graph; a map from each visible name to a name that is unique in the whole model; the
        graph's own tensors by their unique names.

    Raises:
        ValueError: a graph defines a name twice, a name is no text, or there are too many graphs
            or tensors.
    """
    taken: set[str] = set()
    left: list[tuple[Any, ChainMap[str, str], int]] = [(graph, ChainMap(), 0)]
    count = total = 0
    while left:
        part, outer, visible = left.pop()
        count += 1
        # An explicit stack instead of recursion: nesting depth is the thief's choice.
        if count > _MOST_PARTS:
            raise ValueError(f"it has more than {_MOST_PARTS:,} graphs")
        _require_text(part)
        own: dict[str, Any] = {}
        seen: dict[str, str] = {}
        for name, tensor in _iterate_tensors(part):
            if name in seen:
                raise ValueError(f"{name} is there twice")
            seen[name] = _make_unique_name(name, taken)
            taken.add(seen[name])
            own[seen[name]] = tensor
        # A chain of maps: copying all visible names would cost graphs × names of memory.
        within = ChainMap(seen, *outer.maps) if seen else outer
        visible += len(seen)
        total += visible
        if total > _MOST_SEEN:
            raise ValueError(f"its graphs see more than {_MOST_SEEN:,} tensors in all")
        yield part, within, own
        # protobuf returns an empty graph for an attribute that holds none, so empty graphs are
        # skipped.
        inner = [g for node in part.node for a in node.attribute for g in (a.g, *a.graphs)]
        left += [
            (each, within, visible) for each in reversed(inner) if each.node or each.initializer
        ]


def _require_text(graph: Any) -> None:
    """Raise `ValueError` if a name in a graph is not UTF-8: protobuf returns it as bytes."""
    names = [each.name for each in graph.initializer]
    for node in graph.node:
        names += [node.op_type, *node.input, *node.output, *(a.name for a in node.attribute)]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name in it is no text")


def _make_unique_name(name: str, taken: set[str]) -> str:
    """Return the name, with a number appended if another graph already uses the name."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} ({number})"
    return found


def _iterate_tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    """Yield every tensor of one graph with its name in that graph: initializers and constants."""
    yield from ((each.name, each) for each in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and node.output:
                yield node.output[0], attribute.t


def find_linear_weights(
    graph: Any, seen: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, OnnxLinearWeight]:
    """Return the second entries of one graph, named after the layer where a bias tells its name.

    Args:
        graph: the model's graph or a nested graph.
        seen: unique names of the tensors that the graph sees, by their names in the graph.
        shapes: shapes of all tensors, by unique name.
    """
    stored = _find_dequantised(graph, seen, shapes)
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        weight = _find_weight(node, seen, shapes, stored)
        if weight is not None:
            bias = seen.get(_find_bias(node, seen, users) or "", "")
            head, _, last = bias.rpartition(".")
            layer = head if last == "bias" else _find_module(node)
            found.append((f"{layer}.weight" if layer else weight.stored + TRANSPOSED, weight))
    # If two layers claim one name, or a stored tensor has it, the name does not tell the layer.
    used = Counter(label for label, _ in found)
    named = {
        label if used[label] == 1 and label not in shapes else each.stored + TRANSPOSED: each
        for label, each in found
    }
    return {**{n: e for n, e in stored.items() if n not in shapes}, **named}


def _find_module(node: Any) -> str:
    """Return the name of the module that a product comes from, empty if no exporter noted it."""
    for note in node.metadata_props:
        if note.key == _SCOPES and (found := _MODULE.search(note.value[-_LONGEST_SCOPES:])):
            return found[1]
    # torch's older exporter names nodes /MODULE/SUBMODULE/OPERATION.
    path = str(node.name)
    return path[1:].rpartition("/")[0].replace("/", ".") if path.startswith("/") else ""


def _find_dequantised(
    graph: Any, seen: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, OnnxLinearWeight]:
    """Return the entries of quantised tensors.

    These are outputs of DequantizeLinear, by the output's name, and tensors NAME_quantized with
    NAME_scale and perhaps NAME_zero_point, by NAME.
    """
    found = {}
    for node in graph.node:
        given = [seen.get(name) for name in node.input]
        if node.op_type == "DequantizeLinear" and given[0] and given[1]:
            zero = given[2] if len(given) > 2 else None
            axis = _read_integer(node, "axis", 1) % max(1, len(shapes[given[0]]))
            found[node.output[0]] = OnnxLinearWeight(
                shapes[given[0]], given[0], given[1], zero, axis
            )
    for name in seen.values():
        base = name.removesuffix("_quantized")
        if base != name and f"{base}_scale" in shapes:
            zero = f"{base}_zero_point" if f"{base}_zero_point" in shapes else None
            found[base] = OnnxLinearWeight(shapes[name], name, f"{base}_scale", zero)
    return found


def _find_weight(
    node: Any, seen: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, OnnxLinearWeight],
) -> OnnxLinearWeight | None:  # fmt: skip
    """Return the weight of a linear layer (out, in) if the node multiplies by a stored matrix."""
    if node.op_type == "MatMulNBits":
        return _make_four_bit_weight(node, seen)
    if node.op_type not in _PRODUCTS or len(node.input) < 2:
        return None
    if node.op_type == "Gemm" and _read_integer(node, "transB", 0):
        return None
    name = seen.get(node.input[1], node.input[1])
    base = stored.get(name.removesuffix("_quantized"))
    shape = shapes.get(name, base.shape if base else ())
    if len(shape) != 2:
        return None
    turned = (shape[1], shape[0])
    if base is None:
        return OnnxLinearWeight(turned, name, turned=True)
    return OnnxLinearWeight(turned, base.stored, base.scale, base.zero, axis=1, turned=True)


def _make_four_bit_weight(node: Any, seen: Mapping[str, str]) -> OnnxLinearWeight | None:
    """Return the weight (out, in) of MatMulNBits, onnxruntime's product with 4-bit blocks."""
    names = [seen.get(name) for name in node.input[1:3]]
    width, rows = _read_integer(node, "K", 0), _read_integer(node, "N", 0)
    block = _read_integer(node, "block_size", 0)
    # A fourth input holds packed zero points, which are not supported here.
    if len(node.input) > 3 or _read_integer(node, "bits", 4) != 4 or min(width, rows, block) < 1:
        return None
    values, scale = (*names, None, None)[:2]
    return OnnxLinearWeight((rows, width), values, scale, block=block) if values and scale else None


def _find_bias(node: Any, seen: Mapping[str, str], users: Mapping[str, list[Any]]) -> str | None:
    """Return the graph name of the tensor that is added to the output of a node, or None."""
    if node.op_type == "Gemm":
        return str(node.input[2]) if len(node.input) > 2 else None
    made = node.output[0]
    for _ in range(_MOST_BETWEEN):
        after = users.get(made, [])
        # A value with several consumers is used elsewhere too: the next Add need not be a bias.
        if len(after) != 1:
            return None
        user = after[0]
        if user.op_type == "Add":
            return next((str(name) for name in user.input if name in seen), None)
        if user.op_type not in _PASSED:
            return None
        made = user.output[0]
    return None


def _read_integer(node: Any, name: str, otherwise: int) -> int:
    """Return an integer attribute of a node, or `otherwise` if the node does not have it."""
    return next((int(a.i) for a in node.attribute if a.name == name), otherwise)
