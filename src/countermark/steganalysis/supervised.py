"""The attacker who has covers of his own: he embeds into them, and trains on what he knows."""

from __future__ import annotations

from countermark.steganalysis.ats import DEFAULT
from countermark.steganalysis.detector import Detector, Trained, require_extra
from countermark.steganalysis.images import Embed, Images, checked, derived, embedded, half_stego
from countermark.steganalysis.rates import Rates, rates


def train(covers: Images, embed: Embed, *, seed: int, detector: Detector = DEFAULT) -> Trained:
    """A detector trained on covers and the stego image of each.

    Args:
        covers: uint8 (n, C, H, W).
        embed: what the attacker believes suspects are made with; `embed(images, seed)`.
        seed: of the embedding.
        detector: features and classifier.

    Raises:
        ConfigError: covers, the embedder's answer or the seed are not as they have to be.
        MissingExtraError: scikit-learn is not installed.
    """
    require_extra()
    (inner,) = derived(seed, "train", 1)
    return detector.fit(covers, embedded(embed, checked(covers), inner))


def measure_supervised(
    training: Images,
    held_out: Images,
    *,
    embed: Embed,
    seed: int,
    guess: Embed | None = None,
    detector: Detector = DEFAULT,
) -> Rates:
    """How well a trained detector finds the stego images among held-out ones.

    Args:
        training: the attacker's covers, uint8 (n, C, H, W).
        held_out: other covers of that size; half of them, drawn by the seed, are made stego images.
        embed: makes these stego images.
        seed: of all that is drawn.
        guess: what the attacker embeds with; `embed` itself where nothing is said. For a stego
            network, `embed` is the case of weights known, a network of other weights that of
            weights unknown.
        detector: features and classifier.

    Raises:
        ConfigError, MissingExtraError: as `half_stego` and `train`.
    """
    guessed = embed if guess is None else guess
    trained = train(training, guessed, seed=seed, detector=detector)
    mixed = half_stego(held_out, embed, seed=seed)
    return rates(trained.detect(mixed.images), mixed.stego)
