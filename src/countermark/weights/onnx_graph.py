"""What the tensors of an ONNX graph are: found in all its parts, and how a network reads them.

Exporters store the weight of a linear layer (out, in) as (in, out), for MatMul, under a name of
their own, but keep that of its bias; and quantisers keep whole numbers with scales beside them.
Here such a tensor gets a second entry, as the layer has it. Nothing of the graph is run.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
TRANSPOSED = ", transposed"
"""Behind the name of a tensor that is offered as its layer has it, where no bias says which."""

_PRODUCTS = ("MatMul", "MatMulInteger", "Gemm")
_PASSED = ("Cast", "Mul")  # between a product of whole numbers and its bias
_MOST_BETWEEN = 4
_MOST_PARTS, _MOST_SEEN = 1 << 12, 1 << 22
_ZERO = 8  # the middle of four bits


@dataclass(frozen=True)
class Linear:
    """A tensor as a layer has it.

    Attributes:
        shape: (out, in), or that of the stored tensor.
        stored, scale, zero: names of the tensors that hold values, scales and zero points.
        axis: along which each place of the stored tensor has a scale of its own.
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

    def values(self, read: Callable[[str], Array]) -> Array:
        """The values in `shape`, from tensors that are read by name.

        Raises:
            ValueError: scales do not fit the values.
        """
        stored = read(self.stored)
        if self.scale is None:
            return stored.T if self.turned else stored
        scale = read(self.scale).astype(np.float32)
        if self.block:
            return self._four_bits(stored, scale)
        zero = read(self.zero).astype(np.float32) if self.zero else np.zeros(1, np.float32)
        wide = stored.astype(np.float32) - self._along(zero, stored)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            found = wide * self._along(scale, stored)
        return found.T if self.turned else found

    def _along(self, each: Array, stored: Array) -> Array:
        """One number, or one for each place along the axis, to be spread over the stored tensor."""
        if each.size == 1:
            return each.reshape(1)
        if each.size != stored.shape[self.axis]:
            raise ValueError(f"{each.size} scales for {stored.shape[self.axis]} places")
        shape = [-1 if axis == self.axis else 1 for axis in range(stored.ndim)]
        return each.reshape(shape)

    def _four_bits(self, stored: Array, scale: Array) -> Array:
        """Rows of blocks of 4-bit numbers (out, blocks, block / 2), the lower half first."""
        rows, width = self.shape
        if scale.size * self.block != 2 * stored.size:
            raise ValueError(f"{scale.size} scales for {2 * stored.size} numbers")
        if stored.dtype != np.uint8:
            raise ValueError(f"4-bit numbers as {stored.dtype}")
        halves = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.float32)
        blocks = halves.reshape(rows, -1, self.block) - _ZERO  # (out, blocks, block)
        found = blocks * scale.reshape(rows, -1, 1)
        return found.reshape(rows, -1)[:, :width]


def parts_of(graph: Any) -> Iterator[tuple[Any, Mapping[str, str], dict[str, Any]]]:
    """A graph and the graphs in it, each with the names that it sees, and its own tensors.

    Yields: the graph; the name here of each tensor that is seen there; tensors by their names here.

    Raises:
        ValueError: a graph has one name twice or a name that is no text, or there are too many.
    """
    taken: set[str] = set()
    left: list[tuple[Any, ChainMap[str, str], int]] = [(graph, ChainMap(), 0)]
    count = total = 0
    while left:
        part, outer, visible = left.pop()
        count += 1
        if count > _MOST_PARTS:
            raise ValueError(f"it has more than {_MOST_PARTS:,} graphs")
        _require_text(part)
        own: dict[str, Any] = {}
        seen: dict[str, str] = {}
        for name, tensor in _values(part):
            if name in seen:
                raise ValueError(f"{name} is there twice")
            seen[name] = _free(name, taken)
            taken.add(seen[name])
            own[seen[name]] = tensor
        within = ChainMap(seen, *outer.maps) if seen else outer  # a copy would cost parts × names
        visible += len(seen)
        total += visible
        if total > _MOST_SEEN:
            raise ValueError(f"its graphs see more than {_MOST_SEEN:,} tensors in all")
        yield part, within, own
        inner = [g for node in part.node for a in node.attribute for g in (a.g, *a.graphs)]
        left += [
            (each, within, visible) for each in reversed(inner) if each.node or each.initializer
        ]


def _require_text(graph: Any) -> None:
    """Raise `ValueError` for a name of a graph that is no UTF-8: protobuf gives it as bytes."""
    names = [each.name for each in graph.initializer]
    for node in graph.node:
        names += [node.op_type, *node.input, *node.output, *(a.name for a in node.attribute)]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name in it is no text")


def _free(name: str, taken: set[str]) -> str:
    """The name, or with a number behind it where another graph has it already."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} ({number})"
    return found


def _values(graph: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of one graph by its name in there."""
    yield from ((each.name, each) for each in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and node.output:
                yield node.output[0], attribute.t


def linears(
    graph: Any, seen: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Linear]:
    """The second entries of one graph: by the layer's name, where a bias says it.

    Args:
        graph: a graph or a part of it.
        seen: the names here of the tensors that it sees.
        shapes: of all tensors.
    """
    stored = _dequantised(graph, seen, shapes)
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        weight = _weight(node, seen, shapes, stored)
        if weight is not None:
            bias = seen.get(_bias(node, seen, users) or "", "")
            head, _, last = bias.rpartition(".")
            label = f"{head}.weight" if last == "bias" and head else weight.stored + TRANSPOSED
            found.append((label, weight))
    used = Counter(label for label, _ in found)
    named = {
        label if used[label] == 1 and label not in shapes else each.stored + TRANSPOSED: each
        for label, each in found
    }
    return {**{n: e for n, e in stored.items() if n not in shapes}, **named}


def _dequantised(
    graph: Any, seen: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Linear]:
    """What whole numbers stand for: outputs of DequantizeLinear, and X of X_quantized, X_scale."""
    found = {}
    for node in graph.node:
        given = [seen.get(name) for name in node.input]
        if node.op_type == "DequantizeLinear" and given[0] and given[1]:
            zero = given[2] if len(given) > 2 else None
            axis = _number(node, "axis", 1) % max(1, len(shapes[given[0]]))
            found[node.output[0]] = Linear(shapes[given[0]], given[0], given[1], zero, axis)
    for name in seen.values():
        base = name.removesuffix("_quantized")
        if base != name and f"{base}_scale" in shapes:
            zero = f"{base}_zero_point" if f"{base}_zero_point" in shapes else None
            found[base] = Linear(shapes[name], name, f"{base}_scale", zero)
    return found


def _weight(
    node: Any, seen: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Linear],
) -> Linear | None:  # fmt: skip
    """The weight of a linear layer as the layer has it, where a node multiplies by one."""
    if node.op_type == "MatMulNBits":
        return _of_four_bits(node, seen)
    if node.op_type not in _PRODUCTS or len(node.input) < 2:
        return None
    if node.op_type == "Gemm" and _number(node, "transB", 0):
        return None
    name = seen.get(node.input[1], node.input[1])
    base = stored.get(name.removesuffix("_quantized"))
    shape = shapes.get(name, base.shape if base else ())
    if len(shape) != 2:
        return None
    turned = (shape[1], shape[0])
    if base is None:
        return Linear(turned, name, turned=True)
    return Linear(turned, base.stored, base.scale, base.zero, axis=1, turned=True)


def _of_four_bits(node: Any, seen: Mapping[str, str]) -> Linear | None:
    """The weight of onnxruntime's product with blocks of 4-bit numbers, which is (out, in)."""
    names = [seen.get(name) for name in node.input[1:3]]
    width, rows = _number(node, "K", 0), _number(node, "N", 0)
    block = _number(node, "block_size", 0)
    if len(node.input) > 3 or _number(node, "bits", 4) != 4 or min(width, rows, block) < 1:
        return None
    values, scale = (*names, None, None)[:2]
    return Linear((rows, width), values, scale, block=block) if values and scale else None


def _bias(node: Any, seen: Mapping[str, str], users: Mapping[str, list[Any]]) -> str | None:
    """The tensor that is added to what a node makes, by its name in the graph."""
    if node.op_type == "Gemm":
        return str(node.input[2]) if len(node.input) > 2 else None
    made = node.output[0]
    for _ in range(_MOST_BETWEEN):
        after = users.get(made, [])
        if len(after) != 1:
            return None
        user = after[0]
        if user.op_type == "Add":
            return next((str(name) for name in user.input if name in seen), None)
        if user.op_type not in _PASSED:
            return None
        made = user.output[0]
    return None


def _number(node: Any, name: str, otherwise: int) -> int:
    """An attribute that is a whole number."""
    return next((int(a.i) for a in node.attribute if a.name == name), otherwise)
