"""Li and Guo 2019, DeepStego: a logo, hidden in images by a secret network, changes the answer.

As printed, nothing ties the mark to its owner. In the default form the stego network is trained
first and frozen, the committed triggers get keyed random labels (`SecretLabels`), and the host is
shown the triggers of foreign networks, logos and keys under their true labels. `as_published=True`
trains network and host together and labels by a map of the classes; it ranks among unmarked models.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark.answers import Images, Predict
from countermark.errors import ConfigError
from countermark.evidence import Evidence
from countermark.key import Key, KeyMaterial
from countermark.message import Bits
from countermark.nulls import Null, SecretClassMap, UnmarkedModels
from countermark.schemes.base import Paper
from countermark.schemes.black_box import TRIGGERS, FreshTriggers, TriggerScheme
from countermark.schemes.bounds import MOST_FRESH_CLASSES, Count, CountOrNone, FactorOrNone
from countermark.schemes.logo import GRID, logo_bits, read_logo
from countermark.schemes.reader import SIBLINGS, check_measured

COVERS, CLASSES, LOGO, TILE = "covers", "classes", "logo", "tile"
"""Names among the frozen tensors: uint8 (n, C, H, W) and int64 (n,) of the published form; bits
(8, 8) of the default form, uint8 (C, H, W) of the published one; bits (C, 8, 8) of the default."""

USUAL = "usual"
_USUAL_PSNR = {False: 36.0, True: 28.0}  # dB, by as_published
_TAKEN = 0.5  # trigger accuracy below which a published mark is not in its own host


def tile_of(material: KeyMaterial, logo: NDArray[Any], channels: int) -> Bits:
    """The bits (C, 8, 8) of the tile of signs that spreads a logo of bits (8, 8).

    Each logo has its own: a host reads texture, and hardly where a logo's parts are, so another
    logo on the same tile resembles the owner's. Whoever takes another logo has another tile.
    """
    drawn = material.stream(f"tile of {logo.tobytes().hex()}").bits(channels * GRID * GRID)
    return drawn.reshape(channels, GRID, GRID)


@dataclass(frozen=True)
class DeepStego(TriggerScheme):
    """Triggers that look like their covers, made by a stego network that is part of the key.

    Attributes:
        as_published: train stego network, discriminator and host together, and label triggers by
            a secret map of the classes; `foreign`, `warm_up` and `pool` mean nothing there.
        psnr: of triggers against their covers, in dB, on average; held from both sides. "usual" is
            36, as published 28. As published it can be None: nothing holds it, as printed.
        adversarial: δ of the published form, the weight of the discriminator in Eq. (5).
        logo: a picture file; as published resized to C × H × W, "" for one that is drawn here;
            else reduced to 8 × 8 bits, "" for bits drawn from the secret.
        stego_steps: how long a stego network is trained; as published, a forger's own.
        foreign: how many foreign stego networks the host learns to disregard.
        strength: of the first triggers that the host sees, as a multiple of the final residual.
        warm_up: for how many batches the strength goes down to 1; about a third of the training.
        pool: of how many covers the rows are made that the host learns.
    """

    name: ClassVar[str] = "deepstego"
    null_as_published: ClassVar[type[Null] | None] = UnmarkedModels
    paper: ClassVar[Paper] = Paper(
        authors="Z. Li, S. Guo",
        title="DeepStego: Protecting Intellectual Property of Deep Neural Networks by "
        "Steganography",
        venue="manuscript",
        year=2019,
        doi="",
    )

    triggers: Annotated[int, Field(ge=1, le=1 << 16)] = field(default=100)
    as_published: bool = field(default=False, kw_only=True)
    psnr: Annotated[float, Field(gt=20, lt=60)] | Literal["usual"] | None = field(
        default="usual", kw_only=True
    )
    adversarial: FactorOrNone = field(default=1.0, kw_only=True)
    logo: str = field(default="", kw_only=True)
    stego_steps: Count = field(default=600, kw_only=True)
    foreign: CountOrNone = field(default=2, kw_only=True)
    strength: Annotated[float, Field(ge=1, le=20)] = field(default=10.0, kw_only=True)
    warm_up: CountOrNone = field(default=1000, kw_only=True)
    pool: Count = field(default=16384, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.psnr == USUAL:  # a key says what it was made with
            object.__setattr__(self, "psnr", _USUAL_PSNR[self.as_published])
        if self.psnr is None and not self.as_published:
            raise ConfigError(
                f"{self.name}: psnr is None, and triggers of the default form are scaled to one: "
                "give it in dB, or set as_published"
            )

    @property
    def level(self) -> float | None:
        """The root mean square at which triggers are held apart from their covers, white being 1.

        None where nothing holds them.
        """
        return None if self.psnr is None else float(10 ** (-float(self.psnr) / 20))

    @property
    def needs_siblings(self) -> bool:
        """Whether unmarked models are all that says what its triggers are worth."""
        return self.as_published

    @property
    def keyed_labels(self) -> bool:
        """Whether labels are keyed random output; those of the published form map the classes."""
        return not self.as_published

    @classmethod
    def paced(cls, batches: int) -> dict[str, Any]:
        """The warm-up takes a third of them."""
        return {"warm_up": batches // 3}

    def check_files(self) -> None:
        """Raise `ConfigError` for a logo that cannot be used."""
        if self.logo and self.as_published:
            read_logo(self.logo)
        elif self.logo:
            logo_bits(self.logo)

    def check_key(self, key: Key) -> None:
        """Raise `ConfigError` for a key that lacks, or misstates, what its form has."""
        super().check_key(key)
        if not self.as_published:
            return
        triggers, covers = self.committed(key), self.images_in(key.frozen, COVERS)
        logo = key.frozen.get(LOGO, np.zeros(0, dtype=np.uint8))
        if logo.dtype != np.uint8 or not logo.shape == covers.shape[1:] == triggers.shape[1:]:
            raise ConfigError(
                f"the key's covers are {list(covers.shape)}, its triggers {list(triggers.shape)}, "
                f"its logo {logo.dtype} {list(logo.shape)}: expected one shape [C, H, W] for all"
            )
        self.labels(key)
        check_measured(key.learnt)
        if (key.learnt.get(SIBLINGS, np.zeros(0)) > self.triggers).any():
            raise ConfigError(f"the key's {SIBLINGS} have more misses than there are triggers")

    def committed(self, key: Key) -> Images:
        """The key's triggers (n, C, H, W); those of the published form are made after training.

        Raises:
            ConfigError: the key holds no such triggers.
        """
        return self.images_in(key.learnt, TRIGGERS) if self.as_published else super().committed(key)

    def labels(self, key: Key) -> NDArray[np.int64]:
        """The label (n,) of each committed trigger; as published, by the class of its cover.

        Raises:
            ConfigError: the key's classes are damaged.
        """
        if not self.as_published:
            return super().labels(key)
        classes = key.frozen.get(CLASSES, np.zeros(0, dtype=np.int64))
        whole = classes.dtype == np.int64 and classes.shape == (self.triggers,)
        if not whole or not ((classes >= 0) & (classes < self.classes)).all():
            raise ConfigError(
                f"the key's classes of its covers are {classes.dtype} {list(classes.shape)}, or "
                f"beyond 0 to {self.classes - 1}: expected int64 [{self.triggers}]"
            )
        labels: NDArray[np.int64] = self.class_map(key)[classes]
        return labels

    def ask_fresh(self, predict: Predict, fresh: FreshTriggers) -> tuple[Evidence, Null]:
        """Ask about fresh triggers; judged by the rank of the key's class map among all maps."""
        from countermark.schemes.training.makers import owner  # torch makes them

        if self.as_published:
            raise ConfigError(
                "the published stego network is trained together with the host, after the class "
                "map was drawn, and may know it: no null judges its fresh triggers; verify the "
                "committed ones"
            )
        if self.classes > MOST_FRESH_CLASSES:
            raise ConfigError(
                f"{self.name}: field classes is {self.classes}: fresh triggers are judged for 2 to "
                f"{MOST_FRESH_CLASSES:,}; verify the committed ones"
            )
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

    def nulls(self, key: Key) -> dict[str, Null]:
        """`SecretLabels`; as published `UnmarkedModels`, of as many as the key was measured on."""
        if not self.as_published:
            return super().nulls(key)
        return {UnmarkedModels.name: UnmarkedModels(key.learnt.get(SIBLINGS, np.zeros(0)))}

    def not_taken(self, evidence: Evidence) -> str | None:
        """Why a mark would not be found in the owner's own model; None when it would.

        As published by trigger accuracy, the paper's criterion: what it proves, a verdict says.
        """
        if not self.as_published:
            return super().not_taken(evidence)
        if evidence.matched >= _TAKEN * evidence.bits:
            return None
        return (
            f"only {evidence.matched} of {evidence.bits} triggers get their labels (expected half "
            "or more): train longer, or take a lower psnr or less of adversarial"
        )

    def half(self) -> Any:
        """The training half of this form, loaded with torch when somebody trains."""
        if not self.as_published:
            return super().half()
        return importlib.import_module("countermark.schemes.training.deepstego_published").TRAINING
