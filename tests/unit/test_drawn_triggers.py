"""Drawn triggers are what their papers say, and follow from the secret."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from countermark.errors import ConfigError
from countermark.keys.key import KeyMaterial
from countermark.predictors.base import Images
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.schemes.drawn_triggers.guo import Guo
from countermark.schemes.drawn_triggers.zhang import Zhang
from countermark.schemes.triggers import DrawnTriggerScheme

SECRET, OTHER = KeyMaterial.from_test_seed(1), KeyMaterial.from_test_seed(2)
FORMS: dict[str, DrawnTriggerScheme] = {
    "adi": Adi(10), "guo": Guo(10),
    **{kind: Zhang(10, kind=kind) for kind in ("content", "noise", "unrelated")},
}  # fmt: skip


def covers(channels: int = 3, low: int = 60, high: int = 196) -> Images:
    """Images (100, C, 20, 24) away from black and white."""
    drawn = np.random.default_rng(1).integers(low, high, (100, channels, 20, 24))
    return drawn.astype(np.uint8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_triggers_are_images_that_follow_from_the_secret(form: str, channels: int) -> None:
    given = covers(channels)
    before = given.copy()
    drawn, again, other = (
        FORMS[form].draw_triggers(given, each) for each in (SECRET, SECRET, OTHER)
    )
    assert (drawn.dtype, drawn.shape) == (np.uint8, given.shape)
    assert np.array_equal(drawn, again)
    assert np.array_equal(given, before)
    assert np.array_equal(drawn, other) == (form == "content")  # a text is no secret
    assert len({each.tobytes() for each in drawn}) == 100  # each label can be learnt by itself
    assert drawn.flags.c_contiguous


def test_a_message_mask_changes_so_many_pixels_by_its_intensity() -> None:
    given = covers()
    moved = Guo(10, message_bits=50, intensity=30).draw_triggers(given, SECRET).astype(int) - given
    assert set(np.unique(moved)) == {-30, 0, 30}
    assert (moved[:, 0] != 0).sum(axis=(1, 2)).tolist() == [50] * 100
    assert (moved == moved[:1, :1]).all()  # one mask, in all images and channels


def test_saturated_pixels_stay_in_range() -> None:
    drawn = Guo(10, intensity=127).draw_triggers(covers(low=0, high=256), SECRET)
    light = covers(low=250, high=256)
    assert drawn.max() <= 255
    assert (Guo(10).draw_triggers(light, SECRET) >= 210).all()  # nothing wraps round
    assert (Zhang(10, kind="noise").draw_triggers(light, SECRET) >= 150).all()


def test_a_text_is_written_in_black() -> None:
    given = covers()
    written = Zhang(10, kind="content").draw_triggers(given, SECRET)
    ink = written != given
    assert (written[ink] == 0).all()
    assert ink[:, :, 1:6, 1:17].sum() == ink.sum()
    letters = "".join("#" if each else "." for each in ink[0, 0, 1, 1:17])
    assert letters == "###.###.###.###."  # the upper edge of TEST


def test_noise_is_one_pattern() -> None:
    given = covers()
    moved = Zhang(10, kind="noise").draw_triggers(given, SECRET).astype(int) - given
    inside = np.abs(moved[0]) < 60
    assert (moved == moved[:1])[:, inside].all()
    assert moved[0].std() == pytest.approx(20, rel=0.1)


def test_abstract_pictures_owe_nothing_to_their_covers() -> None:
    drawn = Adi(10).draw_triggers(covers(), SECRET)
    assert np.array_equal(drawn, Adi(10).draw_triggers(np.zeros_like(drawn), SECRET))
    assert drawn.min() < 10
    assert drawn.max() > 245
    correlation = np.corrcoef(drawn.reshape(100, -1))
    assert np.abs(correlation[~np.eye(100, dtype=bool)]).mean() < 0.2


@pytest.mark.parametrize(
    ("scheme", "shape", "says"),
    [
        (Guo(10), (1, 1, 8, 8), "message_bits is 128, an image has 64 pixels"),
        (Zhang(10), (1, 1, 8, 8), "are too small for 'TEST'"),
    ],
)
def test_images_that_are_too_small_are_one_line(
    scheme: DrawnTriggerScheme, shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        scheme.draw_triggers(np.zeros(shape, dtype=np.uint8), SECRET)
    assert says in str(caught.value)


@pytest.mark.parametrize("fields", [{"kind": "contents"}, {"triggers": 0}])
def test_wrong_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="zhang: field"):
        Zhang.from_fields({"classes": 10, **fields})
