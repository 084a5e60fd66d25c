"""The hash filter: places that follow from secret and commitment, and what they are worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from countermark.errors import CapacityError, ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.hash_filter.scheme import HashFilter
from countermark.schemes.uchida.scheme import Uchida
from countermark.verification.verify import verify

SHAPE = {"w": (100, 64)}
# Wrong bits after one and after five marks of a thief, as the scheme's page has them.
PLAIN, FILTERED = (0.017, 0.254), (0.059, 0.320)


def key_of(scheme: Uchida, number: int) -> Key:
    material = KeyMaterial.from_test_seed(number)
    return scheme.generate_key(SHAPE, owner="ACME", material=material)


def test_the_filter_is_redrawn_with_every_commitment() -> None:
    scheme = HashFilter("w", 256, rounds=3)
    key = key_of(scheme, 1)
    kept = scheme.get_mask(key, "w")
    assert abs(kept.mean() - 1 / 8) < 0.02
    assert scheme.count_all_read_values(key) == kept.sum()
    for other in (key_of(scheme, 2), replace(key, owner="ACME ")):
        both = (kept & scheme.get_mask(other, "w")).sum() / kept.sum()
        assert abs(both - 1 / 8) < 0.05, "two keys share what chance lets them share"
    stream = key.make_stream("filter", "w")  # as the page on formats says
    rows = np.stack([stream.take_bits(6400) for _ in range(3)])
    assert np.array_equal(kept, rows.all(axis=0))


def test_only_what_is_left_is_read_and_counted() -> None:
    scheme = HashFilter("w", 256, reading="plain")
    key = key_of(scheme, 1)
    weights = {"w": np.random.default_rng(1).normal(size=SHAPE["w"])}
    noise = np.random.default_rng(2).normal(size=SHAPE["w"]) * ~scheme.get_mask(key, "w").reshape(
        100, 64
    )
    scores = scheme.extract(weights, key).scores
    elsewhere = scheme.extract({"w": weights["w"] + 100 * noise}, key).scores
    assert np.array_equal(scores, elsewhere)
    with pytest.raises(CapacityError, match="at most"):
        key_of(HashFilter("w", 4000), 1)
    with pytest.raises(ConfigError, match="leave select out"):
        HashFilter("w", 256, select="converged")


def least_norm(scheme: Uchida, key: Key, w: np.ndarray, margin: float = 2.0) -> np.ndarray:
    """The least change after which every bit of a key has its margin."""
    kept = scheme.get_mask(key, "w")
    at = np.arange(w.size) if kept is None else np.flatnonzero(kept)
    X = np.concatenate(list(scheme.generate_row_blocks(key))).astype(float)
    y, signs = X @ w[at], 2.0 * key.message - 1
    wanted = signs * np.maximum(signs * y, margin * np.sqrt(len(at)))
    marked = w.copy()
    marked[at] += np.linalg.lstsq(X, wanted - y, rcond=None)[0]
    return marked


def overwritten(scheme: Uchida, number: int) -> tuple[float, float]:
    """The share of the owner's bits that is wrong after one and after five marks of a thief."""
    shape, wrong = {"w": (20, 80)}, []

    def key(at: int) -> Key:
        material = KeyMaterial.from_test_seed(1000 * number + at)
        return scheme.generate_key(shape, owner="ACME", material=material)

    w = least_norm(scheme, key(0), np.random.default_rng([1, number]).normal(size=1600))
    for thief in range(1, 6):
        w = least_norm(scheme, key(thief), w)
        evidence = scheme.extract({"w": w.reshape(20, 80)}, key(0))
        wrong.append(1 - evidence.match_count / evidence.bits)
    return wrong[0], wrong[4]


def test_secret_places_are_no_defence_against_overwriting_by_themselves() -> None:
    """The table on the scheme's page, by fewer keys."""
    plain, filtered = (
        np.mean([overwritten(scheme, number) for number in range(4)], axis=0)
        for scheme in (Uchida("w", 200), HashFilter("w", 200))
    )
    assert plain == pytest.approx(PLAIN, abs=0.05)
    assert filtered == pytest.approx(FILTERED, abs=0.05)


def test_a_committed_filter_is_not_forged_by_trying() -> None:
    weights = np.random.default_rng(1).normal(size=SHAPE["w"]).astype(np.float32)
    from torch import from_numpy, nn

    module = nn.Module()
    module.register_parameter("w", nn.Parameter(from_numpy(weights)))
    scheme = HashFilter("w", 256)
    tried = [scheme.generate_key(SHAPE, owner="Mallory") for _ in range(50)]
    assert max(verify(module, key).matched or 0 for key in tried) < 167
