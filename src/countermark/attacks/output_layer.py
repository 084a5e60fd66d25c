"""Free edits of the last layer: one vector added to all rows, or another order of classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from countermark.attacks.base import Attack, Done
from countermark.errors import ConfigError, nearest
from countermark.units import Architecture, blocks_of

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
HEADS = ("lm_head", "score", "classifier", "head", "fc", "output")


@dataclass(frozen=True)
class ShiftLogits(Attack):
    """One random vector is added to every row of the last layer: probabilities stay as they are.

    All scores move alike, and softmax minds differences only. Scores themselves change.

    Attributes:
        scale: of the vector, in standard deviations of the layer's weights.
        layer: name of the weight tensor; empty for a live model's last layer.
        seed: draws the vector.
    """

    name: ClassVar[str] = "shift_logits"
    does: ClassVar[str] = "adds one vector to all rows of the last layer; probabilities stay equal"
    source: ClassVar[str] = "softmax minds differences of scores only; measured here"

    scale: PositiveFloat = 10.0
    layer: str = field(default="", kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Add the vector.

        Raises:
            ConfigError: the layer is not there, or which is the last cannot be told.
        """
        found = last_layer(stolen, self.layer, self.name)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            drawn = torch.randn(found.weight.shape[1:], generator=generator, dtype=torch.float64)
            found.weight.add_(
                (drawn * self.scale * float(found.weight.double().std())).to(found.weight)
            )
        return Done(found={"layer": found.name, "untied": found.untied})


@dataclass(frozen=True)
class ReorderClasses(Attack):
    """The rows and biases of the last layer are put into another order: outputs are renamed.

    It costs the thief's users a table of which output is which.

    Attributes:
        layer: as for `ShiftLogits`.
        seed: draws the order.
    """

    name: ClassVar[str] = "reorder_classes"
    does: ClassVar[str] = "puts the outputs of the last layer into another order: renames classes"
    source: ClassVar[str] = "a permutation of the classes; measured here"

    layer: str = ""
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Reorder the classes; `found` says which output each now is.

        Raises:
            ConfigError: as for `ShiftLogits`.
        """
        found = last_layer(stolen, self.layer, self.name)
        order = torch.randperm(
            len(found.weight), generator=torch.Generator().manual_seed(self.seed)
        )
        with torch.no_grad():
            for tensor in (found.weight, found.bias):
                if tensor is not None:
                    tensor.copy_(tensor[order.to(tensor.device)].clone())
        return Done(found={"layer": found.name, "untied": found.untied, "order": order.tolist()})


@dataclass(frozen=True)
class LastLayer:
    """A model's last layer: the name of its weight (classes, ...), weight and bias.

    `untied` says that it shared its weight with the embeddings and has one of its own now.
    """

    name: str
    weight: nn.Parameter
    bias: Tensor | None
    untied: bool = False


def last_layer(model: nn.Module, name: str, attack: str) -> LastLayer:
    """Find the layer that makes a model's scores, with a weight of its own.

    Args:
        model: changed only where the layer shares its weight with the embeddings.
        name: of its weight; empty for the last layer of a live model.
        attack: whom an error names.

    Raises:
        ConfigError: there is no tensor of that name, or which layer is the last cannot be told.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    name = name or _found_name(model)
    if not name:
        raise ConfigError(
            f"{attack}: which layer of {type(model).__name__} makes the scores cannot be told: "
            "name its weight in layer"
        )
    if name not in parameters or parameters[name].dim() < 2:
        raise ConfigError(f"{attack}: no weight {name!r} in the model: {nearest(name, parameters)}")
    untied = untie(model, name)
    module, _, last = name.rpartition(".")
    place = model.get_submodule(module)
    bias = place._parameters.get("bias")
    return LastLayer(name, place._parameters[last], bias, untied)  # type: ignore[arg-type]


def untie(model: nn.Module, name: str) -> bool:
    """Give a tensor that stands under other names, too, a parameter of its own; say if it did."""
    module, _, last = name.rpartition(".")
    place = model.get_submodule(module)
    parameter = place._parameters[last]
    same = [each for each, other in model.named_parameters(remove_duplicate=False)
            if other is parameter]  # fmt: skip
    if parameter is None or len(same) == 1:
        return False
    place._parameters[last] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    configuration = getattr(model, "config", None)
    if getattr(configuration, "tie_word_embeddings", False):
        configuration.tie_word_embeddings = False  # type: ignore[union-attr]
    return True


def _found_name(model: nn.Module) -> str:
    """The name of the weight of a live model's last layer; empty where that cannot be told."""
    layers = [name for name, each in model.named_modules() if isinstance(each, _LAYERS)]
    named = [each for each in layers if each.rpartition(".")[2] in HEADS]
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    if blocks_of(shapes, Architecture.of_model(model)):  # a block's own layers make no scores
        layers = [each for each in named if "." not in each]
    if not layers:
        return ""
    return f"{layers[-1]}.weight" if layers[-1] else "weight"
