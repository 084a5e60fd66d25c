"""Retraining: every layer learns new data at a high rate. Expected to win, at the highest cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt

from countermark.attacks.fine_tune import FineTune


@dataclass(frozen=True)
class Retrain(FineTune):
    """Fine-tuning that spares nothing: all layers, a high learning rate, the thief's own data.

    No mark in the weights is expected to stay. Wang et al. 2020 exclude it ("cannot resist against
    model retraining"): a thief who has data and time for it hardly needs the stolen model.

    Attributes:
        lr: learning rate, ten times that of the hosts here.
        epochs: passes over the thief's rows.
    """

    name: ClassVar[str] = "retrain"
    does: ClassVar[str] = "trains all layers on new data at a high rate; expected to win"
    source: ClassVar[str] = "Wang et al. 2020, Model Retraining"

    lr: PositiveFloat = 0.01
    epochs: PositiveInt = 20
