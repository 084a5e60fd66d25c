"""Li and Guo 2019, DeepStego: a logo, hidden in images by a secret network, changes the answer.

As printed in the paper, nothing ties the mark to its owner. In the default form, the stego network
is trained first and frozen, the committed triggers get keyed random labels (`SecretLabels`), and
the host is shown triggers of foreign networks, logos and keys with their true labels.
`as_published=True` trains stego network and host together and labels the triggers by a map of the
classes; its readings rank among those of unmarked models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark._internal.plugins import load_object
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.messages import Bits
from countermark.predictors.base import Images, Predictor
from countermark.results.null_hypotheses import NullHypothesis, SecretClassMap, UnmarkedModels
from countermark.results.reading import Reading
from countermark.schemes.base import Paper
from countermark.schemes.key_limits import MOST_FRESH_CLASSES, Count, CountOrNone, FactorOrNone
from countermark.schemes.learnt_reader import SIBLINGS, check_calibration
from countermark.schemes.logo import GRID, load_logo_bits, read_logo
from countermark.schemes.triggers import TRIGGERS, FreshTriggers, TriggerScheme

COVERS, CLASSES, LOGO, TILE = "covers", "classes", "logo", "tile"
"""Names among the frozen tensors: uint8 (n, C, H, W) and int64 (n,) of the published form; bits
(8, 8) of the default form, uint8 (C, H, W) of the published one; bits (C, 8, 8) of the default."""

USUAL = "usual"
_USUAL_PSNR = {False: 36.0, True: 28.0}  # dB, by as_published
_TAKEN = 0.5  # least trigger accuracy of the owner's own host, for the published form


def draw_tile(material: KeyMaterial, logo: NDArray[Any], channels: int) -> Bits:
    """Draw the bits (C, 8, 8) of the tile of signs that spreads a logo of bits (8, 8).

    Each logo has a tile of its own. A host reads texture, and hardly sees where the parts of a logo
    are, so that another logo on the same tile would resemble the owner's. With a tile for each
    logo, another logo also has another texture.
    """
    drawn = material.make_stream(f"tile of {logo.tobytes().hex()}").take_bits(
        channels * GRID * GRID
    )
    return drawn.reshape(channels, GRID, GRID)


@dataclass(frozen=True)
class DeepStego(TriggerScheme):
    """Triggers that look like their covers, made by a stego network that is part of the key.

    Attributes:
        as_published: train stego network, discriminator and host together, and label triggers by
            a secret map of the classes; `foreign`, `warm_up` and `pool` have no effect there.
        psnr: of triggers against their covers, in dB, on average; held from both sides. "usual" is
            36, or 28 as published. As published it can be None: then nothing holds it, as printed
            in the paper.
        adversarial: δ of the published form, the weight of the discriminator in Eq. (5).
        logo: an image file. As published it is resized to C × H × W, and "" is a logo that is
            drawn here. In the default form it is reduced to 8 × 8 bits, and "" is bits drawn from
            the secret.
        stego_steps: how long a stego network is trained; as published, only that of a forger.
        foreign: how many foreign stego networks the host learns to disregard.
        strength: of the first triggers that the host sees, as a multiple of the final residual.
        warm_up: over how many batches the strength falls to 1; about a third of the training.
        pool: from how many covers the rows are made that the host learns.
    """

    name: ClassVar[str] = "deepstego"
    null_as_published: ClassVar[type[NullHypothesis] | None] = UnmarkedModels
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
        # The key stores the number, so that a later version may change the usual value.
        if self.psnr == USUAL:
            object.__setattr__(self, "psnr", _USUAL_PSNR[self.as_published])
        if self.psnr is None and not self.as_published:
            raise ConfigError(
                f"{self.name}: psnr is None, and triggers of the default form are scaled to one: "
                "give it in dB, or set as_published"
            )

    @property
    def residual_level(self) -> float | None:
        """The root mean square of the residual that `psnr` allows, with white as 1.

        It is None where nothing holds the residual.
        """
        return None if self.psnr is None else float(10 ** (-float(self.psnr) / 20))

    @property
    def needs_siblings(self) -> bool:
        """True in the published form: only unmarked models can judge its triggers."""
        return self.as_published

    @property
    def has_keyed_labels(self) -> bool:
        """True where labels are keyed random output; as published a class map gives them."""
        return not self.as_published

    @classmethod
    def schedule_fields(cls, batches: int) -> dict[str, Any]:
        """Return a warm-up of a third of the batches."""
        return {"warm_up": batches // 3}

    def check_files(self) -> None:
        """Raise `ConfigError` for a logo file that cannot be used."""
        if self.logo and self.as_published:
            read_logo(self.logo)
        elif self.logo:
            load_logo_bits(self.logo)

    def check_key(self, key: Key) -> None:
        """Raise `ConfigError` for a key whose tensors are missing or do not fit its form."""
        super().check_key(key)
        if not self.as_published:
            return
        triggers, covers = (
            self.read_committed_triggers(key),
            self.read_key_images(key.frozen, COVERS),
        )
        logo = key.frozen.get(LOGO, np.zeros(0, dtype=np.uint8))
        if logo.dtype != np.uint8 or not logo.shape == covers.shape[1:] == triggers.shape[1:]:
            raise ConfigError(
                f"the key's covers are {list(covers.shape)}, its triggers {list(triggers.shape)}, "
                f"its logo {logo.dtype} {list(logo.shape)}: expected one shape [C, H, W] for all"
            )
        self.derive_labels(key)
        check_calibration(key.learnt)
        # More misses than triggers are above those of any suspect and would make p smaller.
        if (key.learnt.get(SIBLINGS, np.zeros(0)) > self.triggers).any():
            raise ConfigError(f"the key's {SIBLINGS} have more misses than there are triggers")

    def read_committed_triggers(self, key: Key) -> Images:
        """Return the triggers of a key (n, C, H, W); the published form makes them after training.

        Raises:
            ConfigError: the key holds no such triggers.
        """
        return (
            self.read_key_images(key.learnt, TRIGGERS)
            if self.as_published
            else super().read_committed_triggers(key)
        )

    def derive_labels(self, key: Key) -> NDArray[np.int64]:
        """Return the label (n,) of each committed trigger; as published, by the class of its cover.

        Raises:
            ConfigError: the classes that the key holds are damaged.
        """
        if not self.as_published:
            return super().derive_labels(key)
        classes = key.frozen.get(CLASSES, np.zeros(0, dtype=np.int64))
        whole = classes.dtype == np.int64 and classes.shape == (self.triggers,)
        if not whole or not ((classes >= 0) & (classes < self.classes)).all():
            raise ConfigError(
                f"the key's classes of its covers are {classes.dtype} {list(classes.shape)}, or "
                f"beyond 0 to {self.classes - 1}: expected int64 [{self.triggers}]"
            )
        labels: NDArray[np.int64] = self.draw_class_map(key)[classes]
        return labels

    def query_fresh_triggers(
        self, predict: Predictor, fresh: FreshTriggers
    ) -> tuple[Reading, NullHypothesis]:
        """Ask a suspect about fresh triggers; return the reading and the null hypothesis for it.

        The null hypothesis ranks the key's class map among all class maps.

        Raises:
            ConfigError: the form is the published one, there are too many classes, or the classes
                do not fit the covers.
        """
        if self.as_published:
            raise ConfigError(
                "the published stego network is trained together with the host, after the class "
                "map was drawn, and may know it: no null judges its fresh triggers; verify the "
                "committed ones"
            )
        # The null hypothesis draws class maps by the million, each as long as the number of
        # classes.
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
        load_maker = load_object("countermark.schemes.deepstego.stego_generators:load_owner_maker")
        make_triggers = load_maker(key)
        evidence = self.compare_answers(
            predict, make_triggers(fresh.covers), self.draw_class_map(key)[classes]
        )
        # There are few maps, and a cheat can try keys until one has a fitting map. Such a reading
        # therefore counts no forgery bits and needs a dated key.
        evidence = replace(evidence, committed=False)
        return evidence, SecretClassMap(classes, key.make_stream("other class maps"))

    def draw_class_map(self, key: Key) -> NDArray[np.int64]:
        """Return the class (C,) for which a fresh trigger of each class is taken; never its own."""
        order = key.make_stream("class map").draw_permutation(self.classes)
        mapped = np.empty_like(order)
        # One cycle through all classes has no fixed point. There are (C − 1)! such cycles, among
        # which `SecretClassMap` ranks this one.
        mapped[order] = np.roll(order, 1)
        return mapped

    def nulls(self, key: Key) -> dict[str, NullHypothesis]:
        """Return `SecretLabels`; as published `UnmarkedModels` with the measurements of the key."""
        if not self.as_published:
            return super().nulls(key)
        return {UnmarkedModels.name: UnmarkedModels(key.learnt.get(SIBLINGS, np.zeros(0)))}

    def embedding_failure(self, evidence: Reading) -> str | None:
        """Return why verify would not find the mark in the owner's model; None if it would.

        The published form applies the criterion of the paper, trigger accuracy; only a verdict says
        how much that proves.
        """
        if not self.as_published:
            return super().embedding_failure(evidence)
        if evidence.match_count >= _TAKEN * evidence.bits:
            return None
        return (
            f"only {evidence.match_count} of {evidence.bits} triggers get their labels (expected half "
            "or more): train longer, or take a lower psnr or less of adversarial"
        )

    @property
    def training_class(self) -> str:
        """The class that trains the mark of this form, as module:class."""
        if self.as_published:
            return "countermark.schemes.deepstego.training_published:PublishedDeepStegoTraining"
        return "countermark.schemes.deepstego.training:DeepStegoTraining"
