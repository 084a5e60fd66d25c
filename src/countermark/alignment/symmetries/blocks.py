"""Find the permutation groups of transformers from names and shapes.

The groups are heads, hidden units of MLPs, and the channels between blocks. A block is recognised
by the names of its layers in the usual libraries, and by shapes that fit. No shape tells the number
of heads: without an `Architecture`, heads are not reordered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from countermark.alignment.symmetries.architecture import Architecture
from countermark.alignment.symmetries.base import (
    GroupMember,
    PermutationGroup,
    ScaleDomain,
    make_natural_key,
)

_Shapes = Mapping[str, tuple[int, ...]]

# Query, key, value and output of BERT, ViT, Llama, BART and OPT, and DistilBERT. T5 is left out:
# its heads have a table of position biases that all blocks share.
_ATTENTION = (
    ("attention.self.query", "attention.self.key", "attention.self.value",
     "attention.output.dense"),
    ("attention.attention.query", "attention.attention.key", "attention.attention.value",
     "attention.output.dense"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
)  # fmt: skip
_FUSED = (("c_attn", "c_proj"),)  # GPT-2: query, key and value in one layer, and the output
# Layers that produce the hidden units, the activated layer first, and the layer that reads them.
_MLP = (
    ("intermediate.dense", "output.dense"), ("c_fc", "c_proj"),
    ("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2"), ("lin1", "lin2"),
    ("linear1", "linear2"), ("wi", "wo"), ("wi_0", "wi_1", "wo"),
)  # fmt: skip
# Names of embedding tables, of layer norms, and of layers that read the last block's output.
_TABLES = re.compile(r"embed|wte|wpe|shared", re.IGNORECASE)
_NORMS = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)
_READERS = re.compile(r"(^|\.)(lm_head|pooler\.dense|classifier|score)$")
# A head's values pass a softmax and the stream passes layer norms: neither allows a factor.
_FIXED = ScaleDomain(scalable=False, flippable=False)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer: its name, its sizes, and the axis of its weight along which its outputs lie.

    Attributes:
        name: of the module, whose weight is `NAME.weight`.
        outputs, inputs: their numbers.
        axis: 0 for a weight (outputs, inputs), 1 for GPT-2's (inputs, outputs).
        bias: there is a bias, named `NAME.bias`.
    """

    name: str
    outputs: int
    inputs: int
    axis: int
    bias: bool

    def make_output_members(
        self, domain: int = 0, *, each: int = 1, offset: int = 0
    ) -> Iterator[GroupMember]:
        """Yield the members for units among the outputs, in the weight and in the bias."""
        yield GroupMember(f"{self.name}.weight", self.axis, domain, 1, each, offset)
        if self.bias:
            yield GroupMember(f"{self.name}.bias", 0, domain, 1, each, offset)

    def make_input_member(self, domain: int = 0, *, each: int = 1, offset: int = 0) -> GroupMember:
        """Return the member for units among the inputs."""
        return GroupMember(f"{self.name}.weight", 1 - self.axis, domain, -1, each, offset)


@dataclass(frozen=True)
class TransformerBlock:
    """An attention or MLP: its permutation groups, and its layers at the residual stream.

    Attributes:
        units: groups of heads, or the group of the MLP's hidden units.
        hear: the layers that read the residual stream.
        speak: the layer that writes to the residual stream.
        values: for an attention, the layer that makes the values, and the index of its first output
            that is a value; None for an MLP.
    """

    units: tuple[PermutationGroup, ...]
    hear: tuple[LinearLayer, ...]
    speak: LinearLayer
    values: tuple[LinearLayer, int] | None = None


def find_block_groups(
    shapes: _Shapes, architecture: Architecture | None, *, residual: bool = False
) -> tuple[PermutationGroup, ...]:
    """Return the permutation groups of all transformer blocks of a model, or an empty tuple.

    Args:
        shapes: every tensor's shape by name, as in a state dict.
        architecture: tells the number of heads; None leaves heads as they are.
        residual: add the channels between the blocks, which reach every table, norm and head with a
            known name. Tensors with other names are not found.
    """
    found = find_blocks(shapes, architecture)
    units = [each for block in found for each in block.units]
    if residual and found:
        # The stream comes first: groups are aligned and reduced from the inputs on.
        units[:0] = _make_residual_group(shapes, found)
    return tuple(units)


def find_blocks(shapes: _Shapes, architecture: Architecture | None) -> list[TransformerBlock]:
    """List every attention and MLP with known names, together with its layers.

    Args:
        shapes: every tensor's shape by name, as in a state dict.
        architecture: tells the number of heads; None leaves out the groups of heads.
    """
    modules = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
    found: list[TransformerBlock] = []
    for module in sorted(modules, key=make_natural_key):
        found += _find_attention(module, shapes, architecture or Architecture())
        found += _find_mlp(module, shapes, architecture or Architecture())
    return found


def _find_attention(module: str, shapes: _Shapes, made: Architecture) -> Iterator[TransformerBlock]:
    """Yield the attention of which this module is the query, or query, key and value in one."""
    for form in _ATTENTION:
        layers = _find_layers(module, form, shapes)
        if layers is not None:
            query, key, value, out = layers
            units = _make_head_groups(made, ((query, 0), (key, 0), (value, 0)), out)
            yield TransformerBlock(units, (query, key, value), out, (value, 0))
            return
    for fused in _FUSED:
        layers = _find_layers(module, fused, shapes)
        if layers is not None and layers[0].outputs == 3 * layers[0].inputs:
            one, out = layers
            width = one.inputs
            units = _make_head_groups(made, ((one, 0), (one, width), (one, 2 * width)), out)
            yield TransformerBlock(units, (one,), out, (one, 2 * width))


def _make_head_groups(
    made: Architecture, parts: tuple[tuple[LinearLayer, int], ...], out: LinearLayer
) -> tuple[PermutationGroup, ...]:
    """Make the groups of heads: those with shared keys and values, and the queries within each.

    Args:
        made: tells the number of heads.
        parts: the layers of query, key and value, each with the index of its first output.
        out: the layer that reads the heads.

    Returns: no groups if the number of heads is unknown or does not fit the shapes.
    """
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
            *query.make_output_members(each=shared * width, offset=at),
            *key.make_output_members(each=width, offset=key_at),
            *value.make_output_members(each=width, offset=value_at),
            out.make_input_member(each=shared * width),
        ]
        found.append(PermutationGroup(groups, tuple(members), (), (_FIXED,), grows=False))
    # Without shared keys, a group has one query head and nothing to reorder within.
    for group in range(groups if shared > 1 else 0):
        start = group * shared * width
        members = [
            *query.make_output_members(each=width, offset=at + start),
            out.make_input_member(each=width, offset=start),
        ]
        found.append(PermutationGroup(shared, tuple(members), (), (_FIXED,), grows=False))
    return tuple(found)


def _find_mlp(module: str, shapes: _Shapes, made: Architecture) -> Iterator[TransformerBlock]:
    """Yield the MLP of which this module is the first layer.

    A second layer beside the activated layer is a gate, whose product can be scaled and flipped.
    """
    for form in _MLP:
        layers = _find_layers(module, form, shapes)
        if layers is None:
            continue
        *makers, out = layers
        size = out.inputs
        # Names alone may fit by chance, for example layers named fc1 and fc2 of a plain network.
        if any(each.outputs != size for each in makers):
            continue
        # The first layer passes the activation, which allows a factor only if it is ReLU.
        domains = [ScaleDomain(scalable=made.rectified, flippable=False)]
        domains += [ScaleDomain() for _ in makers[1:]]
        members = [m for at, each in enumerate(makers) for m in each.make_output_members(at)]
        members.append(out.make_input_member(len(makers) - 1))
        grows = all(each.axis == 0 for each in layers)
        units = PermutationGroup(size, tuple(members), (), tuple(domains), grows)
        yield TransformerBlock((units,), tuple(makers), out)
        return


def _find_layers(
    module: str, form: tuple[str, ...], shapes: _Shapes
) -> tuple[LinearLayer, ...] | None:
    """Return the layers of a form whose first layer is this module; None if a layer is missing.

    Args:
        module: name of the module.
        form: ends of the layers' names.
        shapes: every tensor's shape by name.
    """
    first = form[0]
    if module != first and not module.endswith(f".{first}"):
        return None
    before = module.removesuffix(first)
    names = [before + each for each in form]
    if any(len(shapes.get(f"{name}.weight", ())) != 2 for name in names):
        return None
    axis = _find_output_axis(names, shapes)
    if axis is None:
        return None
    return tuple(
        LinearLayer(
            name, *_order_sizes(shapes[f"{name}.weight"], axis), axis, f"{name}.bias" in shapes
        )
        for name in names
    )


def _order_sizes(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a weight whose outputs lie along `axis`."""
    return shape[axis], shape[1 - axis]


def _find_output_axis(names: list[str], shapes: _Shapes) -> int | None:
    """Find the axis of outputs: 0 for linear layers, 1 for GPT-2's layers, None if neither fits."""
    for axis in (0, 1):
        fits = all(
            shapes.get(f"{name}.bias", (shapes[f"{name}.weight"][axis],))
            == (shapes[f"{name}.weight"][axis],)
            for name in names
        )
        outer = shapes[f"{names[0]}.weight"], shapes[f"{names[-1]}.weight"]
        # The first layer reads the residual stream and the last layer writes to it.
        meet = outer[0][1 - axis] == outer[1][axis]
        if fits and meet:
            return axis
    return None


def _make_residual_group(shapes: _Shapes, found: list[TransformerBlock]) -> list[PermutationGroup]:
    """Return the group of channels of the residual stream, as a list of one.

    The list is empty if the blocks differ in width, or no embedding table has that width.
    """
    sizes = {layer.inputs for block in found for layer in block.hear}
    sizes |= {block.speak.outputs for block in found}
    tables = [n for n, shape in shapes.items() if len(shape) == 2 and _TABLES.search(n)]
    if len(sizes) != 1 or not any(shapes[name][1] in sizes for name in tables):
        return []
    # Reordering only some tensors at the stream would change the outputs, so every tensor with a
    # known name joins the group.
    (size,) = sizes
    members = [layer.make_input_member() for block in found for layer in block.hear]
    members += [member for block in found for member in block.speak.make_output_members()]
    known = {member.name for member in members}
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        if name in known or shape[-1:] != (size,):
            continue
        if len(shape) == 2 and _TABLES.search(name):
            members.append(GroupMember(name, 1, 0, 1))
        elif len(shape) == 2 and last == "weight" and _READERS.search(module):
            members.append(GroupMember(name, 1, 0, -1))
        elif len(shape) == 1 and _NORMS.search(name):
            members.append(GroupMember(name, 0, 0, 1))
    return [PermutationGroup(size, tuple(members), (), (_FIXED,), grows=False)]
