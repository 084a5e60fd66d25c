"""The training half of every scheme whose triggers are drawn: the host learns them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from countermark.key import Key, KeyMaterial
from countermark.schemes.black_box import TRIGGERS, DrawnTriggers, TriggerScheme
from countermark.schemes.training.black_box import TriggerTraining


class DrawnTriggersTraining(TriggerTraining):
    """Rows for the host: the committed triggers, again and again."""

    def __init__(self, scheme: TriggerScheme, key: Key, covers: Tensor, labels: Tensor) -> None:
        super().__init__(scheme, key, covers, labels)
        seed = int(key.stream("rows").words(1)[0]) >> 1
        self._generator = torch.Generator().manual_seed(seed)
        self._triggers = torch.from_numpy(scheme.committed(key).copy())
        self._secret_labels = torch.from_numpy(scheme.labels(key))

    @classmethod
    def prepare(
        cls, scheme: TriggerScheme, material: KeyMaterial, covers: Tensor
    ) -> dict[str, NDArray[Any]]:
        """Draw the triggers, on covers that follow from the secret."""
        rows = material.stream("covers").permutation(len(covers))[: scheme.triggers]
        chosen = covers[torch.from_numpy(rows)].numpy()
        return {TRIGGERS: cast(DrawnTriggers, scheme).draw(chosen, material)}

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Some of the triggers, with their labels."""
        at = torch.randint(len(self._triggers), (count,), generator=self._generator)
        return self._triggers[at], self._secret_labels[at]

    def state(self) -> dict[str, Any]:
        """The random numbers."""
        return {"generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._generator.set_state(state["generator"])


TRAINING = DrawnTriggersTraining
