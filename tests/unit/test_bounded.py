"""Bounded readings: what they are, what they withstand, and that chance reads them as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from bounded_by_hand import bounded_by_hand
from numpy.typing import NDArray

from countermark.keys.key import Key, KeyMaterial
from countermark.schemes import load_weight_scheme, make_scheme
from countermark.schemes.bounded_readings import BOUND, compute_line_scales
from countermark.schemes.bounded_training import bound_values
from countermark.schemes.hash_filter.scheme import HashFilter
from countermark.schemes.stamp.scheme import CarrierStream, Stamp
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.weights import WeightScheme

Tensor = NDArray[np.float64]
SHAPES = [(10, 64), (6, 5, 3, 3), (64, 8), (40,), (2, 300), (9, 7, 4)]


def read(part: Tensor, shape: tuple[int, ...], start: int = 0) -> Tensor:
    return compute_line_scales(part, shape, start).read(part, 0, len(part))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_values_are_what_the_format_says(shape: tuple[int, ...], share: float) -> None:
    drawn = np.random.default_rng(1)
    values = drawn.standard_t(2, size=shape).reshape(-1)
    values[drawn.random(len(values)) < 0.3] = 0.0
    count = int(share * len(values))
    for start in {0, (len(values) - count) // 2, len(values) - count}:
        part = values[start : start + count]
        assert np.allclose(read(part, shape, start), bounded_by_hand(part, shape, start))


def test_parts_are_read_piece_by_piece() -> None:
    values = np.random.default_rng(1).normal(size=(30, 20)).reshape(-1)[7:555]
    scales = compute_line_scales(values, (30, 20), 7)
    pieces = [scales.read(values, at, at + 100) for at in range(0, len(values), 100)]
    assert np.array_equal(np.concatenate(pieces), scales.read(values, 0, len(values)))


@pytest.mark.parametrize("shape", [(40, 64), (16, 12, 3, 3)])
def test_rescaled_units_are_read_as_before(shape: tuple[int, ...]) -> None:
    drawn = np.random.default_rng(2)
    values = drawn.normal(size=shape)
    ones = (1,) * (len(shape) - 2)
    rows = np.exp(3 * drawn.normal(size=(shape[0], 1, *ones)))
    columns = np.exp(3 * drawn.normal(size=(1, shape[1], *ones)))
    before, after = (read(each.reshape(-1), shape) for each in (values, rows * values * columns))
    assert np.abs(before - after).mean() < 0.02


def test_what_is_extreme_is_bounded_and_finite() -> None:
    values = np.random.default_rng(3).normal(size=(20, 20)).astype(np.float32)
    values[3, 4], values[5, 5], values[:, 7], values[9] = 3e38, -1e-38, 0.0, 0.0
    found = read(values.reshape(-1), values.shape)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= BOUND
    huge = np.array([1e308, -1e308, 1e-308, 0.0] * 5)
    assert np.isfinite(read(huge, (5, 4))).all()
    assert (read(np.zeros(20), (5, 4)) == 0).all()


@pytest.mark.parametrize("shape", [(10, 64), (6, 5, 3, 3), (40,), (2, 300)])
def test_training_reads_nearly_the_same(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(4).normal(size=shape).astype(np.float32).reshape(-1)
    live = bound_values(torch.from_numpy(values), shape).numpy()
    assert np.abs(live - read(values.astype(np.float64), shape)).mean() < 0.05


# --- keys say how they are read


def test_keys_of_earlier_versions_are_read_plainly() -> None:
    for scheme in (Stamp("w"), Uchida("w"), HashFilter("w")):
        fields = scheme.to_fields()
        assert fields.pop("reading") == "bounded"
        assert make_scheme(scheme.name, fields).reading == "plain"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "published", [{"key_type": "random"}, {"read": "filter_mean"}, {"regularizer": "bce"}]
)
def test_published_forms_are_read_plainly(published: dict[str, str]) -> None:
    assert Uchida("w", **published).reading == "plain"  # type: ignore[arg-type]


# --- dead units, in a layer as its owner marks it


def marked(key: Key, shape: tuple[int, int], margin: float) -> Tensor:
    """A layer moved along the signs of a stamp until all bits have their margin."""
    scheme, weights = load_weight_scheme(key), np.random.default_rng(5).normal(size=shape)
    agree = 2.0 * key.message - 1
    bits, signs = CarrierStream(key).take_carriers(
        weights.size
    )  # which bit each value carries, and its sign
    for _ in range(60):
        scores = agree * scheme.extract({"w": weights}, key).scores
        if scores.min() >= margin:
            return weights
        missing = np.maximum(margin - scores, 0.0) * agree / np.sqrt(np.bincount(bits))
        weights = weights + 0.9 * (missing[bits] * signs).reshape(shape)
    raise AssertionError("the margin is not reached")


NOISES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Tensor]] = {
    "normal": lambda drawn, shape: 100 * drawn.normal(size=shape),
    "cauchy": lambda drawn, shape: 100 * drawn.standard_cauchy(size=shape),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("side", ["outgoing", "incoming"])
def test_a_twentieth_of_dead_units_takes_few_bits(noise: str, side: str) -> None:
    shape, drawn = (256, 256), np.random.default_rng(6)
    found = {}
    for reading in ("plain", "bounded"):
        scheme = Stamp("w", 256, margin=5.0, reading=reading)  # type: ignore[arg-type]
        key = scheme.generate_key({"w": shape}, owner="x", material=KeyMaterial.from_test_seed(2))
        weights = marked(key, shape, 5.0)
        dead = drawn.choice(256, size=13, replace=False)
        if side == "outgoing":
            weights[:, dead] = NOISES[noise](drawn, (256, 13))
        else:
            weights[dead] = NOISES[noise](drawn, (13, 256))
        found[reading] = 256 - scheme.extract({"w": weights}, key).match_count
    assert found["plain"] > 80, "the attack works where the reading has no bound"
    assert found["bounded"] <= 10


# --- the null hypothesis: any function of the suspect that does not know the key


def kinds() -> dict[str, Tensor]:
    """Twelve kinds of layers."""
    drawn, shape = np.random.default_rng(7), (24, 32)
    normal = drawn.normal(size=shape)
    return {
        "gaussian": normal,
        "constant": np.full(shape, 0.3),
        "zero": np.zeros(shape),
        "sparse": np.where(drawn.random(shape) < 0.9, 0.0, normal),
        "ternary": np.sign(normal) * (np.abs(normal) > 0.8),
        "low rank": drawn.normal(size=(24, 1)) @ drawn.normal(size=(1, 32)),
        "cauchy": drawn.standard_cauchy(size=shape),
        "quantised": np.round(normal * 2) / 2,
        "tied rows": np.repeat(normal[:12], 2, axis=0),
        "one spike": np.where(np.arange(768).reshape(shape) == 5, 1e20, normal),
        "positive": np.abs(normal),
        "rescaled": normal * np.exp(4 * drawn.normal(size=(24, 1))),
    }


LINEAR: dict[str, WeightScheme] = {
    "stamp": Stamp("w", 64),
    "stamp in part": Stamp("w", 64, values=300),
    "uchida": Uchida("w", 64),
    "hash_filter": HashFilter("w", 64),
}


@pytest.mark.filterwarnings("ignore:even a perfect reading")
@pytest.mark.parametrize("form", LINEAR)
def test_matches_of_a_thousand_keys_are_binomial_on_any_layer(form: str) -> None:
    """Chi-square of the matches of 1,000 keys against Bin(64, 1/2), Bonferroni over all cells."""
    from scipy import stats

    scheme, bits = LINEAR[form], 64
    cells = len(LINEAR) * len(kinds())
    edges = [0, 27, 29, 31, 32, 33, 35, 37, bits + 1]
    law = stats.binom(bits, 0.5)
    expected = np.diff([law.cdf(edge - 1) for edge in edges])
    shape = (24, 32)
    keys = [
        scheme.generate_key({"w": shape}, owner="x", material=KeyMaterial.from_test_seed(number))
        for number in range(1000)
    ]
    for kind, layer in kinds().items():
        matched = [scheme.extract({"w": layer}, key).match_count for key in keys]
        counts = np.histogram(matched, edges)[0]
        p = stats.chisquare(counts, 1000 * expected).pvalue
        assert p > 0.001 / cells, (kind, counts)
        assert max(matched) < 60, "no claim"


def test_a_bounded_key_is_another_key() -> None:
    plain = Stamp("w", 64, values=300, reading="plain")
    with pytest.warns(UserWarning, match="64 bits"):
        one, other = (
            each.generate_key({"w": (24, 32)}, owner="x", material=KeyMaterial.from_test_seed(1))
            for each in (plain, replace(plain, reading="bounded"))
        )
    assert one.commitment != other.commitment
