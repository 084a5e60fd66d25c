"""The units of transformers, from names and shapes: heads, MLP units, channels between blocks.

A block is recognised by what its layers are called in the usual libraries, and by shapes that fit.
How many heads there are no shape says: `Architecture` does, or heads are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from countermark.units.architecture import Architecture
from countermark.units.base import Domain, Member, Units, natural

_Shapes = Mapping[str, tuple[int, ...]]

# Query, key, value and output; BERT and ViT, Llama, BART and OPT, DistilBERT. Not T5, whose heads
# have a table of their own that all blocks share.
_ATTENTION = (
    ("attention.self.query", "attention.self.key", "attention.self.value",
     "attention.output.dense"),
    ("attention.attention.query", "attention.attention.key", "attention.attention.value",
     "attention.output.dense"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
)  # fmt: skip
_FUSED = (("c_attn", "c_proj"),)  # all three in one, and output; GPT-2
# What makes the hidden units, the activated one first, and what hears them.
_MLP = (
    ("intermediate.dense", "output.dense"), ("c_fc", "c_proj"),
    ("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2"), ("lin1", "lin2"),
    ("linear1", "linear2"), ("wi", "wo"), ("wi_0", "wi_1", "wo"),
)  # fmt: skip
_TABLES = re.compile(r"embed|wte|wpe|shared", re.IGNORECASE)
_NORMS = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)
_READERS = re.compile(r"(^|\.)(lm_head|pooler\.dense|classifier|score)$")
_FIXED = Domain(scalable=False, flippable=False)


@dataclass(frozen=True)
class Layer:
    """A linear layer: its name, sizes, and which axis of its weight its outputs lie along.

    Attributes:
        name: of the module, whose weight is `NAME.weight`.
        outputs, inputs: how many there are.
        axis: 0 for a weight (outputs, inputs), 1 for GPT-2's (inputs, outputs).
        bias: there is one, in `NAME.bias`.
    """

    name: str
    outputs: int
    inputs: int
    axis: int
    bias: bool

    def produced(self, domain: int = 0, *, each: int = 1, offset: int = 0) -> Iterator[Member]:
        """Units among its outputs."""
        yield Member(f"{self.name}.weight", self.axis, domain, 1, each, offset)
        if self.bias:
            yield Member(f"{self.name}.bias", 0, domain, 1, each, offset)

    def consumed(self, domain: int = 0, *, each: int = 1, offset: int = 0) -> Member:
        """Units among its inputs."""
        return Member(f"{self.name}.weight", 1 - self.axis, domain, -1, each, offset)


@dataclass(frozen=True)
class Block:
    """What was found of one attention or MLP: its units, and its layers at the residual stream.

    Attributes:
        units: heads, or the MLP's hidden units.
        hear: the layers that read the residual stream.
        speak: the layer that writes to it.
        values: of an attention, the layer that makes the values, and the first of its outputs that
            is a value; None of an MLP.
    """

    units: tuple[Units, ...]
    hear: tuple[Layer, ...]
    speak: Layer
    values: tuple[Layer, int] | None = None


def blocks_of(
    shapes: _Shapes, architecture: Architecture | None, *, residual: bool = False
) -> tuple[Units, ...]:
    """The units of all transformer blocks of a model; none where there are no such blocks.

    Args:
        shapes: every tensor's shape by name, as in a state dict.
        architecture: how many heads there are; None leaves them as they are.
        residual: add the channels between the blocks, which reach every table, norm and head that
            is known by its name. What has other names is not seen.
    """
    found = block_layers(shapes, architecture)
    units = [each for block in found for each in block.units]
    if residual and found:
        units[:0] = _residual(shapes, found)
    return tuple(units)


def block_layers(shapes: _Shapes, architecture: Architecture | None) -> list[Block]:
    """List every attention and MLP that is known by its names, with the layers it is made of.

    Args:
        shapes: every tensor's shape by name, as in a state dict.
        architecture: how many heads there are; None leaves heads out of `Block.units`.
    """
    modules = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
    found: list[Block] = []
    for module in sorted(modules, key=natural):
        found += _attention(module, shapes, architecture or Architecture())
        found += _mlp(module, shapes, architecture or Architecture())
    return found


def _attention(module: str, shapes: _Shapes, made: Architecture) -> Iterator[Block]:
    """The attention whose query (or all of whose three) this module is."""
    for form in _ATTENTION:
        layers = _siblings(module, form, shapes)
        if layers is not None:
            query, key, value, out = layers
            units = _heads(made, ((query, 0), (key, 0), (value, 0)), out)
            yield Block(units, (query, key, value), out, (value, 0))
            return
    for fused in _FUSED:
        layers = _siblings(module, fused, shapes)
        if layers is not None and layers[0].outputs == 3 * layers[0].inputs:
            one, out = layers
            width = one.inputs
            units = _heads(made, ((one, 0), (one, width), (one, 2 * width)), out)
            yield Block(units, (one,), out, (one, 2 * width))


def _heads(
    made: Architecture, parts: tuple[tuple[Layer, int], ...], out: Layer
) -> tuple[Units, ...]:
    """Heads that share keys and values, and within each group those of queries."""
    count, groups = made.heads, made.groups or made.heads
    if not count or not groups or count % groups:
        return ()
    (query, at), (key, key_at), (value, value_at) = parts
    width, shared = made.width or out.inputs // count, count // groups
    sizes = (count * width, groups * width, groups * width)
    if query is key:
        fits = groups == count and query.outputs == sum(sizes)
    else:
        fits = (query.outputs, key.outputs, value.outputs) == sizes
    if not fits or out.inputs != count * width:
        return ()
    found = []
    if groups > 1:
        members = [
            *query.produced(each=shared * width, offset=at),
            *key.produced(each=width, offset=key_at),
            *value.produced(each=width, offset=value_at),
            out.consumed(each=shared * width),
        ]
        found.append(Units(groups, tuple(members), (), (_FIXED,), grows=False))
    for group in range(groups if shared > 1 else 0):
        start = group * shared * width
        members = [
            *query.produced(each=width, offset=at + start),
            out.consumed(each=width, offset=start),
        ]
        found.append(Units(shared, tuple(members), (), (_FIXED,), grows=False))
    return tuple(found)


def _mlp(module: str, shapes: _Shapes, made: Architecture) -> Iterator[Block]:
    """The MLP whose first layer this module is; a gate beside it can be scaled and flipped."""
    for form in _MLP:
        layers = _siblings(module, form, shapes)
        if layers is None:
            continue
        *makers, out = layers
        size = out.inputs
        if any(each.outputs != size for each in makers):
            continue
        domains = [Domain(scalable=made.rectified, flippable=False)]
        domains += [Domain() for _ in makers[1:]]
        members = [m for at, each in enumerate(makers) for m in each.produced(at)]
        members.append(out.consumed(len(makers) - 1))
        grows = all(each.axis == 0 for each in layers)
        units = Units(size, tuple(members), (), tuple(domains), grows)
        yield Block((units,), tuple(makers), out)
        return


def _siblings(module: str, form: tuple[str, ...], shapes: _Shapes) -> tuple[Layer, ...] | None:
    """The layers of a form, the first of which is this module; None where one is missing."""
    first = form[0]
    if module != first and not module.endswith(f".{first}"):
        return None
    before = module.removesuffix(first)
    names = [before + each for each in form]
    if any(len(shapes.get(f"{name}.weight", ())) != 2 for name in names):
        return None
    axis = _axis(names, shapes)
    if axis is None:
        return None
    return tuple(
        Layer(name, *_sizes(shapes[f"{name}.weight"], axis), axis, f"{name}.bias" in shapes)
        for name in names
    )


def _sizes(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    return shape[axis], shape[1 - axis]


def _axis(names: list[str], shapes: _Shapes) -> int | None:
    """Along which axis outputs lie: the first, or of GPT-2's layers the second; None of neither."""
    for axis in (0, 1):
        fits = all(
            shapes.get(f"{name}.bias", (shapes[f"{name}.weight"][axis],))
            == (shapes[f"{name}.weight"][axis],)
            for name in names
        )
        outer = shapes[f"{names[0]}.weight"], shapes[f"{names[-1]}.weight"]
        meet = outer[0][1 - axis] == outer[1][axis]  # both stand at the residual stream
        if fits and meet:
            return axis
    return None


def _residual(shapes: _Shapes, found: list[Block]) -> list[Units]:
    """The channels that all blocks hear and speak to; nothing where blocks differ in them."""
    sizes = {layer.inputs for block in found for layer in block.hear}
    sizes |= {block.speak.outputs for block in found}
    tables = [n for n, shape in shapes.items() if len(shape) == 2 and _TABLES.search(n)]
    if len(sizes) != 1 or not any(shapes[name][1] in sizes for name in tables):
        return []
    (size,) = sizes
    members = [layer.consumed() for block in found for layer in block.hear]
    members += [member for block in found for member in block.speak.produced()]
    known = {member.name for member in members}
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        if name in known or shape[-1:] != (size,):
            continue
        if len(shape) == 2 and _TABLES.search(name):
            members.append(Member(name, 1, 0, 1))
        elif len(shape) == 2 and last == "weight" and _READERS.search(module):
            members.append(Member(name, 1, 0, -1))
        elif len(shape) == 1 and _NORMS.search(name):
            members.append(Member(name, 0, 0, 1))
    return [Units(size, tuple(members), (), (_FIXED,), grows=False)]
