"""Embedders: how many pixels change, by how much, where; determinism; refusals."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest

from countermark.errors import ConfigError, MissingExtraError
from countermark_lab.steganalysis.embedders import (
    EMBEDDERS,
    AdaptiveEmbedder,
    LsbMatching,
    Method,
    UniformNoise,
    find_embedder,
)
from countermark_lab.steganalysis.images import (
    Embed,
    Images,
    derive_seeds,
    embed_images,
    make_half_stego,
)

METHODS: list[Method] = ["wow", "hugo", "s_uniward"]


def textured(count: int = 4, side: int = 24) -> Images:
    """A flat left half and a rough right half, uint8 (count, 3, side, side)."""
    rng = np.random.default_rng(7)
    images = np.full((count, 3, side, side), 120, dtype=np.uint8)
    images[..., side // 2 :] += rng.integers(0, 60, (count, 3, side, side // 2), dtype=np.uint8)
    return images + rng.integers(0, 2, images.shape, dtype=np.uint8)


def uniform(count: int = 40) -> Images:
    return np.random.default_rng(1).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def steps(embed: Embed, images: Images, seed: int = 5) -> np.ndarray:
    """By how much each pixel moved, int16 (n, C, H, W)."""
    return embed(images, seed).astype(np.int16) - images


def within(hits: int, of: int, share: float) -> bool:
    """Is a count at most five deviations off? A right one is not once in two million times."""
    return abs(hits - share * of) <= 5 * math.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("payload", [0.1, 0.4, 1.0])
def test_lsb_matching_changes_half_its_payload_by_one(payload: float) -> None:
    images = uniform()
    moved = steps(LsbMatching(payload), images)
    assert set(np.unique(moved)) == {-1, 0, 1}
    assert within(int((moved != 0).sum()), moved.size, payload / 2)
    inner = (images > 0) & (images < 255) & (moved != 0)
    assert within(int((moved[inner] == 1).sum()), int(inner.sum()), 0.5)


def test_lsb_matching_writes_random_bits() -> None:
    even = np.full((30, 1, 32, 32), 42, dtype=np.uint8)
    bits = LsbMatching(1.0)(even, 0) % 2
    assert within(int(bits.sum()), bits.size, 0.5)


@pytest.mark.parametrize(("level", "step"), [(0, 1), (255, -1)])
def test_lsb_matching_stays_within_a_byte(level: int, step: int) -> None:
    moved = steps(LsbMatching(1.0), np.full((4, 1, 32, 32), level, dtype=np.uint8))
    assert set(np.unique(moved)) == {0, step}
    assert within(int((moved != 0).sum()), moved.size, 0.5)


def test_no_payload_changes_nothing() -> None:
    images = textured()
    for embed in (LsbMatching(0.0), AdaptiveEmbedder("hugo", 0.0)):
        np.testing.assert_array_equal(embed(images, 0), images)


def test_noise_is_uniform_and_clipped() -> None:
    grey = np.full((30, 1, 32, 32), 100, dtype=np.uint8)
    levels, counts = np.unique(steps(UniformNoise(4), grey), return_counts=True)
    assert levels.tolist() == list(range(-4, 5))
    assert all(within(int(count), grey.size, 1 / 9) for count in counts)
    assert set(np.unique(UniformNoise(4)(np.zeros_like(grey), 0))) == {0, 1, 2, 3, 4}
    assert UniformNoise(9)(np.full_like(grey, 255), 0).min() == 246


@pytest.mark.parametrize("method", METHODS)
def test_adaptive_methods_change_rough_places_by_one(method: Method) -> None:
    moved = steps(AdaptiveEmbedder(method), textured())
    assert set(np.unique(moved)) == {-1, 0, 1}
    changed = (moved != 0).mean((0, 1, 2))  # by column
    # A ternary change with p = 0.063 holds 0.4 bits, where all pixels cost alike; costs that differ
    # concentrate the changes and take more of them.
    assert 0.05 < changed.mean() < 0.2
    assert changed[13:].mean() > 3 * changed[:11].mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0, 77, 255])
def test_adaptive_methods_stay_within_a_byte(method: Method, level: int) -> None:
    flat = np.full((1, 1, 16, 16), level, dtype=np.uint8)
    dotted = flat.copy()
    dotted[0, 0, 8, 8] = 255 - level
    for images in (flat, dotted):
        assert np.abs(steps(AdaptiveEmbedder(method), images)).max() <= 1


def test_channels_are_drawn_apart() -> None:
    grey = np.repeat(textured(1)[:, :1], 3, axis=1)
    for embed in (AdaptiveEmbedder("hugo"), LsbMatching()):
        red, green, blue = steps(embed, grey)[0]
        assert (red != green).any()
        assert (green != blue).any()


@pytest.mark.parametrize("name", list(EMBEDDERS))
def test_a_seed_gives_the_same_images_and_another_others(name: str) -> None:
    embed, images = find_embedder(name), textured(2)
    before = images.copy()
    first = embed(images, 1)
    assert (first.dtype, first.shape) == (images.dtype, images.shape)
    np.testing.assert_array_equal(embed(images, 1), first)
    assert (embed(images, 2) != first).any()
    np.testing.assert_array_equal(images, before)


def test_names_have_the_defaults_of_the_paper() -> None:
    assert list(EMBEDDERS) == ["wow", "hugo", "s_uniward", "lsb_matching", "uniform_noise"]
    assert find_embedder("hugo") == AdaptiveEmbedder("hugo", 0.4)
    assert find_embedder("lsb_matching") == LsbMatching(0.4)
    assert find_embedder("uniform_noise") == UniformNoise(4)
    with pytest.raises(ConfigError, match="no embedder 'suniward': the nearest is 's_uniward'"):
        find_embedder("suniward")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LsbMatching(1.1), "a payload is 0 to 1 bits a pixel, got 1.1"),
        (lambda: AdaptiveEmbedder("wow", -0.1), "a payload is 0 to 1 bits a pixel, got -0.1"),
        (lambda: LsbMatching(math.nan), "got nan"),
        (lambda: UniformNoise(0), "1 to 255 grey levels, got 0"),
        (lambda: AdaptiveEmbedder("wov"), "no adaptive method 'wov': the nearest is 'wow'"),  # type: ignore[arg-type]
        (lambda: LsbMatching()(np.zeros((2, 2), dtype=np.uint8), 0), "got uint8 (2, 2)"),
    ],
)
def test_what_cannot_be_embedded_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "conseal", None)
    with pytest.raises(
        MissingExtraError, match=r"embedding with wow needs .*'countermark\[stego\]'"
    ):
        AdaptiveEmbedder("wow")(textured(1), 0)


def test_half_become_stego_images_and_no_picture_is_there_twice() -> None:
    covers = uniform(60)
    mixed = make_half_stego(covers, UniformNoise(4), seed=0)
    assert mixed.stego.sum() == 30
    changed = (mixed.images != covers).any((1, 2, 3))
    np.testing.assert_array_equal(changed, mixed.stego)
    other = make_half_stego(covers, UniformNoise(4), seed=1)
    assert (other.stego != mixed.stego).any()
    again = make_half_stego(covers, UniformNoise(4), seed=0)
    np.testing.assert_array_equal(again.images, mixed.images)


def test_half_of_an_odd_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected an even number, got 3"):
        make_half_stego(uniform(3), UniformNoise(), seed=0)


def test_derived_seeds_differ_from_all_others() -> None:
    seeds = [
        0,
        1,
        *derive_seeds(0, "mix", 2),
        *derive_seeds(0, "ats", 2),
        *derive_seeds(1, "ats", 2),
    ]
    assert len(set(seeds)) == len(seeds)
    assert derive_seeds(0, "ats", 2) == derive_seeds(0, "ats", 2)
    with pytest.raises(ConfigError, match="a seed is 0 or more, got -1"):
        derive_seeds(-1, "ats", 2)


def test_an_embedder_that_changes_the_shape_is_refused() -> None:
    images = uniform(2)
    with pytest.raises(ConfigError, match=r"expected \(2, 3, 32, 32\), got \(2, 1, 32, 32\)"):
        embed_images(lambda x, _: x[:, :1], images, 0)
    with pytest.raises(ConfigError, match="got float64"):
        embed_images(lambda x, _: x / 1.0, images, 0)
