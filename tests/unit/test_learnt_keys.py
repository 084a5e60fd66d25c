"""Keys of a learnt reader: C1 binds what was learnt, and nothing of it is shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keys import InMemory, known_key, one_line
from readers import MEASURED, drawn_key, gaussian, network
from safetensors.numpy import load, save

from countermark.errors import ConfigError, KeyFileError
from countermark.keys.key import Key, digest_tensor
from countermark.keys.storage import load_header
from countermark.keys.streams import frame
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.verification.verify import read_suspect, verify

ROOT = Path(__file__).parents[2]
VECTORS = json.loads((ROOT / "tests/vectors.json").read_text(encoding="utf-8"))
PASSPHRASE = "correct horse"
KEY = drawn_key()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_tensors(one: Key, other: Key) -> bool:
    return one.learnt.keys() == other.learnt.keys() and all(
        np.array_equal(each, other.learnt[name]) and each.dtype == other.learnt[name].dtype
        for name, each in one.learnt.items()
    )


# --- the commitment


def test_known_answer_of_c1() -> None:
    """docs/format.md shows and proves the same one."""
    learnt = {
        "reader.gate": np.array([1, 0.5, -2], np.float32),
        "siblings": np.array([0.6, 0.7]),
    }
    key = replace(known_key(), learnt=learnt)
    digest = digest_tensor("reader.gate", learnt["reader.gate"])
    assert digest.hex() == VECTORS["reader_digest"]
    assert key.commitment == VECTORS["C1"]
    assert key.c0.hex() == VECTORS["C0"]
    suspect = {"fc.weight": np.arange(512, dtype=np.float32).reshape(16, 32)}
    assert digest_tensor("fc.weight", suspect["fc.weight"]).hex() == VECTORS["suspect_digest"]
    stream = IndependentNetwork._make_stream(suspect, key, "units")
    permuter = network().make_permuter({"fc.weight": (16, 32)})
    assert permuter.draw_permutations(stream, 1).tolist() == [VECTORS["units"]]


def test_c1_is_what_the_page_says() -> None:
    digests = [
        hashlib.sha256(
            frame(
                name.encode(),
                f"{KEY.learnt[name].dtype.name} {list(KEY.learnt[name].shape)}".encode(),
                KEY.learnt[name].tobytes(),
            )
        ).digest()
        for name in sorted(KEY.learnt)
    ]
    expected = hashlib.sha256(frame(b"countermark/C1/v1", KEY.c0, frame(*digests))).digest()
    assert KEY.c1 == expected
    assert KEY.commitment == expected.hex()


def test_a_key_that_learnt_nothing_has_no_c1() -> None:
    key = known_key()
    assert (key.c1, key.commitment) == (None, key.c0.hex())


CHANGES: dict[str, Callable[[Key], Any]] = {
    "gate": lambda key: {"reader.gate": key.learnt["reader.gate"] * np.float32(1.001)},
    "one weight": lambda key: {"reader.first": nudged(key.learnt["reader.first"])},
    "shape": lambda key: {"reader.first": key.learnt["reader.first"].T.copy()},
    "dtype": lambda key: {"reader.last": key.learnt["reader.last"].view(np.int32)},
    "siblings": lambda _: {"siblings": np.array([0.6, 0.70001])},
    "one sibling more": lambda _: {"siblings": np.array([0.6, 0.7, 0.7])},
    "threshold": lambda _: {"sibling_threshold": np.array([0.0501])},
    "one tensor more": lambda _: {"another": np.zeros(1)},
}


def nudged(tensor: Any) -> Any:
    changed = tensor.copy()
    changed.reshape(-1)[-1] = np.nextafter(changed.reshape(-1)[-1], np.float32(9))
    return changed


@pytest.mark.parametrize("what", CHANGES)
def test_one_change_of_what_was_learnt_changes_c1_alone(what: str) -> None:
    other = replace(KEY, learnt={**KEY.learnt, **CHANGES[what](KEY)})
    assert other.c1 != KEY.c1
    assert other.c0 == KEY.c0
    assert np.array_equal(other.message, KEY.message)


def test_a_renamed_or_missing_tensor_changes_c1_and_their_order_does_not() -> None:
    tensors = dict(KEY.learnt)
    turned = replace(KEY, learnt=dict(reversed(tensors.items())))
    assert turned.c1 == KEY.c1
    swapped = {**tensors, "siblings": tensors["sibling_threshold"]}
    swapped["sibling_threshold"] = tensors["siblings"]
    missing = {name: each for name, each in tensors.items() if name != "siblings"}
    assert len({replace(KEY, learnt=each).c1 for each in (tensors, swapped, missing)}) == 3


def test_c1_follows_c0() -> None:
    other = replace(KEY, owner="ACME Inc")
    assert other.c0 != KEY.c0
    assert other.c1 != KEY.c1


# --- on disk


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_a_loaded_key_is_the_saved_one(tmp_path: Path, passphrase: str | None) -> None:
    KEY.save(tmp_path / "a.key", passphrase)
    loaded = Key.load(tmp_path / "a.key", passphrase)
    assert loaded == KEY
    assert same_tensors(loaded, KEY)
    assert (loaded.c0, loaded.c1) == (KEY.c0, KEY.c1)
    suspect = InMemory(gaussian(1))
    found, expected = read_suspect(suspect, loaded), read_suspect(suspect, KEY)
    assert found.cross_entropy == expected.cross_entropy
    header = load_header(tmp_path / "a.key")
    assert (header.C0, header.C1, header.commitment) == (
        KEY.c0.hex(), KEY.commitment, KEY.commitment,
    )  # fmt: skip


def test_a_second_save_is_byte_equal(tmp_path: Path) -> None:
    KEY.save(tmp_path / "a.key")
    Key.load(tmp_path / "a.key").save(tmp_path / "b.key")
    assert content(tmp_path / "a.key") == content(tmp_path / "b.key")
    names = load((tmp_path / "a.key" / "key.safetensors").read_bytes()).keys()
    assert names == {"secret", *(f"learnt.{name}" for name in KEY.learnt)}


def test_decrypted_it_is_the_plain_file(tmp_path: Path) -> None:
    KEY.save(tmp_path / "a.key")
    KEY.save(tmp_path / "b.key", PASSPHRASE)
    Key.load(tmp_path / "b.key", PASSPHRASE).save(tmp_path / "c.key")
    assert content(tmp_path / "a.key") == content(tmp_path / "c.key")


def test_the_layout_of_an_array_does_not_show_on_disk(tmp_path: Path) -> None:
    turned = np.asfortranarray(KEY.learnt["reader.first"])
    other = replace(KEY, learnt={**KEY.learnt, "reader.first": turned})
    KEY.save(tmp_path / "a.key")
    other.save(tmp_path / "b.key")
    assert content(tmp_path / "a.key") == content(tmp_path / "b.key")


def test_a_key_written_before_readers_were_learnt_still_loads(tmp_path: Path) -> None:
    known_key().save(tmp_path / "a.key")
    assert json.loads((tmp_path / "a.key" / "key.json").read_bytes())["C1"] is None
    loaded = Key.load(tmp_path / "a.key")
    assert (loaded.learnt, loaded.c1, loaded.commitment) == ({}, None, VECTORS["C0"])


def edited(folder: Path, tensors: dict[str, Any] | None = None, **fields: Any) -> None:
    """A key folder with other tensors or fields, its file digest made to fit."""
    if tensors is not None:
        (folder / "key.safetensors").write_bytes(save(tensors))
    header = json.loads((folder / "key.json").read_bytes()) | fields
    whole = (folder / "key.safetensors").read_bytes()
    header["tensors_sha256"] = hashlib.sha256(whole).hexdigest()
    (folder / "key.json").write_text(json.dumps(header))


def refused(folder: Path) -> str:
    with pytest.raises(KeyFileError) as caught:
        Key.load(folder)
    return one_line(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    KEY.save(tmp_path / "a.key")
    return tmp_path / "a.key"


@pytest.mark.parametrize("value", ["00" * 32, None, KEY.c0.hex()])
def test_an_edited_c1_is_refused(folder: Path, value: str | None) -> None:
    edited(folder, C1=value)
    assert "the commitment C1 does not follow" in refused(folder)


def test_both_commitments_of_another_key_are_refused(folder: Path) -> None:
    other = drawn_key(2)
    edited(folder, C0=other.c0.hex(), C1=other.commitment)
    assert "the commitment C0 does not follow" in refused(folder)


@pytest.mark.parametrize("name", KEY.learnt)
def test_an_edited_or_missing_tensor_is_refused(folder: Path, name: str) -> None:
    tensors = load((folder / "key.safetensors").read_bytes())
    edited(folder, {**tensors, f"learnt.{name}": nudged(tensors[f"learnt.{name}"])})
    assert "the commitment C1 does not follow" in refused(folder)
    edited(folder, {n: each for n, each in tensors.items() if n != f"learnt.{name}"})
    assert "the commitment C1 does not follow" in refused(folder)


@pytest.mark.parametrize("name", ["learnt.more", "learnt.", "frozen.reader.gate"])
def test_a_tensor_more_is_refused(folder: Path, name: str) -> None:
    tensors = load((folder / "key.safetensors").read_bytes())
    edited(folder, {**tensors, name: np.ones(3, np.float32)})
    assert "does not follow" in refused(folder)


@pytest.mark.parametrize("name", ["learnt", "reader.gate", "Learnt.more", "learnt\n"])
def test_a_tensor_of_no_kind_is_refused(folder: Path, name: str) -> None:
    tensors = load((folder / "key.safetensors").read_bytes())
    edited(folder, {**tensors, name: np.ones(3, np.float32)})
    assert "names that begin with 'frozen.' or 'learnt.'" in refused(folder)


def test_all_that_was_learnt_cannot_be_left_out(folder: Path) -> None:
    tensors = load((folder / "key.safetensors").read_bytes())
    edited(folder, {"secret": tensors["secret"]})
    assert "the commitment C1 does not follow" in refused(folder)


def test_an_edited_c1_of_an_encrypted_key_is_refused(tmp_path: Path) -> None:
    KEY.save(tmp_path / "a.key", PASSPHRASE)
    edited(tmp_path / "a.key", C1="00" * 32)
    with pytest.raises(KeyFileError, match="was changed after the key was made") as caught:
        Key.load(tmp_path / "a.key", PASSPHRASE)
    one_line(caught.value)


def test_learnt_tensors_do_not_make_a_linear_key_a_reader(tmp_path: Path) -> None:
    """They are committed to, and read by nobody."""
    key = replace(known_key(), learnt=dict(MEASURED))
    key.save(tmp_path / "a.key")
    loaded = Key.load(tmp_path / "a.key")
    assert loaded.commitment != known_key().commitment
    suspect = InMemory({"fc.weight": np.ones((16, 32), np.float32)})
    assert verify(suspect, loaded).reader is None


# --- what is shown


def test_neither_secret_nor_what_was_learnt_is_shown(tmp_path: Path) -> None:
    measured = {"siblings": np.array([0.6123, 0.7456]), "sibling_threshold": np.array([0.0512])}
    key = replace(KEY, learnt={**KEY.learnt, **measured})
    secret = key.material.secret
    values = np.concatenate([each.reshape(-1)[:5] for each in key.learnt.values()])
    hidden = [secret.hex(), str(secret), *(f"{abs(value):.3g}" for value in values.tolist())]
    key.save(tmp_path / "a.key")
    shown = [repr(key), str(key), (tmp_path / "a.key" / "key.json").read_text()]
    damages: list[dict[str, Any]] = [
        {},
        {"reader.first": key.learnt["reader.first"] * np.float32(np.nan)},
        {"siblings": -key.learnt["siblings"]},
        {"sibling_threshold": key.learnt["siblings"]},
        {"sibling_threshold": key.learnt["siblings"][:1] * 2},
    ]
    for changed in damages:
        learnt = {**key.learnt, **changed} if changed else {}
        with pytest.raises(ConfigError) as caught:
            verify(InMemory(gaussian(1)), replace(key, learnt=learnt))
        shown.append(one_line(caught.value))
    for text in shown:
        assert [each for each in hidden if each in text] == []


def test_trust_is_never_stored(tmp_path: Path) -> None:
    trusted = KEY.with_trusted_code("some.module:reader")
    assert (trusted.commitment, trusted) == (KEY.commitment, KEY)
    KEY.save(tmp_path / "a.key")
    trusted.save(tmp_path / "b.key")
    assert content(tmp_path / "a.key") == content(tmp_path / "b.key")
    assert Key.load(tmp_path / "b.key").trusted is None
