"""Detection of marks: a thief who can tell that a mark is there knows where to attack.

These attacks leave the model unchanged and report their findings in `found`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import nn

from countermark.attacks.base import Attack, ChangeResult
from countermark.checkpoints import Suspect, open_weights
from countermark.errors import ConfigError, suggest_nearest

# Few enough to train the classifier on a handful of models, and equal for layers of any size.
_QUANTILES = 64


@dataclass(frozen=True)
class DetectStatistic(Attack):
    """An attack that compares the spread of one layer's weights with unmarked models.

    Attributes:
        layer: name of the tensor that is measured.
        others: files of unmarked models that the thief trained or found.
        of: measure "values", or the "filter_mean", where marks as published show most.
    """

    name: ClassVar[str] = "detect_statistic"
    does: ClassVar[str] = "compares the spread of a layer's weights with unmarked models"
    source: ClassVar[str] = "Wang & Kerschbaum 2019 (the variance shows the mark of Uchida 2017)"

    layer: str
    others: Annotated[tuple[str, ...], Field(min_length=2)]
    of: Annotated[str, Field(pattern="^(values|filter_mean)$")] = field(
        default="values", kw_only=True
    )

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Measure the spread and compare it; the model stays unchanged."""
        seen = np.array([self._measure_spread(Path(other)) for other in self.others])
        own = self._measure_spread(stolen)
        # The stolen model counts among the models, so the rank p-value is never 0.
        rank = (1 + int((seen >= own).sum())) / (len(seen) + 1)
        found = {"spread": own, "unmarked_mean": float(seen.mean()), "rank_p": rank,
                 "ratio": own / float(seen.mean())}  # fmt: skip
        return ChangeResult(found=found)

    def _measure_spread(self, suspect: Suspect) -> float:
        """Return the standard deviation of the layer's values or of its mean filter."""
        values = _read_tensor(suspect, self.layer)
        return float((values.mean(0) if self.of == "filter_mean" else values).std())


@dataclass(frozen=True)
class DetectSorted(Attack):
    """An attack that classifies sorted weights, trained on the thief's own models.

    Each layer's weights are sorted and thinned to 64 quantiles, so that a reordering of neurons
    hides nothing; a small network learns to tell marked from unmarked models.

    Attributes:
        layer: name of the tensor that is measured.
        marked, unmarked: files of the thief's own marked and unmarked models.
        hidden: number of hidden units of the classifier.
        steps: number of Adam steps at learning rate 1e-2.
        seed: seed of the classifier's initial weights.
    """

    name: ClassVar[str] = "detect_sorted"
    does: ClassVar[str] = "classifies sorted weights as marked or not, trained on the thief's own"
    source: ClassVar[str] = "Wang & Kerschbaum 2021 (RIGA), property inference"

    layer: str
    marked: Annotated[tuple[str, ...], Field(min_length=2)]
    unmarked: Annotated[tuple[str, ...], Field(min_length=2)]
    hidden: PositiveInt = field(default=16, kw_only=True)
    steps: PositiveInt = field(default=200, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, stolen: nn.Module, data: Any = None) -> ChangeResult:  # noqa: ARG002 - others train
        """Train the classifier and apply it to the stolen model, which stays unchanged."""
        files = [Path(each) for each in (*self.marked, *self.unmarked)]
        features = torch.from_numpy(np.stack([self._compute_features(each) for each in files]))
        labels = torch.tensor([1.0] * len(self.marked) + [0.0] * len(self.unmarked))
        mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
        # nn.Linear draws its weights from torch's global generator: seed it, then restore its
        # state.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            net = nn.Sequential(nn.Linear(_QUANTILES, self.hidden), nn.ReLU(),
                                nn.Linear(self.hidden, 1))  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), 1e-2, weight_decay=1e-3)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                said = net((features - mean) / spread)[:, 0]
                F.binary_cross_entropy_with_logits(said, labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        own = torch.from_numpy(self._compute_features(stolen))
        with torch.no_grad():
            score = torch.sigmoid(net((own - mean) / spread)[0])
        right = float(((said > 0).float() == labels).float().mean())
        return ChangeResult(found={"marked_score": float(score), "right_on_its_own_models": right})

    def _compute_features(self, suspect: Suspect) -> NDArray[np.float32]:
        """Return 64 quantiles of the layer's values, float32 (64,)."""
        values = _read_tensor(suspect, self.layer).ravel()
        at = np.linspace(0, 1, _QUANTILES)
        found: NDArray[np.float32] = np.quantile(values, at).astype(np.float32)
        return found


def _read_tensor(suspect: Suspect, layer: str) -> NDArray[np.floating[Any]]:
    """Read a tensor of a suspect.

    Raises:
        ConfigError: the suspect has no tensor of this name; the message names the nearest.
    """
    with open_weights(suspect) as weights:
        if layer not in weights.tensors:
            raise ConfigError(
                f"{weights.name} has no tensor {layer!r}: {suggest_nearest(layer, weights.tensors)}"
            )
        # A copy, because the array may be a view of the file, which closes at the end of the block.
        return weights.read(layer).copy()
