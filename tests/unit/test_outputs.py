"""Folders of published images as suspects: hostile files are skipped, counted, and sway nothing."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import barriers
from countermark.errors import ConfigError, SuspectError
from countermark.images.image_files import encode_png
from countermark.images.image_folder import ImageFolder
from countermark.results.verdict import VerificationOptions
from countermark.verification import image_sets
from countermark.verification.image_sets import mark_folder, read_folder
from countermark.verification.verify import examine, verify


def bomb(width: int = 60_000) -> bytes:
    """A PNG of a few bytes that claims billions of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, width, 8, 0, 0, 0, 0)
    rest = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest


def encoded(image: PIL.Image.Image, kind: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def sixteen_bit_colour() -> bytes:
    """A PNG of 16 bits a channel, which pillow cannot write and reads as 8."""
    rows = b"".join(b"\0" + bytes(6 * 32) for _ in range(32))
    png = bomb(32).replace(struct.pack(">IIBB", 32, 32, 8, 0), struct.pack(">IIBB", 32, 32, 16, 2))
    start = png.index(b"IHDR")
    body = png[start : start + 17]
    png = png[: start + 17] + struct.pack(">I", zlib.crc32(body))
    for kind, content in ((b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + kind + content
        png += struct.pack(">I", zlib.crc32(kind + content))
    return png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Plain pictures of many kinds, and files that are none."""
    random = np.random.default_rng(0)
    grey = PIL.Image.fromarray(random.integers(0, 256, (40, 36), dtype=np.uint8))
    png = encoded(grey, "PNG")
    frames = [PIL.Image.new("L", (32, 32), level) for level in (0, 200)]
    files = {
        "a/grey.png": png,
        "a/colour.webp": encoded(grey.convert("RGB"), "WEBP"),
        "palette.gif": encoded(grey.convert("P"), "GIF"),
        "x_truncated.png": png[: len(png) // 2],
        "x_text.jpg": b"no picture at all",
        "x_empty.png": b"",
        "x_bomb.png": bomb(),
        "x_smaller_bomb.png": bomb(9000),
        "x_sixteen.png": encoded(grey.convert("I").point(lambda v: v * 256).convert("I;16"), "PNG"),
        "x_sixteen_colour.png": sixteen_bit_colour(),
        "x_cmyk.jpg": encoded(grey.convert("CMYK"), "JPEG"),
        "x_animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "x_pages.tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "x_tiny.png": encoded(grey.resize((8, 40)), "PNG"),
        "notes.txt": b"not called like a picture",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "x_pipe.png")
    return tmp_path


REASONS = {
    "x_truncated.png": "truncated or damaged",
    "x_text.jpg": "no picture that can be read",
    "x_empty.png": "no picture that can be read",
    "x_bomb.png": "too many pixels",
    "x_smaller_bomb.png": "too many pixels",
    "x_sixteen.png": "pixel mode 'I;16'",
    "x_sixteen_colour.png": "16 bits a channel",
    "x_cmyk.jpg": "pixel mode 'CMYK'",
    "x_animated.gif": "several frames",
    "x_pages.tiff": "several frames",
    "x_tiny.png": "a side below 16 pixels",
    "x_pipe.png": "not a regular file",
}


def test_what_is_no_plain_picture_is_skipped_with_its_reason(folder: Path) -> None:
    found = {each.name: each for each in ImageFolder(folder, 16).read()}
    assert sorted(n for n, e in found.items() if e.picture is not None) == [
        "a/colour.webp", "a/grey.png", "palette.gif"
    ]  # fmt: skip
    for name, reason in REASONS.items():
        assert reason in found[name].reason, (name, found[name].reason)
    assert found.keys() == REASONS.keys() | {"a/colour.webp", "a/grey.png", "palette.gif"}


def test_a_verdict_counts_what_was_skipped(folder: Path) -> None:
    verdict = verify(folder, barriers.untrained())
    assert (verdict.subject.images, verdict.outcome) == (3, "not_proven")
    assert sum(verdict.subject.skipped.reasons.values()) == len(REASONS)
    assert "12 skipped" in verdict.explain()
    assert "NC  " in verdict.explain()


def test_bad_files_do_not_sway_a_reading(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    clean = tmp_path_factory.mktemp("clean")
    for name in ("grey.png", "colour.webp"):
        (clean / name).write_bytes((folder / "a" / name).read_bytes())
    (clean / "palette.gif").write_bytes((folder / "palette.gif").read_bytes())
    key = barriers.untrained()
    one, other = verify(folder, key), verify(clean, key)
    assert (one.matched, one.log10_p) == (other.matched, other.log10_p)
    assert one.subject.sha256 != other.subject.sha256


def test_nothing_to_read_is_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    verdict = verify(tmp_path, barriers.untrained())
    assert (verdict.outcome, verdict.exit_code) == ("no_verdict", 3)
    assert "no image that could be read" in verdict.reason


def test_a_folder_without_pictures_is_one_line(tmp_path: Path) -> None:
    for suspect in (tmp_path, tmp_path / "missing", __file__):
        with pytest.raises(SuspectError) as caught:
            verify(suspect, barriers.untrained())
        assert "\n" not in str(caught.value)
    with pytest.raises(SuspectError, match="expected a folder of pictures"):
        verify(42, barriers.untrained())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected an image uint8"):
        verify([np.zeros((32, 32), dtype=np.uint8)], barriers.untrained())


class StoppedError(Exception):
    pass


def test_an_interrupted_reading_goes_on(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, state = barriers.untrained(), tmp_path_factory.mktemp("state") / "reading.json"
    scheme = barriers.scheme(steps=1)
    whole = read_folder(folder, scheme, key)
    monkeypatch.setattr(image_sets, "_SECONDS", -1.0)
    taken, take = [], image_sets._FolderReading.take

    def some(self: image_sets._FolderReading, output: object) -> None:
        if len(taken) == 5:
            raise StoppedError
        taken.append(output)
        take(self, output)  # type: ignore[arg-type]

    monkeypatch.setattr(image_sets._FolderReading, "take", some)
    with pytest.raises(StoppedError):
        read_folder(folder, scheme, key, resume=state)
    assert state.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(image_sets._FolderReading, "take", take)
    other = barriers.untrained(barriers.KeyMaterial(bytes(32), bytes(16)))
    with pytest.raises(ConfigError, match="of another key"):
        read_folder(folder, scheme, other, resume=state)
    first = sorted(folder.rglob("*.png"))[0]
    content = first.read_bytes()
    first.write_bytes(content + b"\0")  # as a folder of somebody else's that is called alike
    with pytest.raises(ConfigError, match="these names and other contents"):
        read_folder(folder, scheme, key, resume=state)
    first.write_bytes(content)
    found = read_folder(folder, scheme, key, resume=state)
    assert found.evidence is not None
    assert whole.evidence is not None
    assert np.array_equal(found.evidence.read, whole.evidence.read)
    assert (found.images, found.digest) == (whole.images, whole.digest)
    assert found.skipped.reasons == whole.skipped.reasons
    assert not state.exists()
    state.write_text('{"type": "something"}')
    with pytest.raises(ConfigError, match="expected an interrupted reading"):
        examine(folder, key, VerificationOptions(), resume=state)


def resident() -> int:
    """Bytes of memory in use."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is asked of /proc")
def test_ten_thousand_images_take_no_more_memory_than_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for number in range(10_000):
        image = random.integers(0, 256, (1, 32, 32), dtype=np.uint8)
        (tmp_path / f"{number:05}.png").write_bytes(encode_png(image))
    used, take = [], image_sets._FolderReading.take

    def watched(self: image_sets._FolderReading, output: object) -> None:
        take(self, output)  # type: ignore[arg-type]
        if self.next in (500, 10_000):
            used.append(resident())

    monkeypatch.setattr(image_sets._FolderReading, "take", watched)
    found = read_folder(tmp_path, barriers.scheme(steps=1), barriers.untrained())
    assert found.images == 10_000
    assert used[1] - used[0] < 30_000_000


def test_a_folder_is_marked_and_what_is_there_is_kept(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out, key = tmp_path_factory.mktemp("out"), barriers.key()
    (out / "a").mkdir()
    (out / "a" / "grey.png.png").write_bytes(encode_png(barriers.images()[0]))
    marked, skipped = mark_folder(folder, barriers.scheme(), key, out)
    assert (marked, sum(skipped.reasons.values())) == (3, len(REASONS))
    assert (out / "a" / "grey.png.png").read_bytes() == encode_png(barriers.images()[0])
    with PIL.Image.open(out / "palette.gif.png") as marked_one:
        assert marked_one.size == (36, 40)
