"""The logo: any picture becomes pixels or bits; what is no picture is refused in one line."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from stego_keys import digits, host, made, scheme

from countermark.errors import ConfigError, MissingExtraError
from countermark.keys.key import Key
from countermark.schemes import load_scheme
from countermark.schemes import logo as module
from countermark.schemes.logo import (
    average_areas,
    draw_emblem,
    load_logo_bits,
    load_logo_pixels,
    read_logo,
)


def picture(folder: Path, pixels: NDArray[np.uint8], mode: str | None = None) -> str:
    """A PNG file of pixels (H, W) or (H, W, channels)."""
    path = folder / "logo.png"
    image = PIL.Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return str(path)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


# --- area means


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (7, 13), (100, 3), (40, 60)])
def test_an_area_mean_is_the_mean_over_finer_pixels(height: int, width: int) -> None:
    """Against a second definition: repeat each pixel, then cut into equal whole blocks."""
    drawn = noise(3, 20, 30)
    fine = np.repeat(np.repeat(drawn.astype(float), height, axis=1), width, axis=2)
    expected = fine.reshape(3, height, 20, width, 30).mean(axis=(2, 4))
    assert np.allclose(average_areas(drawn, height, width), expected, atol=1e-3)


def test_a_picture_of_the_right_size_stays_as_it_is(tmp_path: Path) -> None:
    pixels = noise(32, 24, 3)
    found = load_logo_pixels(picture(tmp_path, pixels), (3, 32, 24))
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels.transpose(2, 0, 1))


# --- pixels


def test_the_drawn_logo_has_three_paints() -> None:
    drawn = draw_emblem()
    assert drawn.shape == (3, 96, 96)
    assert len(np.unique(drawn.reshape(3, -1), axis=1).T) == 3
    assert np.array_equal(drawn, draw_emblem())


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 8, 40), (4, 16, 16)])
def test_every_shape_of_covers_gets_a_logo_with_contrast(shape: tuple[int, int, int]) -> None:
    found = load_logo_pixels("", shape)
    assert found.shape == shape
    assert np.ptp(found.astype(int), axis=(1, 2)).min() > 60


def test_colour_becomes_grey_by_its_luma_and_grey_stands_in_each_channel(tmp_path: Path) -> None:
    pixels = noise(28, 28, 3)
    grey = np.asarray(PIL.Image.fromarray(pixels).convert("L"))
    assert (
        np.abs(load_logo_pixels(picture(tmp_path, pixels), (1, 28, 28))[0] - grey.astype(int)).max()
        <= 1
    )
    found = load_logo_pixels(picture(tmp_path, grey), (3, 28, 28))
    assert all(np.array_equal(each, grey) for each in found)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)  # black on nothing
    pixels[2:6, 2:6, 3] = 255
    found = load_logo_pixels(picture(tmp_path, pixels, mode), (1, 8, 8))[0]
    assert found[0, 0] == 255
    assert found[3, 3] == 0


def test_a_transparent_palette_is_white_as_well(tmp_path: Path) -> None:
    image = PIL.Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.save(tmp_path / "logo.png", transparency=1)
    assert (load_logo_pixels(str(tmp_path / "logo.png"), (3, 8, 8)) == 255).all()


# --- bits


def test_bits_are_split_at_the_median(tmp_path: Path) -> None:
    levels = np.random.default_rng(4).permutation(64).reshape(8, 8) * 4
    pixels = np.repeat(np.repeat(levels, 5, axis=0), 7, axis=1).astype(np.uint8)
    bits = load_logo_bits(picture(tmp_path, pixels))
    assert np.array_equal(bits, levels > np.median(levels))
    assert (bits.sum(), bits.dtype) == (32, np.uint8)


@pytest.mark.parametrize("ground", [0, 255])
def test_few_parts_on_a_plain_ground_are_kept_apart(tmp_path: Path, ground: int) -> None:
    pixels = np.full((64, 64), ground, dtype=np.uint8)
    pixels[8:24, 8:24] = 255 - ground
    bits = load_logo_bits(picture(tmp_path, pixels))
    inside = np.zeros((8, 8), dtype=bool)
    inside[1:3, 1:3] = True
    assert np.array_equal(bits == 1, inside if ground == 0 else ~inside)


def test_a_logo_of_one_colour_has_no_bits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one grey level in 8 x 8 parts: expected a picture with"):
        load_logo_bits(picture(tmp_path, np.full((20, 20), 77, dtype=np.uint8)))


# --- hostile files


def claiming(side: int) -> bytes:
    """A PNG of a few bytes whose header claims side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 9)
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


HOSTILE = {
    "empty": (b"", "got: no such"),
    "text": (b"IEEE" * 40, "got: no such"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "got: no such"),
    "too many pixels": (claiming(8001), "the limit is 64,000,000"),
    "a bomb": (claiming(60_000), "decompression bomb"),
    "cut off": (claiming(16), "got: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_is_one_line(tmp_path: Path, name: str) -> None:
    content, says = HOSTILE[name]
    path = tmp_path / "logo.png"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_logo(str(path))
    assert says in str(caught.value)
    assert "expected a picture file such as PNG" in str(caught.value)
    assert "give another, or leave logo out" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "object at" not in str(caught.value)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("pipe", "no regular file"),
        (".", "no regular file"),
        ("x", "No such file"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_logo(str(tmp_path / name))
    with pytest.raises(ConfigError, match="null"):
        read_logo("a\0b")


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    with pytest.raises(ConfigError, match="bytes, the limit is 10"):
        read_logo(picture(tmp_path, noise(8, 8)))


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match="reading a logo"):
        read_logo("logo.png")
    assert load_logo_pixels("", (3, 8, 8)).shape == (3, 8, 8)  # the drawn one needs nothing


# --- in a scheme


def test_a_mark_with_a_bad_logo_does_not_begin(tmp_path: Path) -> None:
    data = digits()
    with pytest.raises(ConfigError, match="expected a picture file such as PNG"):
        scheme(logo=str(tmp_path / "none.png")).embed(
            host(), owner="ACME Inc.", covers=data.train_images, labels=data.train_labels
        )


def test_the_bits_of_a_file_are_frozen_and_the_file_is_not_needed_again(tmp_path: Path) -> None:
    path = picture(tmp_path, noise(40, 40))
    drawn, taken = made(stego_steps=1), made(stego_steps=1, logo=path)
    assert np.array_equal(taken.frozen["logo"], load_logo_bits(path))
    assert not np.array_equal(drawn.frozen["logo"], taken.frozen["logo"])
    assert drawn.c0 != taken.c0
    Path(path).unlink()
    taken.save(tmp_path / "acme.key")
    assert load_scheme(Key.load(tmp_path / "acme.key")).name == "deepstego"
