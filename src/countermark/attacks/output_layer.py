"""Free edits of the last layer: one vector added to all rows, or another order of the classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from countermark.alignment.symmetries import Architecture, find_block_groups
from countermark.attacks.base import Attack, ChangeResult
from countermark.errors import ConfigError, suggest_nearest

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Names of output layers in the usual libraries.
HEADS = ("lm_head", "score", "classifier", "head", "fc", "output")


@dataclass(frozen=True)
class ShiftLogits(Attack):
    """An attack that adds one random vector to every row of the last layer.

    All scores move by the same amount. Softmax depends on differences only, so probabilities stay
    equal.

    Attributes:
        scale: size of the vector, in standard deviations of the layer's weights.
        layer: name of the weight tensor; empty for a live model's last layer.
        seed: seed of the vector.
    """

    name: ClassVar[str] = "shift_logits"
    does: ClassVar[str] = "adds one vector to all rows of the last layer; probabilities stay equal"
    source: ClassVar[str] = "softmax minds differences of scores only; measured here"

    scale: PositiveFloat = 10.0
    layer: str = field(default="", kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Add the vector.

        Raises:
            ConfigError: the model has no such layer, or its last layer cannot be determined.
        """
        found = find_last_layer(stolen, self.layer, self.name)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            # Without axis 0, so that every class's row gets the same vector.
            drawn = torch.randn(found.weight.shape[1:], generator=generator, dtype=torch.float64)
            found.weight.add_(
                (drawn * self.scale * float(found.weight.double().std())).to(found.weight)
            )
        return ChangeResult(found={"layer": found.name, "untied": found.untied})


@dataclass(frozen=True)
class ReorderClasses(Attack):
    """An attack that reorders the rows and biases of the last layer: the classes get other numbers.

    The thief's users then need a table from outputs to classes.

    Attributes:
        layer: as for `ShiftLogits`.
        seed: seed of the order.
    """

    name: ClassVar[str] = "reorder_classes"
    does: ClassVar[str] = "puts the outputs of the last layer into another order: renames classes"
    source: ClassVar[str] = "a permutation of the classes; measured here"

    layer: str = ""
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Reorder the classes; `found` holds the old number of each output.

        Raises:
            ConfigError: as for `ShiftLogits`.
        """
        found = find_last_layer(stolen, self.layer, self.name)
        order = torch.randperm(
            len(found.weight), generator=torch.Generator().manual_seed(self.seed)
        )
        with torch.no_grad():
            for tensor in (found.weight, found.bias):
                if tensor is not None:
                    # In place, so that the module keeps its tensor objects.
                    tensor.copy_(tensor[order.to(tensor.device)].clone())
        return ChangeResult(
            found={"layer": found.name, "untied": found.untied, "order": order.tolist()}
        )


@dataclass(frozen=True)
class LastLayer:
    """A model's last layer: the name of its weight, its weight (classes, ...) and its bias.

    Attributes:
        untied: the layer shared its weight with the embeddings and now has a weight of its own.
    """

    name: str
    weight: nn.Parameter
    bias: Tensor | None
    untied: bool = False


def find_last_layer(model: nn.Module, name: str, attack: str) -> LastLayer:
    """Find the layer that makes a model's scores, and give it a weight of its own.

    Args:
        model: changed only if the layer shares its weight with the embeddings.
        name: name of the weight; empty for the last layer of a live model.
        attack: name of the attack, for the error message.

    Raises:
        ConfigError: no tensor has this name, or the last layer cannot be determined.
    """
    # Without duplicates, a tied output layer would appear under the name of the embeddings only.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    name = name or _find_layer_name(model)
    if not name:
        raise ConfigError(
            f"{attack}: which layer of {type(model).__name__} makes the scores cannot be told: "
            "name its weight in layer"
        )
    if name not in parameters or parameters[name].dim() < 2:
        raise ConfigError(
            f"{attack}: no weight {name!r} in the model: {suggest_nearest(name, parameters)}"
        )
    untied = untie_weight(model, name)
    module, _, last = name.rpartition(".")
    place = model.get_submodule(module)
    bias = place._parameters.get("bias")
    return LastLayer(name, place._parameters[last], bias, untied)  # type: ignore[arg-type]


def untie_weight(model: nn.Module, name: str) -> bool:
    """Give a shared tensor a parameter of its own; return true if it was shared."""
    module, _, last = name.rpartition(".")
    place = model.get_submodule(module)
    parameter = place._parameters[last]
    same = [each for each, other in model.named_parameters(remove_duplicate=False)
            if other is parameter]  # fmt: skip
    if parameter is None or len(same) == 1:
        return False
    place._parameters[last] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    # `transformers` ties the weights again at the next load unless the configuration forbids it.
    configuration = getattr(model, "config", None)
    if getattr(configuration, "tie_word_embeddings", False):
        configuration.tie_word_embeddings = False  # type: ignore[union-attr]
    return True


def _find_layer_name(model: nn.Module) -> str:
    """Return the name of the last layer's weight in a live model; "" if it cannot be determined."""
    layers = [name for name, each in model.named_modules() if isinstance(each, _LAYERS)]
    named = [each for each in layers if each.rpartition(".")[2] in HEADS]
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    if find_block_groups(
        shapes, Architecture.from_model(model)
    ):  # a block's own layers make no scores
        layers = [each for each in named if "." not in each]
    if not layers:
        return ""
    return f"{layers[-1]}.weight" if layers[-1] else "weight"
