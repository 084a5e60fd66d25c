"""The attacks by name. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from countermark.attacks.base import Attack
from countermark.attacks.fine_tune import FineTune
from countermark.attacks.overwrite import Overwrite
from countermark.attacks.prune import Prune
from countermark.attacks.prune_unused import PruneUnused
from countermark.attacks.retrain import Retrain
from countermark.errors import named

ATTACKS: Mapping[str, type[Attack]] = {
    Prune.name: Prune,
    PruneUnused.name: PruneUnused,
    FineTune.name: FineTune,
    Retrain.name: Retrain,
    Overwrite.name: Overwrite,
}


def attack_named(name: str) -> type[Attack]:
    """The attack class of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    return named("attack", name, ATTACKS)
