"""The supervised attack: attackers embed into covers of their own and train on both kinds."""

from __future__ import annotations

from countermark_lab.steganalysis.ats import DEFAULT
from countermark_lab.steganalysis.detector import Detector, TrainedDetector, require_sklearn
from countermark_lab.steganalysis.images import (
    Embed,
    Images,
    check_images,
    derive_seeds,
    embed_images,
    make_half_stego,
)
from countermark_lab.steganalysis.rates import DetectionRates, compute_rates


def train_detector(
    covers: Images, embed: Embed, *, seed: int, detector: Detector = DEFAULT
) -> TrainedDetector:
    """Train a detector on covers and on a stego image of each.

    Args:
        covers: uint8 (n, C, H, W).
        embed: the embedder that the attacker assumes; `embed(images, seed)`.
        seed: seed of the embedding.
        detector: features and classifier.

    Raises:
        ConfigError: covers, the embedder's output or the seed are invalid.
        MissingExtraError: scikit-learn is not installed.
    """
    require_sklearn()
    # Another seed than for the test images: shared pixel positions would help the detector
    # unfairly.
    (inner,) = derive_seeds(seed, "train", 1)
    return detector.fit(covers, embed_images(embed, check_images(covers), inner))


def measure_supervised(
    training: Images,
    held_out: Images,
    *,
    embed: Embed,
    seed: int,
    guess: Embed | None = None,
    detector: Detector = DEFAULT,
) -> DetectionRates:
    """Measure how well a trained detector finds the stego images among held-out images.

    Args:
        training: the attacker's covers, uint8 (n, C, H, W).
        held_out: other covers of that size; a random half of them is made stego images.
        embed: makes these stego images.
        seed: seed of the half and of all embeddings.
        guess: the attacker's embedder; None for `embed` itself. For a stego network, `embed` stands
            for an attacker who knows the weights, a network of other weights for one who does not.
        detector: features and classifier.

    Raises:
        ConfigError, MissingExtraError: as `make_half_stego` and `train_detector`.
    """
    guessed = embed if guess is None else guess
    trained = train_detector(training, guessed, seed=seed, detector=detector)
    # Half stego, so that the chance level of the detection rate is 0.5.
    mixed = make_half_stego(held_out, embed, seed=seed)
    return compute_rates(trained.detect(mixed.images), mixed.stego)
