"""ATS and the trained detector: what they find, what they cannot, figures, refusals."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import countermark.training.data
from countermark.errors import ConfigError, MissingExtraError
from countermark.results.statistics import compute_clopper_pearson
from countermark_lab.steganalysis.ats import measure_ats, run_ats
from countermark_lab.steganalysis.detector import Detector
from countermark_lab.steganalysis.embedders import LsbMatching, UniformNoise
from countermark_lab.steganalysis.images import Embed, Images, make_half_stego
from countermark_lab.steganalysis.rates import DetectionResult, Rate, compute_rates
from countermark_lab.steganalysis.supervised import measure_supervised, train_detector

FAINT = LsbMatching(0.001)  # one pixel of a 32×32 image, every other image


def natural(count: int, seed: int = 0, channels: int = 1) -> Images:
    """Clouds of three sizes and a camera's noise, uint8 (count, channels, 32, 32)."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0.5, 2, (count, 1, 1, 1))
    images = 128 + rng.normal(size=(count, channels, 32, 32)) * noise
    for size in (16, 8, 4):
        knots = rng.normal(size=(count, channels, 32 // size + 2, 32 // size + 2)) * size
        first, part = np.divmod(np.arange(32), size)
        rows = knots[:, :, first] * (1 - part / size)[:, None]
        rows += knots[:, :, first + 1] * (part / size)[:, None]  # (count, channels, 32, knots)
        images += rows[..., first] * (1 - part / size) + rows[..., first + 1] * (part / size)
    return np.clip(images, 0, 255).round().astype(np.uint8)


def digits(first: int, last: int) -> Images:
    path = Path(countermark.training.data.__file__).parent / "digits" / "digits.npz"
    with np.load(path) as arrays:
        found: Images = arrays["train_images"][first:last]
    return found


class Recorder:
    """An embedder that remembers what it was asked for."""

    def __init__(self, inner: Embed) -> None:
        self.inner, self.asked = inner, list[tuple[Images, int]]()

    def __call__(self, images: Images, seed: int) -> Images:
        self.asked.append((images, seed))
        return self.inner(images, seed)


# --- what is found


@pytest.mark.parametrize("covers", [natural(200), natural(200, channels=3), digits(0, 200)])
def test_ats_finds_strong_noise(covers: Images) -> None:
    found = measure_ats(covers, UniformNoise(4), seed=0)
    assert found.detection.value > 0.9
    assert found.true_positives.value > 0.9
    assert found.false_positives.value < 0.1


def test_ats_finds_lsb_matching_on_digits() -> None:
    assert measure_ats(digits(0, 200), LsbMatching(0.4), seed=3).detection.value > 0.9


@pytest.mark.parametrize("covers", [natural(200), digits(0, 200)])
def test_a_trained_detector_finds_noise_in_images_it_has_not_seen(covers: Images) -> None:
    training, held_out = covers[:100], covers[100:]
    found = measure_supervised(training, held_out, embed=UniformNoise(4), seed=0)
    assert found.detection.value > 0.9
    assert found.images == 100


def test_weights_known_see_more_than_weights_unknown() -> None:
    covers = natural(400)
    known = measure_supervised(covers[:200], covers[200:], embed=UniformNoise(4), seed=0)
    unknown = measure_supervised(
        covers[:200], covers[200:], embed=UniformNoise(4), guess=UniformNoise(1), seed=0
    )
    assert known.detection.value > unknown.detection.value + 0.1


# --- what is not


def at_chance(hits: int, of: int) -> bool:
    """At most five deviations off a half: a fair coin is once in two million times."""
    return abs(hits - of / 2) <= 5 * math.sqrt(of) / 2


@pytest.mark.parametrize("seed", [0, 1])
def test_what_cannot_be_seen_is_not_found(seed: int) -> None:
    found = measure_ats(natural(400, seed), FAINT, seed=seed)
    assert at_chance(found.detection.hits, found.detection.of)


def test_labels_that_mean_nothing_are_met_by_chance() -> None:
    covers, rng = natural(400), np.random.default_rng(2)
    stego = np.repeat([True, False], 200)
    rng.shuffle(stego)
    found = compute_rates(run_ats(covers, FAINT, seed=0), stego)
    assert at_chance(found.detection.hits, 400)


def test_covers_alone_are_called_stego() -> None:
    """The limit that the docstring names: without stego images the border lies before B."""
    covers = natural(200)
    assert run_ats(covers, UniformNoise(4), seed=0).stego.mean() > 0.9


# --- how it is done


def test_ats_embeds_twice_with_seeds_of_its_own() -> None:
    covers, embed = natural(20), Recorder(UniformNoise(4))
    run_ats(covers, embed, seed=7)
    (suspects, first), (once, second) = embed.asked
    np.testing.assert_array_equal(suspects, covers)
    np.testing.assert_array_equal(once, UniformNoise(4)(covers, first))
    assert len({first, second, 7}) == 3


def test_the_attacker_embeds_with_what_he_guesses() -> None:
    covers = natural(20)
    for measure in (
        lambda own, guess: measure_ats(covers, own, seed=0, guess=guess),
        lambda own, guess: measure_supervised(covers, covers, embed=own, seed=0, guess=guess),
    ):
        own, guess = Recorder(UniformNoise(4)), Recorder(UniformNoise(2))
        measure(own, guess)
        assert [len(images) for images, _ in own.asked] == [10]
        assert {len(images) for images, _ in guess.asked} == {20}


def test_a_seed_gives_the_same_answer() -> None:
    mixed = make_half_stego(natural(60), LsbMatching(1.0), seed=0)
    first = run_ats(mixed.images, LsbMatching(1.0), seed=1)
    np.testing.assert_array_equal(
        run_ats(mixed.images, LsbMatching(1.0), seed=1).stego, first.stego
    )
    assert (run_ats(mixed.images, LsbMatching(1.0), seed=2).stego != first.stego).any()


def test_the_order_of_suspects_does_not_matter_to_a_trained_detector() -> None:
    covers = natural(60)
    trained = train_detector(covers[:30], UniformNoise(4), seed=0)
    there, back = trained.detect(covers[30:]), trained.detect(covers[:29:-1])
    np.testing.assert_array_equal(there.stego, back.stego[::-1])


def test_a_detector_says_how_it_looked() -> None:
    covers = natural(20, channels=3)
    plain = run_ats(covers, UniformNoise(4), seed=0)
    assert (plain.features, plain.selected, plain.image_size) == (686, 500, (3, 32, 32))
    assert (plain.stego.dtype, plain.stego.shape) == (np.dtype(np.bool_), (20,))
    wide = Detector("transition", "concatenation", select=40)
    asked = run_ats(covers, UniformNoise(4), seed=0, detector=wide)
    assert (asked.features, asked.selected) == (3 * 686, 40)


def test_fewer_features_than_asked_for_are_all_taken() -> None:
    flat = np.full((12, 1, 8, 8), 100, dtype=np.uint8)
    found = run_ats(flat, UniformNoise(1), seed=0)
    assert 1 < found.selected < 500


# --- figures


def test_rates_count_hits_and_false_alarms() -> None:
    stego = np.array([True] * 4 + [False] * 4)
    called = np.array([True] * 3 + [False] + [True] + [False] * 3)
    found = compute_rates(DetectionResult(called, 686, 500, (3, 32, 32)), stego)
    assert (found.detection, found.true_positives) == (Rate(6, 8), Rate(3, 4))
    assert (found.false_positives, found.images) == (Rate(1, 4), 8)
    assert found.detection.value == 0.75
    assert found.detection.confidence_interval == compute_clopper_pearson(6, 8, 0.95)
    assert str(found) == (
        "detection 0.750 [0.349, 0.968], true positives 0.750 [0.194, 0.994], false positives "
        "0.250 [0.006, 0.806] (95 %; N = 8, 500 of 686 features, images 3×32×32)"
    )


@pytest.mark.parametrize("stego", [[True] * 4, [True, False], [True, False, False, False]])
def test_rates_need_halves(stego: list[bool]) -> None:
    detected = DetectionResult(np.zeros(4, dtype=np.bool_), 686, 500, (1, 32, 32))
    with pytest.raises(ConfigError, match="one flag for each of 4 images, half of them True"):
        compute_rates(detected, np.array(stego))


# --- refusals


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: run_ats(natural(4), lambda x, _: x, seed=0), "the embedder changes nothing"),
        (lambda: run_ats(natural(1), UniformNoise(), seed=0), "two images or more of each kind"),
        (lambda: run_ats(natural(4)[0], UniformNoise(), seed=0), "got uint8 (1, 32, 32)"),
        (lambda: run_ats(natural(4), UniformNoise(), seed=-1), "a seed is 0 or more, got -1"),
        (lambda: run_ats(natural(4), lambda x, _: x[:2], seed=0), "keeps the shape of the images"),
        (lambda: measure_ats(natural(3), FAINT, seed=0), "expected an even number, got 3"),
        (lambda: Detector(select=0), "selects 1 feature or more"),
        (lambda: Detector(penalty=math.nan), "penalty above 0"),
        (
            lambda: train_detector(natural(4), UniformNoise(), seed=0).detect(digits(0, 2)),
            "trained on images (1, 32, 32), got (1, 28, 28)",
        ),
        (
            lambda: run_ats(np.full((4, 1, 8, 8), 9, dtype=np.uint8), lambda x, _: x + 1, seed=0),
            "the same features: nothing tells them apart",
        ),
    ],
)
def test_what_cannot_be_examined_is_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_extra_is_named_before_anything_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    embed = Recorder(UniformNoise(4))
    for act in (run_ats, measure_ats, train_detector):
        with pytest.raises(MissingExtraError, match=r"needs .*'countermark\[stego\]'"):
            act(natural(4), embed, seed=0)
    assert not embed.asked
