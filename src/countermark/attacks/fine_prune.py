"""Fine-pruning: cut off channels that are inactive on the thief's images, then fine-tune."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from countermark.alignment.symmetries import PermutationGroup
from countermark.alignment.symmetries.tracing import trace_permutation_groups
from countermark.attacks.base import (
    ChangeResult,
    TrainingData,
    compute_first_scores,
    compute_scores,
)
from countermark.attacks.fine_tune import FineTune
from countermark.errors import ConfigError


@dataclass(frozen=True)
class FinePrune(FineTune):
    """An attack that cuts off the least active channels and then fine-tunes.

    A channel is cut off by zeros in the weights with which the next layer reads it. Its activity is
    the mean magnitude of its layer's outputs on the thief's rows.

    Attributes:
        lr: learning rate of the fine-tuning.
        fraction: share of the layer's channels that is cut off.
        layer: name of the weight whose output channels are pruned; the last class of channels
            when empty.
    """

    name: ClassVar[str] = "fine_prune"
    does: ClassVar[str] = "cuts off channels that sleep on the thief's images, then fine-tunes"
    source: ClassVar[str] = "Liu et al. 2018 (Fine-Pruning); Lukas et al. 2022 (SoK)"

    lr: PositiveFloat = 0.001
    fraction: Annotated[float, Field(ge=0, le=1)] = field(default=0.5, kw_only=True)
    layer: str = field(default="", kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> ChangeResult:
        """Cut channels off and train the rest.

        Raises:
            ConfigError: as for fine-tuning, or no other layer reads channels of the named layer.
        """
        units, producer = self._find_channels(stolen)
        activity = self._measure_activity(stolen, data, producer)
        asleep = activity.argsort()[: round(self.fraction * units.size)].cpu().numpy()
        state = stolen.state_dict()
        with torch.no_grad():
            for member in units.members:
                # A negative power marks a consumer: without its weights a channel has no effect.
                if member.power < 0:
                    places = torch.from_numpy(member.compute_positions(asleep))
                    state[member.name].index_fill_(member.axis, places.to(activity.device), 0)
        share = self.tune(stolen, data)
        return ChangeResult(float(self.epochs), share, found={"channels_cut": len(asleep)})

    def _find_channels(self, stolen: nn.Module) -> tuple[PermutationGroup, str]:
        """Return the class of channels, and the name of the module that produces it.

        Raises:
            ConfigError: no other layer reads channels of the named layer.
        """
        # Liu et al. 2018 prune the last convolutional layer, so the search starts at the back.
        for units in reversed(trace_permutation_groups(stolen)):
            made = [m.name for m in units.members if m.power == 1 and m.name.endswith("weight")]
            layers = [name for name in made if stolen.get_parameter(name).dim() > 1]
            if layers and (not self.layer or self.layer in layers):
                name = self.layer or layers[-1]
                return units, name.rpartition(".")[0]
        raise ConfigError(
            f"{self.name}: no channels of {self.layer or 'this model'} are read by another layer"
        )

    def _measure_activity(self, stolen: nn.Module, data: TrainingData, producer: str) -> Tensor:
        """Return the mean magnitude (units,) of a module's outputs on at most a thousand images."""
        seen: list[Tensor] = []

        def record_output(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            """Record the mean magnitude of each output channel over the batch and all positions."""
            del module, given
            seen.append(out.flatten(2).abs().mean((0, 2)) if out.dim() > 2 else out.abs().mean(0))

        device = compute_first_scores(stolen, data).device
        hook = stolen.get_submodule(producer).register_forward_hook(record_output)
        try:
            with torch.no_grad():
                # Ten batches of at most a hundred images bound the memory for the activations.
                for at in np.array_split(np.arange(min(1000, len(data.train_images))), 10):
                    if len(at):
                        images = data.train_images[torch.from_numpy(at)]
                        compute_scores(stolen, data.normalised(images).to(device))
        finally:
            hook.remove()
        return torch.stack(seen).mean(0)
