"""Keys on disk: saved whole or not at all, never over anything, readable again, encrypted."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from keys import known_key, one_line
from safetensors.numpy import load, save

from countermark._internal import files
from countermark.errors import ConfigError, KeyFileError
from countermark.keys import storage
from countermark.keys.key import Key
from countermark.keys.storage import load_header

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="permissions and special files of POSIX")
PASSPHRASE = "correct horse"


def masked_key() -> Key:
    """A key that has everything a key can have."""
    mask = np.arange(512, dtype=np.uint8) % 3
    return replace(known_key(), frozen={"mask.fc.weight": mask, "µ": np.array(2.5)}).with_model(
        "mlp", {"width": 64}
    )


def same(one: Key, other: Key) -> bool:
    frozen = one.frozen.keys() == other.frozen.keys() and all(
        np.array_equal(one.frozen[name], other.frozen[name])
        and one.frozen[name].dtype == other.frozen[name].dtype
        for name in one.frozen
    )
    return frozen and one == other and one.c0 == other.c0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- saved and loaded


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE, " ünïcode 🔑 "])
def test_a_loaded_key_is_the_saved_one(tmp_path: Path, passphrase: str | None) -> None:
    key = masked_key()
    key.save(tmp_path / "a.key", passphrase)
    assert sorted(content(tmp_path / "a.key")) == ["key.json", "key.safetensors"]
    loaded = Key.load(str(tmp_path / "a.key"), passphrase)
    assert same(key, loaded)
    assert np.array_equal(key.message, loaded.message)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.key"]


def test_a_second_save_is_byte_equal(tmp_path: Path) -> None:
    masked_key().save(tmp_path / "a.key")
    Key.load(tmp_path / "a.key").save(tmp_path / "b.key")
    assert content(tmp_path / "a.key") == content(tmp_path / "b.key")


def test_a_second_encryption_shares_no_salt_nor_nonce(tmp_path: Path) -> None:
    headers = []
    for name in ("a.key", "b.key"):
        known_key().save(tmp_path / name, PASSPHRASE)
        headers.append(load_header(tmp_path / name).encryption)
    one, other = headers
    assert one is not None
    assert other is not None
    assert one.salt != other.salt
    assert one.nonce != other.nonce


def test_the_header_is_read_without_the_passphrase(tmp_path: Path) -> None:
    known_key().save(tmp_path / "a.key", PASSPHRASE)
    header = load_header(tmp_path / "a.key")
    assert known_key().commitment == header.C0
    assert header.owner == "ACME Inc."


@POSIX
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_their_owner_can_read_the_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        known_key().save(tmp_path / "a.key")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"a.key": 0o700, "key.json": 0o600, "key.safetensors": 0o600}


# --- never over anything, never half


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    def look() -> list[tuple[str, int, bytes]]:
        return [
            (str(path), path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted(folder.rglob("*"))
        ]

    before = look()
    yield
    assert look() == before


@pytest.mark.parametrize("what", ["key", "folder", "file", "dangling"])
def test_an_existing_name_is_refused_and_untouched(tmp_path: Path, what: str) -> None:
    place = tmp_path / "a.key"
    {
        "key": lambda: replace(known_key(), owner="Somebody").save(place),
        "folder": place.mkdir,
        "file": lambda: place.write_bytes(b"precious"),
        "dangling": lambda: place.symlink_to(tmp_path / "nowhere"),
    }[what]()
    with unchanged(tmp_path):
        with pytest.raises(KeyFileError, match="never overwritten") as caught:
            known_key().save(place)
        one_line(caught.value)
        with pytest.raises(FileExistsError):
            files.write_folder(place, {"key.json": b""})


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_write_that_fails_leaves_a_whole_key_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        known_key().save(tmp_path / "a.key")
    if failing < 4:
        assert list(tmp_path.iterdir()) == []
    else:  # the folder was renamed whole before its parent could not be synced
        assert list(tmp_path.iterdir()) == [tmp_path / "a.key"]
        assert same(Key.load(tmp_path / "a.key"), known_key())


def test_an_empty_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="empty passphrase"):
        known_key().save(tmp_path / "a.key", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), 2**53, 10**400])
def test_what_has_no_canonical_json_is_never_written(tmp_path: Path, value: object) -> None:
    key = known_key().with_model("mlp", {"width": value})
    with pytest.raises(KeyFileError, match="canonical JSON") as caught:
        key.save(tmp_path / "a.key")
    one_line(caught.value)
    with pytest.raises(ConfigError, match="committed") as refused:
        _ = replace(known_key(), fields={"bits": 256, "x": value}).c0
    one_line(refused.value)
    assert list(tmp_path.iterdir()) == []


# --- encryption


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encrypted") / "a.key"
    masked_key().save(folder, PASSPHRASE)
    return folder


def test_too_little_memory_is_said_in_words(
    encrypted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def derive(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(storage, "Argon2id", lambda **_: SimpleNamespace(derive=derive))
    with pytest.raises(KeyFileError, match="65,536 KiB of memory") as caught:
        Key.load(encrypted, PASSPHRASE)
    one_line(caught.value)


def test_more_than_the_ciphertext_is_refused(encrypted: Path, tmp_path: Path) -> None:
    header = json.loads((encrypted / "key.json").read_bytes())
    whole = save({**load((encrypted / "key.safetensors").read_bytes()), "more": np.zeros(1)})
    header["tensors_sha256"] = hashlib.sha256(whole).hexdigest()
    (tmp_path / "key.json").write_text(json.dumps(header))
    (tmp_path / "key.safetensors").write_bytes(whole)
    with pytest.raises(KeyFileError, match="expected one tensor, ciphertext") as caught:
        Key.load(tmp_path, PASSPHRASE)
    one_line(caught.value)


@pytest.mark.parametrize("passphrase", ["", "correct hors", "Correct horse", "correct horse\n"])
def test_a_wrong_passphrase_is_refused(encrypted: Path, passphrase: str) -> None:
    with pytest.raises(KeyFileError, match="wrong passphrase") as caught:
        Key.load(encrypted, passphrase)
    one_line(caught.value)


def test_a_missing_passphrase_is_asked_for(encrypted: Path) -> None:
    with pytest.raises(KeyFileError, match="COUNTERMARK_PASSPHRASE_FILE") as caught:
        Key.load(encrypted)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("owner", "Mallory", "was changed"),
        ("model", "vgg16", "was changed"),
        ("model_arguments", {}, "was changed"),
        ("version", "9.9.9", "was changed"),
        ("test_key", False, "was changed"),
        ("encryption.iterations", 1, "was changed"),
        ("encryption.memory_kib", 8192, "was changed"),
        ("encryption.salt", "0" * 32, "was changed"),
        ("encryption.nonce", "0" * 24, "was changed"),
        ("encryption.memory_kib", 1 << 30, "less than or equal"),
        ("encryption.kdf", "none", "encryption.kdf"),
        ("encryption.pepper", 1, "encryption.pepper"),
        ("encryption", None, "holds no secret"),
    ],
)
def test_an_edited_header_of_an_encrypted_key_is_refused(
    encrypted: Path, tmp_path: Path, field: str, value: object, said: str
) -> None:
    header = json.loads((encrypted / "key.json").read_bytes())
    inside, _, name = field.rpartition(".")
    (header[inside] if inside else header)[name] = value
    (tmp_path / "key.json").write_text(json.dumps(header))
    (tmp_path / "key.safetensors").write_bytes((encrypted / "key.safetensors").read_bytes())
    with pytest.raises(KeyFileError, match=said) as caught:
        Key.load(tmp_path, PASSPHRASE)
    one_line(caught.value)
