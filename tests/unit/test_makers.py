"""Who makes stego images: the owner's are the key's, and nobody else's are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from stego_keys import Images, covers, digits, made

from countermark.errors import ConfigError
from countermark.keys.key import Key
from countermark.schemes.deepstego.networks import repeat_tile
from countermark.schemes.deepstego.scheme import draw_tile
from countermark.schemes.deepstego.stego_generators import (
    StegoMaker,
    load_owner_maker,
    make_foreign_maker,
    make_fresh_triggers,
    make_other_logos_maker,
    make_swapped_logos_maker,
    make_wrong_tiles_maker,
)


@pytest.fixture(scope="module")
def key() -> Key:
    return made()


@pytest.fixture(scope="module")
def strangers(key: Key) -> StegoMaker:
    """What another network makes of the same covers; it takes seconds to train."""
    return make_foreign_maker(key, digits().train_images.numpy(), 3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def added(stego: Images) -> Images:
    """What was added to the covers, in grey levels."""
    return stego.astype(np.int16) - covers()


def alike(one: Images, other: Images) -> float:
    """Correlation of what two makers add to the same covers."""
    return float(np.corrcoef(added(one).ravel(), added(other).ravel())[0, 1])


def loudness(stego: Images) -> float:
    return float(np.sqrt(np.square(added(stego).astype(np.float64)).mean()))


def test_the_committed_triggers_are_made_as_fresh_ones_are(key: Key) -> None:
    images = digits().train_images.numpy()
    chosen = key.material.make_stream("covers").draw_permutation(len(images))[:32]
    assert np.array_equal(make_fresh_triggers(key, images[chosen]), key.frozen["triggers"])


def test_strength_is_how_loud_a_trigger_is(key: Key) -> None:
    half, whole = (
        loudness(make_fresh_triggers(key, covers(), strength=each)) for each in (0.5, 1.0)
    )
    assert half == pytest.approx(whole / 2, rel=0.15)  # dark pixels are cut off at 0
    assert np.array_equal(make_fresh_triggers(key, covers(), strength=0.0), covers())


def test_asking_draws_nothing_from_the_loop_of_the_owner(key: Key, strangers: StegoMaker) -> None:
    before = torch.get_rng_state()
    make_fresh_triggers(key, covers())
    again = make_foreign_maker(key, digits().train_images.numpy(), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(again(covers()), strangers(covers()))


def test_others_add_something_else(key: Key, strangers: StegoMaker) -> None:
    own = make_fresh_triggers(key, covers())
    count = len(covers())
    for each in (
        strangers(covers()),
        make_other_logos_maker(key, count, generator())(covers()),
        make_swapped_logos_maker(key, count, generator())(covers()),
        make_wrong_tiles_maker(key, count, generator())(covers()),
    ):
        assert each.shape == own.shape
        assert each.dtype == np.uint8
        assert loudness(each) > loudness(own) / 3
        assert alike(each, own) < 0.9


def test_another_logo_has_another_tile(key: Key) -> None:
    bits = key.frozen["logo"]
    assert np.array_equal(draw_tile(key.material, bits, 1), key.frozen["tile"])
    flipped = bits.copy()
    flipped[0, 0] ^= 1
    same = draw_tile(key.material, flipped, 1) == key.frozen["tile"]
    assert 0.2 < same.mean() < 0.8
    tile = repeat_tile(2.0 * torch.from_numpy(key.frozen["tile"]) - 1, 28, 28).abs()
    swapped = make_swapped_logos_maker(key, 3, generator()).logos * load_owner_maker(key).logos
    assert torch.equal(swapped.abs(), tile.expand(3, -1, -1, -1))
    own_tile = swapped.reshape(3, -1).float().mean(1).abs()
    assert (own_tile < 0.6).all()  # other bits


@pytest.mark.parametrize("name", ["tile", "logo"])
def test_a_tile_that_does_not_follow_from_the_logo_is_one_line(key: Key, name: str) -> None:
    changed = replace(key, frozen={**key.frozen, name: 1 - key.frozen[name]})
    with pytest.raises(ConfigError, match="does not follow from its secret and its logo"):
        load_owner_maker(changed)


@pytest.mark.parametrize(
    "logo", [None, np.zeros((8, 4), dtype=np.uint8), np.full((8, 8), 2, dtype=np.uint8)]
)
def test_a_damaged_logo_is_one_line(key: Key, logo: np.ndarray | None) -> None:
    without = {name: each for name, each in key.frozen.items() if name != "logo"}
    given = without if logo is None else without | {"logo": logo}
    with pytest.raises(ConfigError, match=r"the key's logo is .*: expected bits uint8 \[8, 8\]"):
        load_owner_maker(replace(key, frozen=given))


def test_a_pasted_residual_is_that_of_the_donor(key: Key) -> None:
    maker, donors = load_owner_maker(key), covers()[::-1]
    pasted = maker.paste_residuals(covers(), donors)
    assert np.array_equal(maker.paste_residuals(covers(), covers()), maker(covers()))
    wanted = maker.compute_residuals(torch.from_numpy(donors.copy())).float().numpy()
    free = (added(pasted) != 0) & (pasted > 0) & (pasted < 255)
    assert free.any()
    assert np.abs(added(pasted) - wanted)[free].max() <= 0.5
    with pytest.raises(ConfigError, match="63 donors for 64 covers"):
        maker.paste_residuals(covers(), donors[1:])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 1, 28, 28), dtype=np.float32),
        np.zeros((2, 3, 28, 28), dtype=np.uint8),
        np.zeros((0, 1, 28, 28), dtype=np.uint8),
        np.zeros((1, 28, 28), dtype=np.uint8),
    ],
)
def test_covers_of_another_form_are_one_line(key: Key, images: Images) -> None:
    with pytest.raises(ConfigError, match=r"expected images uint8 \['n', 1, 28, 28\]"):
        make_fresh_triggers(key, images)


@pytest.mark.parametrize("given", [None, np.nan, np.float64(1)])
def test_a_damaged_network_is_one_line(key: Key, given: float | None) -> None:
    frozen = dict(key.frozen)
    kernel = frozen.pop("stego.leave.weight")
    if given is not None:
        frozen["stego.leave.weight"] = kernel * given
    with pytest.raises(ConfigError, match=r"stego network is damaged: leave\.weight is") as caught:
        make_fresh_triggers(replace(key, frozen=frozen), covers())
    assert "\n" not in str(caught.value)
