"""Keys that read thousands of tensors: their names are packed, and both forms open."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from countermark.errors import KeyFileError
from countermark.keys import storage
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.storage import load_header
from countermark.schemes.stamp.scheme import Stamp

NAMES = [
    f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
    for layer in range(6)
    for expert in range(100)
    for part in ("down", "gate", "up")
]
SHAPES = dict.fromkeys(NAMES, (16, 16))


def make_key(names: list[str] | None = None) -> Key:
    names = NAMES if names is None else names
    scheme = Stamp(tuple(names), 128)
    return scheme.generate_key(
        dict.fromkeys(names, (16, 16)), owner="ACME Inc.", material=KeyMaterial.from_test_seed(1)
    )


@pytest.mark.parametrize("passphrase", [None, "a long one"])
def test_a_key_of_many_tensors_is_small_and_opens(tmp_path: Path, passphrase: str | None) -> None:
    key = make_key()
    key.save(tmp_path / "many.key", passphrase)
    assert (tmp_path / "many.key" / "key.json").stat().st_size < 20 * len(NAMES)
    found = Key.load(tmp_path / "many.key", passphrase)
    assert list(found.tensors.items()) == list(key.tensors.items())
    assert found.fields == key.fields
    assert found.commitment == key.commitment
    assert load_header(tmp_path / "many.key").tensors == {n: [16, 16] for n in NAMES}


@pytest.mark.parametrize("passphrase", [None, "a long one"])
def test_names_that_an_earlier_version_listed_in_full_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passphrase: str | None
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(storage, "_MOST_LISTED", 1 << 20)
        make_key().save(tmp_path / "listed.key", passphrase)
    assert NAMES[-1] in (tmp_path / "listed.key" / "key.json").read_text()
    assert Key.load(tmp_path / "listed.key", passphrase).commitment == make_key().commitment


def test_few_names_stay_readable(tmp_path: Path) -> None:
    make_key(NAMES[:3]).save(tmp_path / "few.key")
    assert json.loads((tmp_path / "few.key" / "key.json").read_text())["tensors"] == {
        name: [16, 16] for name in NAMES[:3]
    }


def pack(content: bytes) -> str:
    return "zlib+base64:" + base64.b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        ("zlib+base64:AAAA", "packed text is damaged"),
        (pack(b"[") [:-8] + "AAAA", "packed text is"),
        ("zlib+base64:!", "Only base64"),
        (pack(b'{"a":' + b" " * (1 << 26) + b"[1]}"), "unpacks to more than"),
        (pack(b'{"a":[1],"a":[2]}'), "stands twice"),
        (pack(b'["a"]'), "tensors"),
    ],
    ids=["no zlib", "cut", "no base64", "bomb", "a name twice", "a list"],
)  # fmt: skip
def test_packed_names_are_hostile_input(tmp_path: Path, packed: str, says: str) -> None:
    make_key(NAMES[:3]).save(tmp_path / "bad.key")
    path = tmp_path / "bad.key" / "key.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tensors": packed}))
    with pytest.raises(KeyFileError, match=says):
        Key.load(tmp_path / "bad.key")


@pytest.mark.parametrize("text", ["zlib+base64:AAAA", pack(b'["a"]')])
def test_a_field_that_would_be_unpacked_is_refused_when_it_is_saved(
    tmp_path: Path, text: str
) -> None:
    key = replace(make_key(NAMES[:3]), fields={"layer": NAMES[:3], "bits": 128, "text": text})
    with pytest.raises(KeyFileError, match="could not be read again"):
        key.save(tmp_path / "text.key")
    assert not (tmp_path / "text.key").exists()


def test_more_tensors_than_a_key_may_list_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_MOST_TENSORS", 100)
    with pytest.raises(KeyFileError, match="1,800 tensors: expected at most 100"):
        make_key().save(tmp_path / "many.key")
    assert not (tmp_path / "many.key").exists()
