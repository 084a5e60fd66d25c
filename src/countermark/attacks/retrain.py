"""Retraining: train every layer on new data at a high rate; the attack that is expected to win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt

from countermark.attacks.fine_tune import FineTune


@dataclass(frozen=True)
class Retrain(FineTune):
    """An attack that fine-tunes all layers at a high learning rate on the thief's own data.

    No mark in the weights is expected to survive. Wang et al. 2020 exclude this attack ("cannot
    resist against model retraining"): a thief with enough data and time hardly needs the stolen
    model.

    Attributes:
        lr: learning rate, ten times the rate at which the built-in models are trained.
        epochs: passes over the thief's rows.
    """

    name: ClassVar[str] = "retrain"
    does: ClassVar[str] = "trains all layers on new data at a high rate; expected to win"
    source: ClassVar[str] = "Wang et al. 2020, Model Retraining"

    # Ten times the default rate of fine_prune, lora and overwrite.
    lr: PositiveFloat = 0.01
    epochs: PositiveInt = 20
