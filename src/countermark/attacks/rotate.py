"""Rotations inside a transformer, of the residual stream and of value heads; outputs stay equal.

Published quantisers rotate models for honest reasons, to make weights easier to round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from countermark.alignment.symmetries import (
    Architecture,
    LinearLayer,
    TransformerBlock,
    find_blocks,
)
from countermark.attacks.base import Attack, ChangeResult
from countermark.attacks.output_layer import untie_weight
from countermark.errors import ConfigError

_WORDS = (2, 12)  # texts, and words of each text, whose outputs are compared
_LEAST_GAIN = 1e-6  # smallest gain of a norm that a layer can absorb


@dataclass(frozen=True)
class Rotate(Attack):
    """An attack that multiplies the residual stream by a random orthogonal matrix.

    The gains of the norms first move into the layers that read the norms. Layer norms subtract a
    mean: for them, all layers that write to the stream are centred, and the matrix preserves the
    mean's direction. An output layer that shares its weight with the embeddings gets a weight of
    its own.

    Attributes:
        seed: seed of the matrix.
    """

    name: ClassVar[str] = "rotate"
    does: ClassVar[str] = "rotates a transformer's residual stream; outputs stay equal"
    source: ClassVar[str] = "Ashkboos et al. 2024, SliceGPT and QuaRot; Liu et al. 2024, SpinQuant"
    needs_model: ClassVar[bool] = True

    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Fold the norms' gains, rotate, and compare the copy's outputs to random words.

        Raises:
            ConfigError: the model is not a transformer with known layer names and a norm before
                every reader of the stream; or its outputs would change.
        """
        stolen.eval()
        blocks = _find_blocks(stolen, self.name)
        before = answer_random_words(stolen)
        if before is None:
            raise ConfigError(
                f"{self.name}: {type(stolen).__name__} takes no words: expected a language model "
                "that is called with word numbers (texts, words)"
            )
        stream = _StreamLayers.from_model(stolen, blocks, self.name)
        # Shared tensors would be multiplied twice, once as a reader and once as a table.
        untied = [
            each
            for each in (*stream.reader_names, *stream.tables)
            if untie_weight(stolen, f"{each}.weight")
        ]
        with torch.no_grad():
            width = stream.fold_gains(stolen, self.name)
            centred = any(_is_centring(stolen.get_submodule(norm)) for norm in stream.readers_of)
            turn = draw_orthogonal_matrix(width, self.seed, fixed=centred)
            stream.rotate_stream(stolen, turn, centred=centred)
        require_equal_outputs(before, answer_random_words(stolen), self.name)
        return ChangeResult(
            found={"width": width, "readers": len(stream.reader_names), "untied": bool(untied)}
        )


@dataclass(frozen=True)
class TurnValues(Attack):
    """An attack that multiplies each value head by a matrix, which the output projection undoes.

    Attributes:
        orthogonal: use orthogonal matrices; otherwise singular values lie between 1/4 and 4.
        seed: seed of the matrices.
    """

    name: ClassVar[str] = "turn_values"
    does: ClassVar[str] = "multiplies value heads by matrices; outputs stay equal"
    source: ClassVar[str] = "Ashkboos et al. 2024, QuaRot; attention reads products only"
    needs_model: ClassVar[bool] = True

    orthogonal: bool = True
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Multiply the values of every attention whose heads are known.

        Raises:
            ConfigError: no heads are known: the model has no configuration or unknown layer names.
        """
        made, turned = Architecture.from_model(stolen) or Architecture(), 0
        for block in _find_blocks(stolen, self.name):
            # A block without units has heads that do not fit its shapes; a single head always fits.
            if block.values is None or not (block.units or made.heads == 1):
                continue
            groups, width = made.groups or made.heads, block.speak.inputs // made.heads
            value, offset = block.values
            for group in range(groups):
                matrix = self._draw_matrix(width, self.seed + turned)
                # In grouped attention, `shared` query heads read the values of one group.
                back, shared = torch.linalg.inv(matrix), made.heads // groups
                place = slice(offset + group * width, offset + (group + 1) * width)
                with torch.no_grad():
                    _multiply_outputs(stolen, value, matrix, place)
                    for head in range(group * shared, (group + 1) * shared):
                        _multiply_inputs(
                            stolen, block.speak, back, slice(head * width, (head + 1) * width)
                        )
                turned += 1
        if not turned:
            raise ConfigError(
                f"{self.name}: no value heads of {type(stolen).__name__} were found: expected a "
                "transformer of the usual names with its number of heads in config"
            )
        return ChangeResult(found={"heads": turned})

    def _draw_matrix(self, width: int, seed: int) -> Tensor:
        """Return a random invertible matrix (width, width), float64."""
        matrix = draw_orthogonal_matrix(width, seed)
        if self.orthogonal:
            return matrix
        drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed)).double()
        # Orthogonal · diagonal · orthogonal: the diagonal holds the singular values, 1/4 to 4.
        return matrix * 4.0 ** (2 * drawn - 1) @ draw_orthogonal_matrix(width, seed + (1 << 31))


@dataclass(frozen=True)
class _StreamLayers:
    """The layers of a transformer that touch the residual stream.

    Attributes:
        readers_of: for each norm's name, the names of the layers that read the norm.
        tables: names of the embeddings that write to the stream.
        writers: the output projections of the blocks.
    """

    readers_of: dict[str, list[str]]
    tables: list[str]
    writers: list[LinearLayer]

    @property
    def reader_names(self) -> list[str]:
        """The names of all layers that read a norm."""
        return [name for names in self.readers_of.values() for name in names]

    @classmethod
    def from_model(
        cls, model: nn.Module, blocks: list[TransformerBlock], attack: str
    ) -> _StreamLayers:
        """Trace random words through a model, and list the layers that touch its residual stream.

        Raises:
            ConfigError: a layer reads the stream without a norm directly before it.
        """
        found = _find_norm_readers(model, blocks[0].speak.outputs)
        known = {name for names in found.values() for name in names}
        unread = [each.name for block in blocks for each in block.hear if each.name not in known]
        heads = known - {each.name for block in blocks for each in block.hear}
        if unread or not heads:
            missing = unread[0] if unread else "an output layer behind a last norm"
            raise ConfigError(
                f"{attack}: expected a norm directly before every layer that reads the residual "
                f"stream, not found for {missing} of {type(model).__name__}"
            )
        width = blocks[0].speak.outputs
        tables = [name for name, each in model.named_modules()
                  if isinstance(each, nn.Embedding) and each.embedding_dim == width]  # fmt: skip
        return cls(found, tables, [block.speak for block in blocks])

    def fold_gains(self, model: nn.Module, attack: str) -> int:
        """Move the gains of all norms into the layers that read them; return the stream's width.

        Raises:
            ConfigError: a norm has a gain of zero.
        """
        width = 0
        for name, readers in self.readers_of.items():
            norm = model.get_submodule(name)
            gain = _get_float64(norm, "weight")
            if float(gain.abs().min()) < _LEAST_GAIN:
                raise ConfigError(
                    f"{attack}: the norm {name} has a gain of zero: nothing to divide by"
                )
            for reader in readers:
                layer = model.get_submodule(reader)
                weight = _get_float64(layer, "weight")
                _set_parameter(
                    layer, "weight", weight * (gain if _is_output_major(layer) else gain[:, None])
                )
            # The layer's new weight multiplies the norm's bias by the gain, so the bias is divided
            # by it.
            if norm._parameters.get("bias") is not None:
                _set_parameter(norm, "bias", _get_float64(norm, "bias") / gain)
            _set_parameter(norm, "weight", torch.ones_like(gain))
            width = len(gain)
        return width

    def rotate_stream(self, model: nn.Module, turn: Tensor, *, centred: bool) -> None:
        """Multiply the stream, as rows, by an orthogonal matrix (width, width) from the right."""
        for name in self.tables:
            table = model.get_submodule(name)
            weight = _get_float64(table, "weight")
            _set_parameter(
                table, "weight", _centre_rows(weight, on=centred) @ turn.to(weight.device)
            )
        for writer in self.writers:
            layer = model.get_submodule(writer.name)
            weight = _get_float64(layer, "weight")
            rows = weight.T if writer.axis == 0 else weight  # (inputs, width)
            rows = _centre_rows(rows, on=centred) @ turn.to(weight.device)
            _set_parameter(layer, "weight", rows.T if writer.axis == 0 else rows)
            if writer.bias:
                bias = _get_float64(layer, "bias")
                _set_parameter(layer, "bias", _centre_rows(bias, on=centred) @ turn.to(bias.device))
        for name, readers in self.readers_of.items():
            norm = model.get_submodule(name)
            if norm._parameters.get("bias") is not None:
                bias = _get_float64(norm, "bias")
                _set_parameter(norm, "bias", bias @ turn.to(bias.device))
            for reader in readers:
                layer = model.get_submodule(reader)
                weight = _get_float64(layer, "weight")
                # Readers get the inverse of the rotation, its transpose, on their input side.
                back = turn.to(weight.device)
                _set_parameter(
                    layer, "weight", weight @ back if _is_output_major(layer) else back.T @ weight
                )


def _find_norm_readers(model: nn.Module, width: int) -> dict[str, list[str]]:
    """Return the names of the layers that read each norm of a width, by tracing random words."""
    made: dict[int, tuple[str, Tensor]] = {}  # keeps tensors alive and so in place
    found: dict[str, list[str]] = {}

    def make_norm_hook(name: str) -> Callable[..., None]:
        """Make a forward hook that records the output tensor of a norm."""

        def record_output(_: nn.Module, __: tuple[Any, ...], answer: Tensor) -> None:
            """Record the norm under the memory address of its output."""
            made[answer.data_ptr()] = (name, answer)

        return record_output

    def make_reader_hook(name: str) -> Callable[..., None]:
        """Make a forward pre-hook that records which norm a layer reads."""

        def record_reader(_: nn.Module, given: tuple[Any, ...]) -> None:
            """Look up the norm whose output is the layer's input."""
            # Compare memory addresses: a view of all words is another tensor at the same address.
            norm = made.get(given[0].data_ptr()) if given else None
            if norm is not None:
                found.setdefault(norm[0], []).append(name)

        return record_reader

    hooks = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.shape == (width,):
            hooks.append(module.register_forward_hook(make_norm_hook(name)))
        elif weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_pre_hook(make_reader_hook(name)))
    answer_random_words(model)
    for hook in hooks:
        hook.remove()
    return found


def draw_orthogonal_matrix(width: int, seed: int, *, fixed: bool = False) -> Tensor:
    """Draw an orthogonal matrix (width, width) in float64 from the uniform distribution.

    Args:
        width: number of rows and columns.
        seed: seed of the draw.
        fixed: the matrix leaves the direction (1, …, 1) unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    size = width - 1 if fixed else width
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix: Tensor
    matrix, upper = torch.linalg.qr(drawn)
    matrix = matrix * upper.diagonal().sign()  # otherwise QR's sign convention biases the draw
    if not fixed:
        return matrix
    whole = torch.eye(width, dtype=torch.float64)
    whole[1:, 1:] = matrix
    # A reflection that swaps (1, 0, …, 0) and (1, …, 1) / √width.
    mirror = torch.full((width,), width**-0.5, dtype=torch.float64)
    mirror[0] -= 1
    reflection = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(mirror, mirror) / (
        mirror @ mirror
    )
    return reflection @ whole @ reflection


def answer_random_words(model: nn.Module) -> Tensor | None:
    """Return a model's outputs for random words in eval mode; None if the model takes no words."""
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    if not tables:
        return None
    most = max(each.num_embeddings for each in tables)
    # The first embedding table is taken for the table of words.
    words = torch.randint(
        min(most, tables[0].num_embeddings), _WORDS, generator=torch.Generator().manual_seed(0)
    )
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            answer = model(words.to(tables[0].weight.device))
    # A model is foreign code and may raise anything when it gets word numbers.
    except Exception:
        return None
    finally:
        model.train(was)
    found = getattr(answer, "logits", getattr(answer, "last_hidden_state", answer))
    return found if isinstance(found, Tensor) else None


def require_equal_outputs(before: Tensor, after: Tensor | None, attack: str) -> None:
    """Check that a change left a model's outputs equal up to rounding.

    Raises:
        ConfigError: the outputs differ.
    """
    # The square root of the precision: errors grow over the layers. `not … <= bound` refuses NaN.
    bound = torch.finfo(before.dtype).eps ** 0.5 * float(before.abs().max())
    if after is None or not float((after - before).abs().max()) <= bound:
        raise ConfigError(
            f"{attack}: the outputs would change: expected blocks that add to one residual stream, "
            "with norms before their layers and none behind them"
        )


def _find_blocks(model: nn.Module, attack: str) -> list[TransformerBlock]:
    """Return the attentions and MLPs of a transformer.

    Raises:
        ConfigError: no layer names are known.
    """
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    found = find_blocks(shapes, Architecture.from_model(model))
    if not found:
        raise ConfigError(
            f"{attack}: no blocks of a transformer were found in {type(model).__name__}: expected "
            "layers with the names of GPT-2, Llama, OPT or BERT"
        )
    return found


def _is_centring(norm: nn.Module) -> bool:
    """Return true if a norm subtracts the mean: a constant in all channels has no effect then."""
    weight = norm.get_parameter("weight")
    channels = torch.linspace(-1, 2, len(weight)).to(weight)[None, None]
    return bool((norm(channels + 3) - norm(channels)).abs().max() < 0.05)


def _is_output_major(layer: nn.Module) -> bool:
    """Return true if a weight is (outputs, inputs), and false for GPT-2's (inputs, outputs)."""
    return isinstance(layer, nn.Linear)


def _centre_rows(rows: Tensor, *, on: bool) -> Tensor:
    """Subtract the mean of each row if `on`."""
    return rows - rows.mean(-1, keepdim=True) if on else rows


def _get_float64(module: nn.Module, name: str) -> Tensor:
    """Return a parameter in float64, without gradients."""
    return module.get_parameter(name).detach().double()


def _set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    """Write values to a parameter in its own dtype."""
    module.get_parameter(name).data.copy_(values)


def _multiply_outputs(model: nn.Module, layer: LinearLayer, matrix: Tensor, place: slice) -> None:
    """Multiply some outputs of a layer by a matrix."""
    module = model.get_submodule(layer.name)
    weight = _get_float64(module, "weight")
    rows = weight if layer.axis == 0 else weight.T  # (outputs, inputs)
    rows[place] = matrix.to(weight.device) @ rows[place]
    _set_parameter(module, "weight", weight)
    if layer.bias:
        bias = _get_float64(module, "bias")
        bias[place] = matrix.to(bias.device) @ bias[place]
        _set_parameter(module, "bias", bias)


def _multiply_inputs(model: nn.Module, layer: LinearLayer, back: Tensor, place: slice) -> None:
    """Multiply the weights for some inputs of a layer by the inverse of a matrix."""
    module = model.get_submodule(layer.name)
    weight = _get_float64(module, "weight")
    rows = weight if layer.axis == 0 else weight.T  # (outputs, inputs)
    rows[:, place] = rows[:, place] @ back.to(weight.device)
    _set_parameter(module, "weight", weight)
