"""ATS: find stego images among suspects with no training set but the suspects themselves.

D. Lerch-Hostalot, D. Megías, "Unsupervised steganalysis based on artificial training sets",
Engineering Applications of Artificial Intelligence 50, 2016 (arXiv:1703.00796).

A are the suspects, covers and stego images. B = embed(A) are stego and twice embedded, C = embed(B)
twice and three times. What tells A from C therefore has B on its border: B_i lies on C's side if
A_i was stego already, and on A's side if it was a cover.
"""

from __future__ import annotations

from countermark.errors import ConfigError
from countermark.steganalysis.detector import Detector, require_extra
from countermark.steganalysis.images import Embed, Images, checked, derived, embedded, half_stego
from countermark.steganalysis.rates import Detected, Rates, rates

DEFAULT = Detector()


def ats(images: Images, embed: Embed, *, seed: int, detector: Detector = DEFAULT) -> Detected:
    """Which of the suspects are stego images.

    It needs both kinds: among covers alone, or stego images alone, the border falls somewhere.
    Differs from the authors' code: C and kernel width of the SVM are fixed, not searched, and the
    features are SPAM's 686, not those of rich models.

    Args:
        images: the suspects, uint8 (n, C, H, W).
        embed: what the attacker believes they were made with; `embed(images, seed)`.
        seed: of both embeddings; the same suspects, embedder and seed give the same answer.
        detector: features and classifier.

    Raises:
        ConfigError: images, the embedder's answer or the seed are not as they have to be, or the
            embedder changes nothing.
        MissingExtraError: scikit-learn is not installed.
    """
    require_extra()
    first, second = derived(seed, "ats", 2)
    once = embedded(embed, checked(images), first)  # B
    twice = embedded(embed, once, second)  # C
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
) -> Rates:
    """How well ATS finds the stego images when half of the covers, drawn by the seed, are such.

    Args:
        covers: uint8 (n, C, H, W), n even.
        embed: makes the stego images.
        seed: of all that is drawn.
        guess: what the attacker embeds with; `embed` itself where nothing is said, which is the
            strongest attacker. For a stego network: one of other weights.
        detector: features and classifier.

    Raises:
        ConfigError, MissingExtraError: as `half_stego` and `ats`.
    """
    require_extra()
    mixed = half_stego(covers, embed, seed=seed)
    guessed = embed if guess is None else guess
    return rates(ats(mixed.images, guessed, seed=seed, detector=detector), mixed.stego)
