"""Keys are hostile input: edited, truncated, enormous, nested, or never made by any scheme."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keys import known_key, mutated, one_line
from safetensors.numpy import save

from countermark.errors import CountermarkError, KeyFileError
from countermark.keys.key import Key
from countermark.keys.storage import load_header

KEY = known_key()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    KEY.save(tmp_path / "a.key")
    return tmp_path / "a.key"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header = json.loads((folder / "key.json").read_bytes())
    change(header)
    (folder / "key.json").write_text(json.dumps(header))


def put_tensors(folder: Path, tensors: bytes) -> None:
    (folder / "key.safetensors").write_bytes(tensors)
    edit(folder, lambda h: h.update(tensors_sha256=hashlib.sha256(tensors).hexdigest()))


def refused(folder: Path) -> str:
    with pytest.raises(KeyFileError) as caught:
        Key.load(folder)
    return one_line(caught.value)


# --- one edit of key.json at a time

EDITS: Mapping[str, tuple[object, str]] = {
    "type": ("countermark/key/v2", "type: "),
    "scheme": ("uchidb", "C0"),
    "owner": ("ACME Inc", "C0"),
    "nonce": ("00" * 16, "C0"),
    "C0": ("00" * 32, "C0"),
    "C1": ("00" * 32, "C1"),
    "tensors_sha256": ("00" * 32, "not the file that key.json describes"),
    "test_key": (False, "C0"),
    "encryption": ({}, "encryption."),
    "tensors": ({"fc.weight": [32, 16]}, "C0"),
    "fields": ({}, "C0"),
}
FREE = {"model": "vgg16", "model_arguments": {"width": 1}, "version": "9.9.9"}


def test_every_field_is_edited_here(folder: Path) -> None:
    assert set(json.loads((folder / "key.json").read_bytes())) == set(EDITS) | set(FREE)


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_field_is_refused(folder: Path, name: str) -> None:
    value, said = EDITS[name]
    edit(folder, lambda header: header.update({name: value}))
    assert said in refused(folder)


@pytest.mark.parametrize("name", KEY.fields)
def test_an_edited_field_of_the_scheme_is_refused(folder: Path, name: str) -> None:
    value = KEY.fields[name]
    other = value + 1 if type(value) in (int, float) else not value
    edit(folder, lambda header: header["fields"].update({name: other}))
    assert "C0" in refused(folder)
    edit(folder, lambda header: header["fields"].pop(name))
    assert "C0" in refused(folder)


@pytest.mark.parametrize("name", [*EDITS, *FREE])
def test_a_missing_field_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda header: header.pop(name))
    assert f"{name}: Field required" in refused(folder)


@pytest.mark.parametrize("name", [*EDITS, *FREE])
def test_a_field_of_another_type_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda header: header.update({name: [["wrong"]]}))
    assert f"{name}" in refused(folder)


@pytest.mark.parametrize("name", FREE)
def test_what_is_not_committed_changes_no_reading(folder: Path, name: str) -> None:
    """docs/format.md says so: the host's name and the writer's version say nothing of the mark."""
    edit(folder, lambda header: header.update({name: FREE[name]}))
    loaded = Key.load(folder)
    assert (loaded.c0, loaded.material) == (KEY.c0, KEY.material)
    assert replace(loaded, model=None, model_arguments={}) == KEY


def test_another_spelling_of_a_number_is_the_same_key(folder: Path) -> None:
    edit(folder, lambda header: header["fields"].update(margin=1, bits=256.0))
    assert Key.load(folder) == KEY


@pytest.mark.parametrize("name", ["colour", "a\nb\x1b[2J", "C2", "", "x" * 5000])
def test_an_unknown_field_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda header: header.update({name: 1}))
    said = refused(folder)
    assert "Extra inputs are not permitted" in said or len(name) > 100
    assert name.encode("unicode_escape").decode()[:100] in said


@pytest.mark.parametrize("at", ["{", '"fields": {'])
def test_a_name_that_stands_twice_is_refused(folder: Path, at: str) -> None:
    """Parsers disagree which of the two counts: people could read another owner than we do."""
    path = folder / "key.json"
    name = {"{": '"owner": "Mallory",', '"fields": {': '"bits": 1,'}[at]
    path.write_text(path.read_text().replace(at, at + name, 1))
    assert "stands twice" in refused(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"type": NaN}',
        b'{"type": ' + b"9" * 5000 + b"}",
        b'{"fields": {"bits": 1e999}}',
        '{"type": "\ud800"}'.encode("utf-8", "surrogatepass"),
        b'{"type": "\\ud800"}',
        b" " * ((1 << 20) + 1),
    ],
    ids=range(13),
)
def test_what_is_no_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / "key.json").write_bytes(content)
    refused(folder)
    with pytest.raises(KeyFileError):
        load_header(folder)


@pytest.mark.parametrize("value", ["NaN", "1e999", "-Infinity", "1e400", "9" * 20, "9" * 5000])
@pytest.mark.parametrize("where", ['"fields": {', '"model_arguments": {'])
def test_a_number_without_canonical_json_is_refused(folder: Path, value: str, where: str) -> None:
    path = folder / "key.json"
    comma = "," if "fields" in where else ""
    path.write_text(path.read_text().replace(where, f'{where}"x": {value}{comma}', 1))
    refused(folder)


# --- damaged files


@pytest.mark.parametrize("name", ["key.json", "key.safetensors"])
def test_a_file_truncated_anywhere_is_refused(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for length in range(0, len(whole) - 1, 16):
        (folder / name).write_bytes(whole[:length])
        refused(folder)
        if name == "key.safetensors":
            put_tensors(folder, whole[:length])
            refused(folder)


@pytest.mark.parametrize("name", ["key.json", "key.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refused(folder)
    (folder / name).mkdir()
    assert name in refused(folder)


def test_a_folder_that_is_none_is_refused(folder: Path) -> None:
    refused(folder / "key.json")
    refused(folder / "nowhere")


@pytest.mark.parametrize(("name", "size"), [("key.json", 1 << 26), ("key.safetensors", 1 << 33)])
def test_a_giant_file_is_refused_without_reading_it(folder: Path, name: str, size: int) -> None:
    os.truncate(folder / name, size)
    tracemalloc.start()
    try:
        assert f"{size:,} bytes" in refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="special files of POSIX")
@pytest.mark.parametrize("name", ["key.json", "key.safetensors"])
def test_special_files_are_refused_and_never_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "not a regular file" in refused(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a regular file" in refused(folder)


def test_a_file_that_changes_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def grown(path: Path, mode: str) -> Any:
        with real(path, "ab") as file:
            file.write(b" ")
        return real(path, mode)

    monkeypatch.setattr(Path, "open", grown)
    assert "changed while it was read" in refused(folder)


SECRET = np.frombuffer(KEY.material.secret, dtype=np.uint8)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "no secret"),
        ({"ciphertext": SECRET}, "no secret"),
        ({"secret": SECRET[:31]}, "no secret"),
        ({"secret": SECRET.reshape(1, 32)}, "no secret"),
        ({"secret": SECRET.view(np.int8)}, "no secret"),
        ({"secret": SECRET.view(np.float64)}, "no secret"),
        ({"secret": SECRET, "note\n": SECRET}, "note"),
        ({"secret": SECRET, "frozen": SECRET}, "frozen"),
        ({"secret": SECRET, "frozen.mask.fc.weight": SECRET}, "C0"),
        ({"secret": SECRET ^ 1}, "C0"),
    ],
)
def test_other_tensors_are_refused(folder: Path, tensors: dict[str, Any], said: str) -> None:
    put_tensors(folder, save(tensors))
    assert said in refused(folder)


@cache
def saved_key() -> dict[str, bytes]:
    with TemporaryDirectory() as place:
        KEY.save(Path(place) / "a.key")
        return {path.name: path.read_bytes() for path in (Path(place) / "a.key").iterdir()}


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(["key.json", "key.safetensors"]),
    consistent=st.booleans(),
    seed=st.integers(0, 1 << 32),
    changes=st.integers(1, 8),
)
def test_random_damage_is_refused_or_without_effect(
    folder: Path, name: str, consistent: bool, seed: int, changes: int
) -> None:
    for each, whole in saved_key().items():
        (folder / each).write_bytes(whole)
    damaged = mutated(saved_key()[name], random.Random(seed), changes)  # noqa: S311
    if consistent and name == "key.safetensors":
        put_tensors(folder, damaged)
    else:
        (folder / name).write_bytes(damaged)
    try:
        loaded = Key.load(folder)
    except CountermarkError as error:
        one_line(error)
    else:
        assert (loaded.c0, loaded.material) == (KEY.c0, KEY.material)
        assert replace(loaded, model=None, model_arguments={}) == KEY
