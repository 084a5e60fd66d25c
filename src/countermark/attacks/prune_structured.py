"""Structured pruning: remove whole neurons and channels, so that the layers around them shrink."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from countermark.attacks.base import Attack, ChangeResult, TrainingData, compute_first_scores
from countermark.errors import ConfigError, MissingExtraError


@dataclass(frozen=True)
class PruneStructured(Attack):
    """An attack that removes the channels of smallest magnitude and all their weights.

    torch-pruning finds the dependencies between layers by following one image through the model.
    The tensors get other shapes, so a key that reads them finds no tensor of its shapes.

    Attributes:
        fraction: share of each layer's channels that is removed; outputs are kept.
        norm: 1 or 2, the norm that measures a channel's weights.
    """

    name: ClassVar[str] = "prune_structured"
    does: ClassVar[str] = "removes whole neurons and channels, the smallest first"
    source: ClassVar[str] = "Li et al. 2017 (filter pruning), Fang et al. 2023 (DepGraph)"
    needs_data: ClassVar[bool] = True

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    norm: Annotated[int, Field(ge=1, le=2)] = field(default=1, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Remove the channels; the thief's data give the shape of an image.

        Raises:
            ConfigError: torch-pruning cannot follow the model, or no channel may be removed.
            MissingExtraError: torch-pruning is not installed.
        """
        try:
            import torch_pruning
        except ImportError:
            raise MissingExtraError(self.name, "attacks") from None
        answer = compute_first_scores(stolen, data)
        # The last linear layer makes the class scores: its outputs must stay.
        outputs = [module for module in stolen.modules() if isinstance(module, nn.Linear)][-1:]
        before = sum(each.numel() for each in stolen.parameters())
        try:
            # torch-pruning finds dependencies in the autograd graph, which the caller may have
            # switched off.
            with torch.enable_grad():
                torch_pruning.pruner.MagnitudePruner(
                    stolen, data.normalised(data.train_images[:1]).to(answer.device),
                    torch_pruning.importance.MagnitudeImportance(p=self.norm),
                    pruning_ratio=self.fraction, ignored_layers=outputs,
                ).step()  # fmt: skip
        except Exception as error:  # the library raises whatever its graph runs into
            said = str(error).strip().partition("\n")[0][:120]
            raise ConfigError(
                f"{self.name}: torch-pruning cannot follow this model ({said}): take prune"
            ) from None
        left = sum(each.numel() for each in stolen.parameters()) / before
        return ChangeResult(data_share=1 / len(data.train_images), found={"parameters_left": left})
