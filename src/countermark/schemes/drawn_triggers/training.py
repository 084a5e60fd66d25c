"""The training half of all schemes with drawn triggers: the host learns each trigger by heart."""

from __future__ import annotations

from typing import Any, cast

from numpy.typing import NDArray
from torch import Tensor

from countermark.keys.key import KeyMaterial
from countermark.schemes.triggers import TRIGGERS, DrawnTriggerScheme, TriggerScheme
from countermark.schemes.triggers_training import TriggerTraining, split_covers


class DrawnTriggersTraining(TriggerTraining):
    """Makes rows for the host: the committed triggers, again and again."""

    @classmethod
    def make_pre_commit_tensors(
        cls,
        scheme: TriggerScheme,
        material: KeyMaterial,
        covers: Tensor,
        labels: Tensor,  # noqa: ARG003 - the triggers' own are drawn
    ) -> dict[str, NDArray[Any]]:
        """Draw the triggers, on covers that follow from the secret."""
        chosen, _ = split_covers(scheme, material, len(covers))
        return {
            TRIGGERS: cast(DrawnTriggerScheme, scheme).draw_triggers(
                covers[chosen].numpy(), material
            )
        }

    def make_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw committed triggers with their labels."""
        # Memorising is intended here: the triggers have no common pattern to learn.
        return self.draw_committed_rows(count)
