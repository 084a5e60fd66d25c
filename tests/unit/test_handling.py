"""What images go through before a host sees them: each does what it says."""

from __future__ import annotations

import numpy as np
import pytest

from countermark.predictors.base import Images
from countermark.training.data import load_data
from countermark_lab.experiments.image_transforms import (
    ImageTransform,
    make_transformed_predictor,
    transform_images,
)
from countermark_lab.experiments.spec import SpecModel

HANDLINGS = [
    ImageTransform(how="jpeg", by=75), ImageTransform(how="resize", by=20), ImageTransform(how="crop", by=26),
    ImageTransform(how="blur", by=0.8), ImageTransform(how="median", by=3),
    ImageTransform(how="levels", by=32),
]  # fmt: skip


def pictures(channels: int) -> Images:
    """Eight digits, in as many channels, each with a gradient of its own."""
    grey = load_data("digits").test_images[:8].numpy()
    ramps = np.arange(channels)[:, None, None] * np.arange(28, dtype=np.uint8)
    return (grey // 2 + ramps).astype(np.uint8)


def apart(one: Images, other: Images) -> float:
    return float(np.abs(one.astype(float) - other).mean())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("handling", HANDLINGS, ids=lambda each: each.label)
def test_images_keep_their_form_and_mostly_their_content(
    handling: ImageTransform, channels: int
) -> None:
    images = pictures(channels)
    before = images.copy()
    found = transform_images(images, handling)
    assert (found.dtype, found.shape) == (np.uint8, images.shape)
    assert (images == before).all()
    assert 0 < apart(found, images) < 0.5 * apart(np.roll(images, 1, axis=0), images)


def test_the_number_is_how_much() -> None:
    images = pictures(3)
    for gentle, rough in (
        (ImageTransform(how="jpeg", by=95), ImageTransform(how="jpeg", by=30)),
        (ImageTransform(how="resize", by=26), ImageTransform(how="resize", by=12)),
        (ImageTransform(how="crop", by=26), ImageTransform(how="crop", by=12)),
        (ImageTransform(how="blur", by=0.3), ImageTransform(how="blur", by=2)),
        (ImageTransform(how="median", by=3), ImageTransform(how="median", by=7)),
        (ImageTransform(how="levels", by=64), ImageTransform(how="levels", by=4)),
    ):
        assert apart(transform_images(images, gentle), images) < apart(
            transform_images(images, rough), images
        )


def test_known_answers() -> None:
    levels = transform_images(pictures(3), ImageTransform(how="levels", by=4))
    assert set(np.unique(levels)) <= {32, 96, 160, 224}
    speck = np.zeros((1, 1, 28, 28), dtype=np.uint8)
    speck[0, 0, 14, 14] = 255
    assert not transform_images(speck, ImageTransform(how="median", by=3)).any()
    framed = np.zeros((1, 1, 28, 28), dtype=np.uint8)
    framed[..., 4:-4, 4:-4] = 200
    assert (transform_images(framed, ImageTransform(how="crop", by=20)) == 200).all()


def test_a_suspect_behind_it_sees_what_is_left() -> None:
    seen: list[Images] = []

    def suspect(images: Images) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        seen.append(images)
        return np.zeros(len(images), dtype=np.int64)

    images, blurred = pictures(1), ImageTransform(how="blur", by=1)
    assert (make_transformed_predictor(suspect, blurred)(images) == 0).all()
    assert (seen[0] == transform_images(images, blurred)).all()


@pytest.mark.parametrize(
    "given", [{"how": "paint", "by": 1}, {"how": "jpeg"}, {"how": "blur", "by": 0}]
)
def test_what_nobody_knows_is_refused(given: dict[str, object]) -> None:
    assert issubclass(ImageTransform, SpecModel)
    with pytest.raises(ValueError, match=r"how|by"):
        ImageTransform.model_validate(given)
