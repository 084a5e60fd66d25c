"""Isomorph: export the model as an ONNX graph with other names, another order, and no batch norms.

The graph computes the same outputs. Some weights lie in initializers, others in Constant nodes.
Only the values still show which layer is which.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from countermark._internal.files import write_bytes
from countermark.attacks.base import Attack, ChangeResult, TrainingData, compute_first_scores
from countermark.errors import ConfigError, MissingExtraError


@dataclass(frozen=True)
class Isomorph(Attack):
    """An attack that exports the model to ONNX, folds batch norms, and renames and moves tensors.

    Attributes:
        constants: share of the weights that become Constant nodes.
        seed: seed of names and order.
    """

    name: ClassVar[str] = "isomorph"
    does: ClassVar[str] = "exports to an ONNX graph with other names, order and folded batch norms"
    source: ClassVar[str] = "Wang et al. 2023 (isomorphic graphs); torch.onnx.export"
    needs_data: ClassVar[bool] = True

    constants: Annotated[float, Field(ge=0, le=1)] = 0.5
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Export, rename and reorder; the thief's data give the shape of an image.

        Raises:
            ConfigError: the model cannot be exported.
            MissingExtraError: onnx or onnxscript is not installed.
        """
        # Two images, not one: export specialises the graph to a batch of size 1.
        device = compute_first_scores(stolen, data).device
        graph = _export_graph(stolen.eval(), data.normalised(data.train_images[:2]).to(device))
        drawn = np.random.default_rng(self.seed)
        _rename_tensors(graph, drawn)
        _move_to_constants(graph, drawn, self.constants)
        order = drawn.permutation(len(graph.graph.initializer))
        moved = [graph.graph.initializer[int(at)] for at in order]
        # Serialised copies stay valid after the deletion below.
        kept = [type(each).FromString(each.SerializeToString()) for each in moved]
        del graph.graph.initializer[:]
        graph.graph.initializer.extend(kept)
        return ChangeResult(data_share=2 / len(data.train_images), model=OnnxModel(graph))


class OnnxModel(nn.Module):
    """An ONNX graph as a module with parameters "t0" and so on; onnxruntime runs it."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        from onnx import numpy_helper

        self.graph = graph
        # The session is made at the first call: onnxruntime is an extra that saving does not need.
        self._session: Any = None
        for name, tensor in _collect_tensors(graph).items():
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            if values.is_floating_point():
                self.register_parameter(name, nn.Parameter(values, requires_grad=False))
            else:
                self.register_buffer(name, values)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (N, classes) of images (N, C, H, W).

        Raises:
            MissingExtraError: onnxruntime is not installed.
        """
        if self._session is None:
            try:
                import onnxruntime
            except ImportError:
                raise MissingExtraError("running an ONNX graph", "onnx") from None
            options = onnxruntime.SessionOptions()
            # Severity 3 prints errors only.
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            self._session = onnxruntime.InferenceSession(
                self.graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        (given,) = self._session.get_inputs()
        said = self._session.run(None, {given.name: images.cpu().numpy()})
        return torch.from_numpy(said[0])

    def save(self, path: Path) -> None:
        """Write the graph as an ONNX file; a failure leaves no partial file."""
        write_bytes(path, self.graph.SerializeToString())


def _export_graph(model: nn.Module, images: Tensor) -> Any:
    """Export the model as an ONNX graph that takes batches of any size.

    Raises:
        ConfigError: torch cannot export the model.
        MissingExtraError: onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401 - torch.onnx asks for it
    except ImportError:
        raise MissingExtraError("the attack isomorph", "onnx") from None
    # The exporter's logs and warnings concern its internals; a user of the attack cannot act on
    # them.
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = torch.export.Dim("batch", min=1)
            program = torch.onnx.export(
                model, (images,), dynamo=True, verbose=False, optimize=True,
                dynamic_shapes=({0: batch},),
            )  # fmt: skip
        if program is None:
            raise TypeError("nothing was exported")
        return program.model_proto
    except Exception as error:  # export runs foreign code and raises many kinds
        said = str(error).strip().partition("\n")[0][:120]
        raise ConfigError(f"isomorph: the model cannot be exported to ONNX ({said})") from error
    finally:
        quiet.setLevel(level)


def _collect_tensors(graph: Any) -> dict[str, Any]:
    """Return initializers and the values of Constant nodes by name."""
    found = {each.name: each for each in graph.graph.initializer}
    for node in graph.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                found[node.output[0]] = attribute.t
    return found


def _rename_tensors(graph: Any, drawn: np.random.Generator) -> None:
    """Rename every tensor and node; inputs and outputs of the graph keep their names."""
    kept = {each.name for each in (*graph.graph.input, *graph.graph.output)}
    names = [each.name for each in graph.graph.initializer]
    names += [name for node in graph.graph.node for name in node.output]
    numbers = drawn.permutation(len(names))
    new = {n: f"t{k}" for n, k in zip(names, numbers, strict=True) if n and n not in kept}
    for each in graph.graph.initializer:
        each.name = new.get(each.name, each.name)
    for at, node in enumerate(graph.graph.node):
        node.name = f"n{at}"
        # Metadata and value infos hold the original names of the layers.
        del node.metadata_props[:]
        for part in (node.input, node.output):
            part[:] = [new.get(name, name) for name in part]
    del graph.graph.value_info[:]
    del graph.graph.metadata_props[:]
    del graph.metadata_props[:]


def _move_to_constants(graph: Any, drawn: np.random.Generator, share: float) -> None:
    """Turn a share of the initializers into Constant nodes at the start of the graph."""
    from onnx import helper

    moved = [each for each in graph.graph.initializer if drawn.random() < share]
    nodes = [helper.make_node("Constant", [], [each.name], value=each) for each in moved]
    for each in moved:
        graph.graph.initializer.remove(each)
    # ONNX lists nodes in topological order, so the constants come before their readers.
    behind = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes, *behind])
