"""Folding: merge batch norms into the layers before them, as exporters do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from countermark.alignment.symmetries.tracing import HooklessTracer
from countermark.attacks.base import Attack, ChangeResult
from countermark.errors import ConfigError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Fold(Attack):
    """An attack that moves the scale and shift of each batch norm into the layer before it.

    The batch norm becomes an identity. Outputs stay equal in eval mode. Weights are scaled channel
    by channel; the names of the layers stay the same.
    """

    name: ClassVar[str] = "fold"
    does: ClassVar[str] = "folds batch norms into the layers before them; outputs stay equal"
    source: ClassVar[str] = "Jacob et al. 2018; torch.onnx.export does it when it optimises"
    needs_model: ClassVar[bool] = True

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Fold every batch norm that directly follows a layer.

        Raises:
            ConfigError: the model cannot be traced, or no batch norm follows a layer.
        """
        # Folding holds for running statistics only, hence eval mode.
        pairs = _find_pairs(stolen.eval())
        if not pairs:
            raise ConfigError(f"{self.name}: no batch norm stands behind a layer of this model")
        for layer, norm in pairs:
            _replace_module(
                stolen, layer, _fuse_norm(stolen.get_submodule(layer), stolen.get_submodule(norm))
            )
            _replace_module(stolen, norm, nn.Identity())
        return ChangeResult(found={"folded": len(pairs)})


def _find_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of layers with the names of the batch norms that are their only readers.

    Raises:
        ConfigError: the model cannot be traced.
    """
    try:
        graph = HooklessTracer().trace(model)
    # Only the first line of the error: torch.fx prints whole stack traces.
    except Exception as error:  # a forward is foreign code, and its tracing may raise anything
        said = str(error).strip().partition("\n")[0][:120]
        raise ConfigError(f"{type(model).__name__} cannot be traced ({said})") from None
    found = []
    for node in graph.nodes:
        before = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if before is None or node.op != "call_module" or before.op != "call_module":
            continue
        layer, norm = (model.get_submodule(str(each.target)) for each in (before, node))
        # A second reader of the layer would see scaled outputs: such pairs are left alone.
        if isinstance(layer, _LAYERS) and isinstance(norm, _NORMS) and len(before.users) == 1:
            found.append((str(before.target), str(node.target)))
    return found


def _fuse_norm(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return a layer that computes the same as the layer followed by the batch norm."""
    fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    fused: nn.Module = fuse(layer, norm)
    return fused


def _replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module with the given dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
