"""Opened triggers come from whoever: edited, truncated, enormous, nested, or of no form at all."""

from __future__ import annotations

import base64
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from keys import mutated, one_line
from opened import OPENED, changed, key, refused

from countermark.errors import ConfigError, CountermarkError, KeyFileError
from countermark.verification.disclosure import TriggerDisclosure

BAD: list[tuple[tuple[Any, ...], Any, str]] = [
    (("type",), "countermark/openings/v2", "type: Input should be 'countermark/openings/v1'"),
    (("type",), "countermark/key/v1", "type: "),
    (("colour",), 1, "colour: Extra inputs are not permitted"),
    (("context", "colour\n\x1b"), 1, "context.colour\\n\\x1b: Extra inputs"),
    (("context", "tensors"), {}, "context.tensors"),
    (("context", "fields"), [], "context.fields"),
    (("context", "test_key"), 0, "context.test_key"),
    (("opened", 0, "colour"), 1, "opened.0.colour: Extra inputs"),
    (("opened", 0, "index"), -1, "opened.0.index"),
    (("opened", 0, "index"), 1 << 16, "opened.0.index"),
    (("opened", 0, "index"), True, "opened.0.index"),
    (("opened", 0, "index"), 0.0, "opened.0.index"),
    (("opened", 0, "index"), 3, "ascending order, none of them twice"),
    (("opened", 2, "index"), 2, "ascending order, none of them twice"),
    (("opened", 0, "salt"), "00" * 31, "opened.0.salt"),
    (("opened", 0, "salt"), "A" * 64, "opened.0.salt"),
    (("opened", 0, "salt"), "a" * 64 + "\n", "opened.0.salt"),
    (("opened", 0, "path"), ["00" * 32] * 17, "opened.0.path"),
    (("opened", 0, "path", 0), "00" * 33, "opened.0.path.0"),
    (("opened", 0, "image"), None, "opened.0.image"),
    (("opened",), [], "opened"),
    (("opened",), {}, "opened"),
    (("shape",), [3, 4], "shape"),
    (("shape", 0), 0, "shape.0"),
    (("shape", 0), 1 << 41, "shape.0"),
    (("frozen", 0), "x", "frozen.0"),
    (("nonce",), "00" * 15, "nonce"),
    (("owner",), None, "owner"),
]


@pytest.mark.parametrize(("path", "to", "said"), BAD, ids=range(len(BAD)))
def test_a_field_that_is_wrong_is_named(
    tmp_path: Path, path: tuple[Any, ...], to: Any, said: str
) -> None:
    document = json.loads(OPENED.to_bytes())
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    assert said in unreadable(tmp_path, json.dumps(document).encode())


def unreadable(folder: Path, content: bytes) -> str:
    file = folder / "o.json"
    file.write_bytes(content)
    with pytest.raises(KeyFileError) as caught:
        TriggerDisclosure.load(file)
    said = one_line(caught.value)
    assert "expected a file of type countermark/openings/v1" in said
    return said


@pytest.mark.parametrize("name", json.loads(OPENED.to_bytes()))
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    document = json.loads(OPENED.to_bytes())
    document.pop(name)
    assert f"{name}: Field required" in unreadable(tmp_path, json.dumps(document).encode())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"null", "the file: Input should be an object"),
        (b"\xff", "decode"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"type": "countermark/openings/v1", "type": "x"}', "'type' stands twice"),
        (b'{"type": NaN}', "NaN is no JSON number"),
        (OPENED.to_bytes().replace(b'"fields":{', b'"fields":{"classes":2,', 1), "stands twice"),
        (OPENED.to_bytes().replace(b"ACME", b"\\ud800", 1), "o.json: "),
    ],
    ids=range(8),
)
def test_what_is_no_opening_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in unreadable(tmp_path, content)


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 11)
    monkeypatch.setattr("countermark.verification.disclosure._LARGEST", 10)
    for name, said in (
        ("absent", "it cannot be read (No such file"),
        (".", "it is not a regular file"),
        ("pipe", "it is not a regular file"),
        ("large", "it has more than 10 bytes"),
    ):
        with pytest.raises(KeyFileError) as caught:
            TriggerDisclosure.load(tmp_path / name)
        assert said in one_line(caught.value)


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ([3, 4, 5], "AAAA"),
        ([3, 4, 5], ""),
        ([3, 4, 5], "*" * 80),
        ([3, 4, 5], base64.b64encode(bytes(61)).decode()),
        ([3, 4, 5], base64.b64encode(bytes(60)).decode() + "\n"),
        ([1, 1, 1], "AB=="),  # one byte, and bits behind it that are not 0
        ([1 << 40] * 3, ""),  # their product is 0 modulo 2^64
    ],
    ids=range(7),
)
def test_an_image_of_another_size_or_spelling_is_refused(shape: list[int], image: str) -> None:
    forged = changed(changed(OPENED, "opened", 0, "image", to=image), "shape", to=shape)
    assert "the image of trigger 0 is not" in refused(forged, forged.commitment)


def test_numbers_without_canonical_json_are_refused() -> None:
    for value in (1 << 60, [1 << 80]):
        refused(changed(OPENED, "context", "fields", "mean", to=value))


def test_damage_is_an_error_of_one_line_or_changes_nothing(tmp_path: Path) -> None:
    drawn, file, content = random.Random(3), tmp_path / "o.json", OPENED.to_bytes()  # noqa: S311
    expected = [(each.index, each.label) for each in OPENED.check()]
    for changes in range(300):
        file.write_bytes(mutated(content, drawn, 1 + changes % 5))
        try:
            found = TriggerDisclosure.load(file).check(key().commitment)
        except CountermarkError as error:
            one_line(error)
        else:
            assert {(each.index, each.label) for each in found} <= set(expected)


def test_it_is_never_written_over_anything_and_never_too_large_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "link").symlink_to("gone")
    for name in ("file", "link", "."):
        with pytest.raises(ConfigError, match="exists: choose another name"):
            OPENED.save(tmp_path / name)
    monkeypatch.setattr("countermark.verification.disclosure._LARGEST", 100)
    with pytest.raises(ConfigError, match="open them in several files"):
        OPENED.save(tmp_path / "large")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
