"""Li and Guo 2019, DeepStego: a logo, hidden in images by a secret network, changes the answer.

As printed, nothing ties the mark to its owner. Here the stego network is trained first and frozen,
the committed triggers get keyed random labels (`SecretLabels`), and the host is shown the triggers
of foreign networks, logos and keys under their true labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from countermark.answers import Predict
from countermark.errors import ConfigError
from countermark.key import Key
from countermark.nulls import Evidence, Null, SecretClassMap
from countermark.schemes.base import Paper
from countermark.schemes.black_box import FreshTriggers, TriggerScheme
from countermark.schemes.logo import logo_bits


@dataclass(frozen=True)
class DeepStego(TriggerScheme):
    """Triggers that look like their covers, made by a stego network that is part of the key.

    Attributes:
        psnr: of triggers against their covers, in dB, on average; held from both sides.
        stego_steps: how long a stego network is trained.
        foreign: how many foreign stego networks the host learns to disregard.
        strength: of the first triggers that the host sees, as a multiple of the final residual.
        warm_up: for how many batches the strength goes down to 1; about a third of the training.
        pool: of how many covers the rows are made that the host learns.
        logo: a picture file that is reduced to 8 × 8 bits; "" for bits drawn from the secret.
    """

    name: ClassVar[str] = "deepstego"
    paper: ClassVar[Paper] = Paper(
        authors="Z. Li, S. Guo",
        title="DeepStego: Protecting Intellectual Property of Deep Neural Networks by "
        "Steganography",
        venue="manuscript",
        year=2019,
        doi="",
    )

    triggers: Annotated[int, Field(ge=1, le=1 << 16)] = field(default=100)
    psnr: Annotated[float, Field(gt=20, lt=60)] = field(default=36.0, kw_only=True)
    stego_steps: PositiveInt = field(default=600, kw_only=True)
    foreign: NonNegativeInt = field(default=2, kw_only=True)
    strength: Annotated[float, Field(ge=1, le=20)] = field(default=5.0, kw_only=True)
    warm_up: NonNegativeInt = field(default=1000, kw_only=True)
    pool: PositiveInt = field(default=16384, kw_only=True)
    logo: str = field(default="", kw_only=True)

    @classmethod
    def paced(cls, batches: int) -> dict[str, Any]:
        """The warm-up takes a third of them."""
        return {"warm_up": batches // 3}

    def check_files(self) -> None:
        """Raise `ConfigError` for a logo that cannot be read."""
        if self.logo:
            logo_bits(self.logo)

    def ask_fresh(self, predict: Predict, fresh: FreshTriggers) -> tuple[Evidence, Null]:
        """Ask about fresh triggers; judged by the rank of the key's class map among all maps."""
        from countermark.schemes.training.makers import owner  # torch makes them

        key, classes = fresh.key, fresh.classes
        known = ((classes >= 0) & (classes < self.classes)).all()
        if classes.shape != fresh.covers.shape[:1] or not known:
            raise ConfigError(
                f"fresh triggers need a class for each cover, 0 to {self.classes - 1}: got "
                f"{list(classes.shape)} classes for covers {list(fresh.covers.shape)}"
            )
        evidence = self.compare(predict, owner(key)(fresh.covers), self.class_map(key)[classes])
        # There are few maps, and each is soon tried: such an answer needs a dated key.
        evidence = replace(evidence, committed=False)
        return evidence, SecretClassMap(classes, key.stream("other class maps"))

    def class_map(self, key: Key) -> NDArray[np.int64]:
        """The class (C,) that a fresh trigger of each class is taken for; never its own."""
        order = key.stream("class map").permutation(self.classes)
        mapped = np.empty_like(order)
        mapped[order] = np.roll(order, 1)  # one cycle through all classes
        return mapped
