"""Overwriting: marks of the thief's own are embedded over the owner's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import PositiveFloat, PositiveInt
from torch import nn

from countermark.attacks.base import TrainingData
from countermark.attacks.fine_tune import FineTune
from countermark.errors import ConfigError
from countermark.key import Key, KeyMaterial
from countermark.schemes import scheme_named
from countermark.schemes.white_box import WeightScheme

_APART = 1_000_003  # between the thief's key numbers and those of the owners that he robs


@dataclass(frozen=True)
class Overwrite(FineTune):
    """Fresh marks, one after the other, each embedded while the copy is fine-tuned.

    The thief knows the algorithm and where the owner's mark lies, and has keys of his own.

    Attributes:
        lr: learning rate of the fine-tuning.
        scheme: what the thief embeds, by name.
        mark: fields of that scheme.
        times: how many marks.
    """

    name: ClassVar[str] = "overwrite"
    does: ClassVar[str] = "embeds marks with the thief's own keys over the owner's"
    source: ClassVar[str] = "Uchida et al. 2017, overwriting; Wang et al. 2020, Conclusion"

    lr: PositiveFloat = 0.001
    scheme: str = field(default="uchida", kw_only=True)
    mark: dict[str, Any] = field(kw_only=True)
    times: PositiveInt = field(default=1, kw_only=True)

    def change(self, stolen: nn.Module, data: TrainingData) -> tuple[float, float]:
        """Embed the marks; the thief's keys are not kept.

        Raises:
            ConfigError: as for fine-tuning, or scheme and fields do not fit the model.
        """
        _, share = self.overwritten(stolen, data)
        return float(self.epochs * self.times), share

    def overwritten(self, stolen: nn.Module, data: TrainingData) -> tuple[list[Key], float]:
        """Embed the marks.

        Returns: the thief's keys, and the share of the training rows that was used.
        """
        scheme = scheme_named(self.scheme).from_fields(self.mark)
        if not isinstance(scheme, WeightScheme):
            raise ConfigError(
                f"{self.name}: {scheme.name} lives in {scheme.family}, not in weights"
            )
        keys, share = [], 0.0
        for number in range(self.times):
            # Drawn from the seed, so that an attack can be repeated: it claims nothing in earnest.
            material = KeyMaterial.for_tests(_APART * (self.seed + 1) + number)
            with scheme.embed(stolen, owner="thief", material=material) as mark:
                share = self.tune(stolen, data, mark)
            if mark.drawn_key is not None:  # MANU draws none before its weights have converged
                keys.append(mark.drawn_key)
        return keys, share
