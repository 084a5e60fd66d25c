"""The registry of attacks by name.

A new family of attacks adds one file to this package and its classes to `ATTACKS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from countermark.attacks.average import Average
from countermark.attacks.base import Attack
from countermark.attacks.dead_units import DeadUnits
from countermark.attacks.detect import DetectSorted, DetectStatistic
from countermark.attacks.fine_prune import FinePrune
from countermark.attacks.fine_tune import FineTune
from countermark.attacks.fold import Fold
from countermark.attacks.forge import ForgeReader, ForgeSigns, Invert, SearchKey
from countermark.attacks.forge_triggers import ForgeTriggers
from countermark.attacks.imitate import Imitate
from countermark.attacks.invariants import Dummies, FlipSigns, Permute, Rescale
from countermark.attacks.isomorph import Isomorph
from countermark.attacks.lora import LoRA
from countermark.attacks.move_blocks import MoveBlocks
from countermark.attacks.noise import Noise, Shift
from countermark.attacks.output_layer import ReorderClasses, ShiftLogits
from countermark.attacks.overwrite import Overwrite, OverwriteClosedForm
from countermark.attacks.prune import Prune
from countermark.attacks.prune_structured import PruneStructured
from countermark.attacks.prune_unused import PruneUnused
from countermark.attacks.quantise import Quantise
from countermark.attacks.retrain import Retrain
from countermark.attacks.rotate import Rotate, TurnValues
from countermark.attacks.sweep import FineTuneSweep
from countermark.errors import find_by_name

# The order here is the order in which `countermark attack list` prints the attacks.
ATTACKS: Mapping[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        Prune, PruneUnused, PruneStructured, FinePrune, Quantise, Noise, Shift, Average,
        FineTune, FineTuneSweep, LoRA, Retrain, Imitate, Overwrite, OverwriteClosedForm,
        Permute, Rescale, FlipSigns, Dummies, Fold, Isomorph,
        DeadUnits, ShiftLogits, ReorderClasses, Rotate, TurnValues, MoveBlocks,
        ForgeReader, ForgeSigns, SearchKey, ForgeTriggers, Invert, DetectStatistic, DetectSorted,
    )
}  # fmt: skip


def find_attack(name: str) -> type[Attack]:
    """Return the attack class with the given name.

    Raises:
        ConfigError: no attack has this name; the message names the nearest known name.
    """
    return find_by_name("attack", name, ATTACKS)
