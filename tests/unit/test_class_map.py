"""The rank of a key's class map among all maps: exact where all are tried, valid where not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from countermark.keys.streams import KeyStream
from countermark.results.null_hypotheses import SecretClassMap
from countermark.results.reading import Reading


def class_map(count: int, seed: int) -> NDArray[np.int64]:
    order = np.random.default_rng(seed).permutation(count)
    mapped = np.empty_like(order)
    mapped[order] = np.roll(order, 1)
    return mapped


def asked(
    classes: NDArray[np.int64], read: NDArray[np.int64], mapped: NDArray[np.int64], draws: int = 99
) -> tuple[SecretClassMap, Reading]:
    null = SecretClassMap(classes, KeyStream(bytes(32), b"", "maps"), draws)
    return null, Reading(read, mapped[classes], choices=len(mapped), unit="triggers")


@pytest.mark.parametrize("count", [3, 4, 6, 10])
def test_a_perfect_reading_has_the_floor_of_one_map_among_all(count: int) -> None:
    classes = np.arange(50) % count
    mapped = class_map(count, 1)
    null, evidence = asked(classes, mapped[classes], mapped)
    assert null.compute_log10_p(evidence) == pytest.approx(-math.log10(math.factorial(count - 1)))
    assert null.compute_log10_floor(evidence) == pytest.approx(null.compute_log10_p(evidence))


def test_the_rank_is_that_of_a_search_through_all_cycles() -> None:
    random = np.random.default_rng(3)
    classes, read, mapped = random.integers(0, 5, 40), random.integers(0, 5, 40), class_map(5, 2)
    null, evidence = asked(classes, read, mapped)
    counts = []
    for order in itertools.permutations(range(1, 5)):
        cycle = dict(itertools.pairwise((0, *order, 0)))
        counts.append(sum(cycle[int(c)] == r for c, r in zip(classes, read, strict=True)))
    share = np.mean(np.array(counts) >= evidence.match_count)
    assert null.compute_log10_p(evidence) == pytest.approx(math.log10(share))


def test_two_classes_have_one_map_which_says_nothing() -> None:
    mapped, classes = np.array([1, 0]), np.arange(30) % 2
    null, evidence = asked(classes, mapped[classes], mapped)
    assert null.compute_log10_p(evidence) == 0.0
    assert null.compute_log10_floor(evidence) == 0.0


def test_answers_that_are_none_or_beyond_the_classes_count_for_no_map() -> None:
    mapped, classes = class_map(4, 5), np.arange(40) % 4
    read = np.where(np.arange(40) < 20, -1, 99)
    null, evidence = asked(classes, read, mapped)
    assert evidence.match_count == 0
    assert null.compute_log10_p(evidence) == 0.0


def test_many_classes_are_ranked_among_random_maps_with_their_floor() -> None:
    mapped, classes = class_map(30, 5), np.arange(90) % 30
    null, evidence = asked(classes, mapped[classes], mapped, draws=999)
    assert null.compute_log10_p(evidence) == pytest.approx(-3)
    assert null.compute_log10_floor(evidence) == pytest.approx(-3)


@pytest.mark.parametrize("count", [5, 12])
def test_ranks_of_strangers_are_no_smaller_than_chance(count: int) -> None:
    """A suspect with a taste of its own, the same under every key: p is never too small."""
    random = np.random.default_rng(7)
    classes = random.integers(0, count, 60)
    read = np.where(random.random(60) < 0.5, classes, (classes * 2 + 1) % count)
    ps = []
    for seed in range(300):
        null, evidence = asked(classes, read, class_map(count, seed), draws=199)
        ps.append(10 ** null.compute_log10_p(evidence))
    for level in (0.05, 0.1, 0.25, 0.5):
        reached = sum(p <= level for p in ps)
        assert reached <= scipy.stats.binom.ppf(0.999, len(ps), level)
