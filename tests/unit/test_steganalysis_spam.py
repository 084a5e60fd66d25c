"""SPAM features: the paper's equations by nested loops, known pictures, symmetries, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from countermark.errors import ConfigError
from countermark_lab.steganalysis import spam as module
from countermark_lab.steganalysis.spam import FEATURES, Form, compute_spam_features

RANGE = range(-3, 4)
STRAIGHT = [(0, 1), (0, -1), (1, 0), (-1, 0)]
DIAGONAL = [(1, 1), (-1, -1), (1, -1), (-1, 1)]
FORMS: list[Form] = ["transition", "cooccurrence"]


def pictures(count: int = 3, channels: int = 1, sides: tuple[int, int] = (7, 9)) -> Any:
    """Pictures whose differences lie within ±3 and beyond, uint8 (count, channels, *sides)."""
    rng = np.random.default_rng(3)
    walk = np.cumsum(rng.integers(-2, 3, (count, channels, *sides)), axis=-1)
    return (100 + walk + rng.integers(-1, 2, walk.shape)).astype(np.uint8)


def differences(picture: NDArray[np.uint8], step: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(D_p, D_{p+step}, D_{p+2·step}) wherever they exist, with D_p = I_p − I_{p+step}."""
    (down, right), (height, width) = step, picture.shape
    found = []
    for row, column in itertools.product(range(height), range(width)):
        ends = row + 3 * down, column + 3 * right
        if 0 <= ends[0] < height and 0 <= ends[1] < width:
            levels = [int(picture[row + k * down, column + k * right]) for k in range(4)]
            found.append((levels[0] - levels[1], levels[1] - levels[2], levels[2] - levels[3]))
    return found


def transition(picture: NDArray[np.uint8], step: tuple[int, int]) -> list[float]:
    """M_{u,v,w} = P(third = u | second = v, first = w), 0 where the condition never holds."""
    triples, found = differences(picture, step), []
    for u, v, w in itertools.product(RANGE, RANGE, RANGE):
        met = [third for first, second, third in triples if (first, second) == (w, v)]
        found.append(met.count(u) / len(met) if met else 0.0)
    return found


def cooccurrence(picture: NDArray[np.uint8], step: tuple[int, int]) -> list[float]:
    """P(third = u, second = v, first = w) with differences clipped to ±3."""
    triples = [tuple(max(-3, min(3, d)) for d in each) for each in differences(picture, step)]
    return [
        triples.count((w, v, u)) / len(triples)
        for u, v, w in itertools.product(RANGE, RANGE, RANGE)
    ]


REFERENCE: dict[Form, Callable[[NDArray[np.uint8], tuple[int, int]], list[float]]] = {
    "transition": transition,
    "cooccurrence": cooccurrence,
}


def reference(picture: NDArray[np.uint8], form: Form) -> NDArray[np.float64]:
    """The 686 features of one channel (H, W), the slow way."""
    return np.concatenate(
        [
            np.mean([REFERENCE[form](picture, step) for step in steps], axis=0)
            for steps in (STRAIGHT, DIAGONAL)
        ]
    )


def place(u: int, v: int, w: int, diagonal: bool = False) -> int:
    return 343 * diagonal + 49 * (u + 3) + 7 * (v + 3) + (w + 3)


@pytest.mark.parametrize("form", FORMS)
def test_features_are_those_of_the_equations(form: Form) -> None:
    images = pictures(3, 2)
    images[0, 0, 2:4, 3] = [0, 255]  # differences of a byte's whole range
    found = compute_spam_features(images, form=form, colour="concatenation")
    assert (found.shape, found.dtype) == ((3, 2 * FEATURES), np.dtype(np.float32))
    for image, row in zip(images, found, strict=True):
        wanted = np.concatenate([reference(channel, form) for channel in image])
        np.testing.assert_allclose(row, wanted, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_the_average_is_that_of_the_channels(form: Form) -> None:
    images = pictures(2, 3)
    apart = compute_spam_features(images, form=form, colour="concatenation").reshape(2, 3, FEATURES)
    np.testing.assert_allclose(compute_spam_features(images, form=form), apart.mean(1), atol=1e-7)
    np.testing.assert_allclose(
        apart[:, 1], compute_spam_features(images[:, 1:2], form=form), atol=1e-7
    )


@pytest.mark.parametrize("form", FORMS)
def test_constant_images_have_one_transition(form: Form) -> None:
    constant = np.full((2, 3, 4, 6), 255, dtype=np.uint8)
    wanted = np.zeros(FEATURES)
    wanted[[place(0, 0, 0), place(0, 0, 0, diagonal=True)]] = 1
    np.testing.assert_array_equal(compute_spam_features(constant, form=form), [wanted, wanted])


@pytest.mark.parametrize("form", FORMS)
def test_a_ramp_has_the_transitions_of_its_slope(form: Form) -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8), (1, 1, 5, 8))  # brighter to the right
    wanted = np.zeros(FEATURES)
    wanted[place(-1, -1, -1)] = wanted[place(1, 1, 1)] = 1 / 4  # right, left
    wanted[place(0, 0, 0)] = 2 / 4  # up and down
    wanted[[place(-1, -1, -1, diagonal=True), place(1, 1, 1, diagonal=True)]] = 2 / 4
    np.testing.assert_allclose(compute_spam_features(ramp, form=form)[0], wanted)


def test_what_lies_beyond_three_is_dropped_or_clipped() -> None:
    steep = np.broadcast_to(np.arange(0, 40, 5, dtype=np.uint8), (1, 1, 4, 8))
    dropped, clipped = (
        compute_spam_features(steep, form="transition")[0],
        compute_spam_features(steep)[0],
    )
    assert dropped.sum() == pytest.approx(2 / 4)  # the vertical ones alone, no diagonal one
    assert clipped.sum() == pytest.approx(2)
    assert clipped[place(3, 3, 3)] == pytest.approx(1 / 4)


def test_probabilities_add_up() -> None:
    images = pictures(20, 1, (12, 12))
    joint = compute_spam_features(images).reshape(20, 2, 343).sum(2)
    np.testing.assert_allclose(joint, 1, atol=1e-6)
    given = compute_spam_features(images, form="transition").reshape(20, 2, 7, 49).sum(2)  # over u
    assert given.max() <= 1 + 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, :, ::-1],
        lambda x: x[:, :, ::-1],
        lambda x: np.rot90(x, axes=(2, 3)),
        lambda x: x.transpose(0, 1, 3, 2),
        lambda x: x + np.uint8(50),
    ],
    ids=["flipped", "upside down", "turned", "transposed", "brighter"],
)
def test_symmetries(form: Form, change: Callable[[Any], Any]) -> None:
    images = pictures(4, 3)
    np.testing.assert_allclose(
        compute_spam_features(change(images), form=form),
        compute_spam_features(images, form=form),
        atol=1e-7,
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_negative_mirrors_the_features(form: Form) -> None:
    images = pictures(2)
    mirrored = (
        compute_spam_features(images, form=form).reshape(2, 2, 343)[:, :, ::-1].reshape(2, -1)
    )
    np.testing.assert_allclose(compute_spam_features(255 - images, form=form), mirrored, atol=1e-7)


def test_the_size_of_a_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(5, 3)
    whole = compute_spam_features(images)
    monkeypatch.setattr(module, "AT_A_TIME", 4 * module.BINS)
    np.testing.assert_array_equal(compute_spam_features(images), whole)
    np.testing.assert_array_equal(compute_spam_features(images[2:3]), whole[2:3])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[1]], "got list: call numpy() on a tensor"),
        (np.zeros((2, 1, 8, 8)), "uint8 (n, C, H, W) of 4 pixels a side or more, got float64"),
        (np.zeros((8, 8), dtype=np.uint8), "got uint8 (8, 8)"),
        (np.zeros((0, 1, 8, 8), dtype=np.uint8), "got (0, 1, 8, 8)"),
        (np.zeros((1, 1, 8, 3), dtype=np.uint8), "got (1, 1, 8, 3)"),
    ],
)
def test_what_is_no_image_is_refused(images: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compute_spam_features(images)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_misspelt_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="no form of SPAM features 'transitions': the nearest is"):
        compute_spam_features(pictures(), form="transitions")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no treatment of colour 'mean': there are: average"):
        compute_spam_features(pictures(), colour="mean")  # type: ignore[arg-type]
