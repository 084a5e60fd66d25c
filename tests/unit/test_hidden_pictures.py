"""What is hidden: bits, QR codes, logos; and that they come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import segno

import barriers
from countermark.errors import ConfigError
from countermark.images.image_files import encode_png
from countermark.schemes.deep_watermarking.scheme import compute_correlation
from countermark.schemes.hidden_images import (
    draw_bits_image,
    make_hidden_image,
    make_qr_image,
    read_image_bits,
)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 50, 41)])
def test_bits_come_back_from_their_picture(shape: tuple[int, int, int]) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (10, 10), dtype=np.uint8)
    picture = draw_bits_image(bits, shape)
    assert picture.shape == shape
    noisy = picture / 255 + 0.2 * np.random.default_rng(1).normal(size=shape)
    assert np.array_equal(read_image_bits(noisy, 10), bits)


def test_a_qr_code_comes_back_and_one_that_does_not_fit_is_one_line() -> None:
    picture = make_qr_image("https://acme.example", (1, 64, 64))
    modules = 1 - np.array([list(r) for r in segno.make_qr("https://acme.example").matrix])
    size = len(modules) + 2  # its light rim
    assert np.array_equal(read_image_bits(picture / 255, size)[1:-1, 1:-1], modules)
    with pytest.raises(ConfigError, match="give a shorter text or a larger side"):
        make_qr_image("https://acme.example", (1, 32, 32))
    with pytest.raises(ConfigError, match="too long for any QR code"):
        make_qr_image("x" * 5000, (1, 64, 64))


def test_every_kind_of_picture_can_be_hidden(tmp_path: Path) -> None:
    (tmp_path / "logo.png").write_bytes(encode_png(barriers.images()[0]))
    for picture in ("", f"{tmp_path}/logo.png", "qr:A"):
        scheme = barriers.scheme(as_published=True, picture=picture, channels=3, side=64)
        hidden = make_hidden_image(scheme, barriers.SECRET)
        assert (hidden.shape, hidden.dtype) == ((3, 64, 64), np.uint8)
    drawn = make_hidden_image(barriers.scheme(), barriers.SECRET) / 255
    assert compute_correlation(np.ones_like(drawn), drawn) < 0.85  # a blank is not like it
