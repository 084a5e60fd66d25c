"""How often a detector was right, with what each figure has to stand beside."""

from __future__ import annotations

from dataclasses import dataclass

from countermark.errors import ConfigError
from countermark.stats import clopper_pearson
from countermark.steganalysis.images import Flags

CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Detected:
    """What a detector called stego: `stego` (n,), and how it looked.

    Attributes:
        stego: True for each image that is called stego.
        features: how many numbers describe an image.
        selected: how many of them the classifier reads.
        image_size: (C, H, W) of an image.
    """

    stego: Flags
    features: int
    selected: int
    image_size: tuple[int, int, int]


@dataclass(frozen=True)
class Rate:
    """`hits` of `of` images."""

    hits: int
    of: int

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.hits / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's interval of 95 %.

        It speaks of other images before this trained detector; what training on other images
        would change is not in it.
        """
        return clopper_pearson(self.hits, self.of, CONFIDENCE)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Rates:
    """A detector's figures on a set of which half are stego images; chance is 0.5.

    Attributes:
        detection: images that were called what they are: the detection rate, or accuracy.
        true_positives: stego images that were called stego.
        false_positives: covers that were called stego.
        images: how many there were, N.
        features: how many numbers describe an image.
        selected: how many of them the classifier read.
        image_size: (C, H, W) of an image.
    """

    detection: Rate
    true_positives: Rate
    false_positives: Rate
    images: int
    features: int
    selected: int
    image_size: tuple[int, int, int]

    def __str__(self) -> str:
        size = "×".join(map(str, self.image_size))
        return (
            f"detection {self.detection}, true positives {self.true_positives}, "
            f"false positives {self.false_positives} (95 %; N = {self.images}, "
            f"{self.selected} of {self.features} features, images {size})"
        )


def rates(detected: Detected, stego: Flags) -> Rates:
    """The figures of a detector whose images are known.

    Args:
        detected: what it called stego.
        stego: what is (n,), half of it True.

    Raises:
        ConfigError: the two differ in length, or not half of the images are stego: a detection
            rate has its chance level at 0.5 only then.
    """
    called, count = detected.stego, len(detected.stego)
    if stego.shape != called.shape or 2 * int(stego.sum()) != count:
        raise ConfigError(
            f"expected one flag for each of {count} images, half of them True, got "
            f"{int(stego.sum())} of {stego.shape}: half_stego makes such a set"
        )
    half = count // 2
    return Rates(
        detection=Rate(int((called == stego).sum()), count),
        true_positives=Rate(int(called[stego].sum()), half),
        false_positives=Rate(int(called[~stego].sum()), half),
        images=count,
        features=detected.features,
        selected=detected.selected,
        image_size=detected.image_size,
    )
