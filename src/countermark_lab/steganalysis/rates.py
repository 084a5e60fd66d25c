"""Success rates of a detector, with the figures that each rate must be read with."""

from __future__ import annotations

from dataclasses import dataclass

from countermark.errors import ConfigError
from countermark.results.statistics import compute_clopper_pearson
from countermark_lab.steganalysis.images import Flags

# `Rates.__str__` prints "95 %" as text: change both together.
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class DetectionResult:
    """The output of a detector, with the size of its features.

    Attributes:
        stego: (n,) true for each image that is called stego.
        features: number of features of an image.
        selected: number of features that the classifier reads.
        image_size: (C, H, W) of an image.
    """

    stego: Flags
    features: int
    selected: int
    image_size: tuple[int, int, int]


@dataclass(frozen=True)
class Rate:
    """A rate of `hits` among `of` images."""

    hits: int
    of: int

    @property
    def value(self) -> float:
        """The share of hits, 0 to 1."""
        return self.hits / self.of

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """The 95 % interval of Clopper and Pearson.

        It covers the choice of test images for this trained detector, not the choice of training
        images.
        """
        return compute_clopper_pearson(self.hits, self.of, CONFIDENCE)

    def __str__(self) -> str:
        low, high = self.confidence_interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class DetectionRates:
    """A detector's figures on a set of which half are stego images; chance level is 0.5.

    Attributes:
        detection: images that were classified correctly: the detection rate, or accuracy.
        true_positives: stego images that were called stego.
        false_positives: covers that were called stego.
        images: N, the number of images.
        features: number of features of an image.
        selected: number of features that the classifier read.
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


def compute_rates(detected: DetectionResult, stego: Flags) -> DetectionRates:
    """Compute the figures of a detector on images whose kinds are known.

    Args:
        detected: the detector's output.
        stego: (n,) true for stego images; half of the values are true.

    Raises:
        ConfigError: the two differ in length, or not half of the images are stego: only then the
            chance level of the detection rate is 0.5.
    """
    called, count = detected.stego, len(detected.stego)
    # A set of another composition would make 0.5 look like success or failure.
    if stego.shape != called.shape or 2 * int(stego.sum()) != count:
        raise ConfigError(
            f"expected one flag for each of {count} images, half of them True, got "
            f"{int(stego.sum())} of {stego.shape}: half_stego makes such a set"
        )
    # Each rate has its own denominator: all images, the stego images, the covers.
    half = count // 2
    return DetectionRates(
        detection=Rate(int((called == stego).sum()), count),
        true_positives=Rate(int(called[stego].sum()), half),
        false_positives=Rate(int(called[~stego].sum()), half),
        images=count,
        features=detected.features,
        selected=detected.selected,
        image_size=detected.image_size,
    )
