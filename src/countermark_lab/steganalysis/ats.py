"""ATS: find stego images among suspects with no training set but the suspects themselves.

D. Lerch-Hostalot, D. Megías, "Unsupervised steganalysis based on artificial training sets",
Engineering Applications of Artificial Intelligence 50, 2016 (arXiv:1703.00796).

Set A holds the suspects, covers and stego images. B = embed(A) holds images embedded once or twice,
C = embed(B) images embedded twice or three times. For a classifier of A against C, the images of B
lie at the border: B_i lies on C's side if A_i was a stego image already, and on A's side if A_i was
a cover.
"""

from __future__ import annotations

from countermark.errors import ConfigError
from countermark_lab.steganalysis.detector import Detector, require_sklearn
from countermark_lab.steganalysis.images import (
    Embed,
    Images,
    check_images,
    derive_seeds,
    embed_images,
    make_half_stego,
)
from countermark_lab.steganalysis.rates import DetectionRates, DetectionResult, compute_rates

DEFAULT = Detector()


def run_ats(
    images: Images, embed: Embed, *, seed: int, detector: Detector = DEFAULT
) -> DetectionResult:
    """Find the stego images among the suspects.

    The method needs both kinds: among covers only, or stego images only, the border falls anywhere.
    It differs from the authors' code: C and kernel width of the SVM are fixed, not searched, and
    the features are SPAM's 686, not those of rich models.

    Args:
        images: the suspects, uint8 (n, C, H, W).
        embed: the embedder that the attacker assumes; `embed(images, seed)`.
        seed: seed of both embeddings; equal suspects, embedder and seed give the same answer.
        detector: features and classifier.

    Raises:
        ConfigError: images, the embedder's output or the seed are invalid, or the embedder changes
            nothing.
        MissingExtraError: scikit-learn is not installed.
    """
    require_sklearn()
    # Two seeds: with equal seeds, both embeddings would use the same pixels.
    first, second = derive_seeds(seed, "ats", 2)
    once = embed_images(embed, check_images(images), first)  # B
    twice = embed_images(embed, once, second)  # C
    # Without this check the detector would train on two equal sets.
    if (twice == images).all():
        raise ConfigError("the embedder changes nothing: there is nothing to tell apart")
    return detector.fit(images, twice).detect(once)


def measure_ats(
    covers: Images,
    embed: Embed,
    *,
    seed: int,
    guess: Embed | None = None,
    detector: Detector = DEFAULT,
) -> DetectionRates:
    """Measure how well ATS finds stego images when a random half of the covers become stego images.

    Args:
        covers: uint8 (n, C, H, W), n even.
        embed: makes the stego images.
        seed: seed of the half and of all embeddings.
        guess: the attacker's embedder; None for `embed` itself, the strongest attacker. For a stego
            network, pass a network of other weights.
        detector: features and classifier.

    Raises:
        ConfigError, MissingExtraError: as `make_half_stego` and `run_ats`.
    """
    require_sklearn()
    mixed = make_half_stego(covers, embed, seed=seed)
    guessed = embed if guess is None else guess
    return compute_rates(run_ats(mixed.images, guessed, seed=seed, detector=detector), mixed.stego)
