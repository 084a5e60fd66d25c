"""Detection: is there a mark at all? A thief who can tell knows where to attack.

The model is not changed; what was found is in `found`.
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

from countermark.attacks.base import Attack, Done
from countermark.errors import ConfigError, nearest
from countermark.weights import Suspect, open_weights

_QUANTILES = 64


@dataclass(frozen=True)
class DetectStatistic(Attack):
    """One number of one layer, held against that of unmarked models of the same kind.

    Attributes:
        layer: the tensor that is looked at.
        others: files of unmarked models that the thief trained or found.
        of: "values", or the "filter_mean", where marks as published show most.
    """

    name: ClassVar[str] = "detect_statistic"
    does: ClassVar[str] = "compares the spread of a layer's weights with unmarked models"
    source: ClassVar[str] = "Wang & Kerschbaum 2019 (the variance shows the mark of Uchida 2017)"

    layer: str
    others: Annotated[tuple[str, ...], Field(min_length=2)]
    of: Annotated[str, Field(pattern="^(values|filter_mean)$")] = field(
        default="values", kw_only=True
    )

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Measure; the model stays as it is."""
        seen = np.array([self._spread(Path(other)) for other in self.others])
        own = self._spread(stolen)
        rank = (1 + int((seen >= own).sum())) / (len(seen) + 1)
        found = {"spread": own, "unmarked_mean": float(seen.mean()), "rank_p": rank,
                 "ratio": own / float(seen.mean())}  # fmt: skip
        return Done(found=found)

    def _spread(self, suspect: Suspect) -> float:
        values = _tensor(suspect, self.layer)
        return float((values.mean(0) if self.of == "filter_mean" else values).std())


@dataclass(frozen=True)
class DetectSorted(Attack):
    """A classifier of sorted weights, trained on models that the thief marked, and did not mark.

    Each layer's weights are sorted and thinned to 64 quantiles, so that no order of neurons hides
    anything; a small network learns to tell the two kinds apart.

    Attributes:
        layer: the tensor that is looked at.
        marked, unmarked: files of the thief's own models of the two kinds.
        hidden: units of the classifier.
        steps: of Adam at 1e-2.
        seed: draws the classifier.
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

    def change(self, stolen: nn.Module, data: Any = None) -> Done:  # noqa: ARG002 - others train
        """Train the classifier, and ask it about the stolen model, which stays as it is."""
        files = [Path(each) for each in (*self.marked, *self.unmarked)]
        features = torch.from_numpy(np.stack([self._features(each) for each in files]))
        labels = torch.tensor([1.0] * len(self.marked) + [0.0] * len(self.unmarked))
        mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
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
        own = torch.from_numpy(self._features(stolen))
        with torch.no_grad():
            score = torch.sigmoid(net((own - mean) / spread)[0])
        right = float(((said > 0).float() == labels).float().mean())
        return Done(found={"marked_score": float(score), "right_on_its_own_models": right})

    def _features(self, suspect: Suspect) -> NDArray[np.float32]:
        values = _tensor(suspect, self.layer).ravel()
        at = np.linspace(0, 1, _QUANTILES)
        found: NDArray[np.float32] = np.quantile(values, at).astype(np.float32)
        return found


def _tensor(suspect: Suspect, layer: str) -> NDArray[np.floating[Any]]:
    with open_weights(suspect) as weights:
        if layer not in weights.tensors:
            raise ConfigError(
                f"{weights.name} has no tensor {layer!r}: {nearest(layer, weights.tensors)}"
            )
        return weights.read(layer).copy()
