"""Opened triggers: what a third party can check, and what a forger cannot do."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from keys import known_key, one_line
from opened import OPENED, changed, images_of, key, refused, xor

from countermark._internal import merkle
from countermark.errors import ConfigError
from countermark.keys.key import KeyMaterial, compute_c0, digest_tensor, digest_tensors
from countermark.keys.messages import draw_trigger_labels
from countermark.schemes import load_scheme
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.schemes.triggers import compute_leaf
from countermark.verification.disclosure import TriggerDisclosure, disclose_triggers

# --- what is shown


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40, 64, 65])
def test_every_trigger_can_be_opened_with_its_own_label(count: int) -> None:
    made = key(count=count)
    expected = load_scheme(made).derive_labels(made)  # type: ignore[attr-defined]
    for indices in ([0], [count - 1], list(range(0, count, 3)), None):
        found = disclose_triggers(made, indices).check(made.commitment)
        places = range(count) if indices is None else indices
        assert [each.index for each in found] == list(places)
        assert [each.label for each in found] == [expected[index] for index in places]
        for each in found:
            assert np.array_equal(each.image, made.frozen["triggers"][each.index])
            assert (each.image.dtype, each.image.shape) == (np.uint8, (3, 4, 5))


def test_it_comes_back_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "opened.json"
    OPENED.save(path)
    loaded = TriggerDisclosure.load(path)
    assert loaded == OPENED
    assert loaded.to_bytes() == OPENED.to_bytes() == path.read_bytes()
    shown = [(each.index, each.label) for each in loaded.check(key().commitment)]
    assert shown == [(each, key().draw_labels(8, 10)[each]) for each in (0, 3, 7)]
    assert list(tmp_path.rglob("*.tmp")) == []


def test_it_says_what_key_it_is_of() -> None:
    assert OPENED.commitment == key().commitment == key().c0.hex()
    assert (OPENED.scheme, OPENED.owner, OPENED.test_key) == ("adi", "ACME Inc.", False)
    assert OPENED.trigger_scheme == load_scheme(key())
    assert OPENED.check(OPENED.commitment.upper())[0].index == 0
    assert "salt" not in repr(OPENED)
    assert (
        repr(OPENED.check()[0]) == f"CheckedTrigger(index=0, label={key().draw_labels(1, 10)[0]})"
    )


def test_a_page_of_python_checks_it_without_the_library() -> None:
    """An independent reader, made from docs/format.md."""

    def sha(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(parts)).digest()

    def frame(*parts: bytes) -> bytes:
        return b"".join(len(part).to_bytes(8, "big") + part for part in parts)

    shown = json.loads(OPENED.to_bytes())
    size = shown["context"]["fields"]["triggers"]
    for each in shown["opened"]:
        image = base64.b64decode(each["image"])
        digest = sha(frame(b"trigger", f"uint8 {shown['shape']}".encode(), image))
        reached = sha(b"\0", frame(bytes.fromhex(each["salt"]), digest))
        place, last = each["index"], size - 1
        for step in map(bytes.fromhex, each["path"]):
            while not place % 2 and place == last:
                place, last = place // 2, last // 2
            reached = sha(b"\1", step, reached) if place % 2 else sha(b"\1", reached, step)
            place, last = place // 2, last // 2
        assert reached.hex() == shown["root"]
    root = sha(frame(b"openings", b"uint8 [32]", bytes.fromhex(shown["root"])))
    context = json.dumps(shown["context"], sort_keys=True, separators=(",", ":")).encode()
    c0 = sha(
        frame(
            b"countermark/C0/v1",
            context,
            bytes.fromhex(shown["secret_sha256"]),
            frame(root, *map(bytes.fromhex, shown["frozen"])),
            shown["owner"].encode(),
            bytes.fromhex(shown["nonce"]),
        )
    )
    assert c0.hex() == key().commitment


def test_a_key_that_learnt_something_is_known_by_c1() -> None:
    learnt = replace(key(), learnt={"b": np.ones(3), "a": np.zeros(2)})
    opened = disclose_triggers(learnt, [5])
    assert opened.commitment == learnt.commitment != learnt.c0.hex()
    assert opened.check(learnt.commitment)[0].label == key().draw_labels(6, 10)[5]
    assert learnt.c0.hex() in refused(opened, learnt.c0.hex())


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ([], "expected some of 0 to 39, each once"),
        ([40], "[40]: expected some of 0 to 39"),
        ([-1], "[-1]"),
        ([3, 3], "each once"),
        ([1 << 80], "expected some of 0 to 39"),
        (list(range(1000)), "expected some of 0 to 39"),
    ],
)
def test_triggers_that_are_not_there_are_one_line(indices: list[int], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        disclose_triggers(key(), indices)
    assert says in one_line(caught.value)


def test_only_a_sound_key_of_triggers_is_opened() -> None:
    with pytest.raises(ConfigError, match="uchida reads weights: expected a key of triggers"):
        disclose_triggers(known_key(), [0])
    with pytest.raises(ConfigError, match="do not follow from its secret"):
        disclose_triggers(replace(key(), material=KeyMaterial.from_test_seed(2)), [0])


# --- labels that nobody chose


def test_another_nonce_draws_other_labels() -> None:
    other = KeyMaterial(key().material.secret, bytes(16))
    again = Adi(10, 40).generate_key(key().frozen, owner="ACME Inc.", material=other)
    found, others = (
        [each.label for each in disclose_triggers(each, None).check()] for each in (key(), again)
    )
    assert sum(map(int.__eq__, found, others)) < 15
    assert [each.salt for each in disclose_triggers(again, None).opened] != [
        each.salt for each in disclose_triggers(key(), None).opened
    ]


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_opened_labels_are_uniform(classes: int) -> None:
    scheme, material = Adi(classes, 20_000), KeyMaterial.from_test_seed(classes)
    many = {"triggers": images_of(20_000, (1, 2, 2))}
    made = scheme.generate_key(many, owner="ACME Inc.", material=material)
    found = [each.label for each in disclose_triggers(made, None).check()]
    assert scipy.stats.chisquare(np.bincount(found, minlength=classes)).pvalue > 1e-4


def test_labels_cannot_be_chosen_one_by_one() -> None:
    """A cheat who tries salts of his own for one trigger redraws the labels of all."""
    before, redrawn = key().draw_labels(40, 10), []
    for attempt in range(20):
        salts = key().material.draw_salts(40)
        salts[3] = bytes([attempt]) * 32
        pairs = zip(salts, key().frozen["triggers"], strict=True)
        root = np.frombuffer(
            merkle.compute_root([compute_leaf(*each) for each in pairs]), dtype=np.uint8
        )
        forged = replace(key(), frozen={**key().frozen, "openings": root})
        redrawn.append(float((draw_trigger_labels(salts, forged.c0, 10) == before).mean()))
    assert max(redrawn) < 0.4
    assert np.mean(redrawn) == pytest.approx(0.1, abs=0.05)


# --- forgeries


def test_every_byte_of_an_image_counts() -> None:
    for at in range(60):
        image = bytearray(base64.b64decode(OPENED.opened[1].image))
        image[at] ^= 1
        forged = changed(OPENED, "opened", 1, "image", to=base64.b64encode(image).decode())
        assert "trigger 3 of 40 is not what was committed to" in refused(forged)


def test_every_byte_of_a_salt_and_of_a_path_counts() -> None:
    for at in range(64):
        salted = changed(OPENED, "opened", 0, "salt", to=xor(at))
        assert "trigger 0 of 40 is not what" in refused(salted)
        for step in range(len(OPENED.opened[2].path)):
            forged = changed(OPENED, "opened", 2, "path", step, to=xor(at))
            assert "trigger 7 of 40 is not what" in refused(forged)


def test_every_other_index_is_refused() -> None:
    for index in {*range(1 << 7), 1 << 15} - {0, 3, 7}:
        for place in range(3):
            try:
                forged = changed(OPENED, "opened", place, "index", to=index)
            except ValueError:  # no longer in ascending order
                continue
            assert f"trigger {index} of 40 is not what was committed to" in refused(forged)
    for first, second in ((0, 1), (1, 2)):
        document = json.loads(OPENED.to_bytes())
        for name in ("salt", "image", "path"):
            one, two = (document["opened"][each] for each in (first, second))
            one[name], two[name] = two[name], one[name]
        assert "is not what" in refused(TriggerDisclosure.model_validate_json(json.dumps(document)))


@pytest.mark.parametrize("at", range(0, 64, 7))
@pytest.mark.parametrize("name", ["root", "nonce", "secret_sha256"])
def test_every_digest_counts(name: str, at: int) -> None:
    forged = changed(OPENED, name, to=xor(at % (32 if name == "nonce" else 64)))
    assert "these triggers belong to the commitment" in refused(forged)


CHANGES: list[tuple[tuple[Any, ...], Any]] = [
    (("owner",), "ACME Inc"),
    (("frozen", 0), xor(5)),
    (("frozen",), []),
    (("frozen",), ["00" * 32] * 2),
    (("learnt",), ["00" * 32]),
    (("context", "scheme"), "zhang"),
    (("context", "scheme"), "uchida"),
    (("context", "scheme"), "none\n"),
    (("context", "test_key"), True),
    (("context", "tensors"), [["w", [3]]]),
    (("context", "fields", "classes"), 2),
    (("context", "fields", "classes"), 1 << 70),
    (("context", "fields", "triggers"), 41),
    (("context", "fields", "triggers"), 8),
    (("context", "fields", "triggers"), 7),
    (("context", "fields", "mean"), [1]),
    (("context", "fields", "mean"), "0"),
    (("context", "fields", "colour"), 1),
    (("context", "fields"), {}),
]


@pytest.mark.parametrize(("path", "to"), CHANGES, ids=range(len(CHANGES)))
def test_whatever_is_changed_is_another_commitment(path: tuple[Any, ...], to: Any) -> None:
    refused(changed(OPENED, *path, to=to))


@pytest.mark.parametrize("commitment", ["", "00" * 32, "x\n", key(2).commitment, "0" * 5000])
def test_another_commitment_is_refused(commitment: str) -> None:
    assert f"belong to the commitment {key().commitment}" in refused(OPENED, commitment)


def test_nobody_can_commit_to_two_trees_and_show_either() -> None:
    """A digest shows no name: only its place says which of several roots is the root."""
    another = key(2).frozen["openings"]
    two = [digest_tensor("openings", another), *digest_tensors(key().frozen)]
    shown: dict[str, Any] = {
        "secret": hashlib.sha256(key().material.secret).digest(),
        "owner": key().owner,
        "nonce": key().material.nonce,
    }
    commitment = compute_c0(key().commitment_context, two, **shown).hex()
    listed = tuple(each.hex() for each in two)
    for frozen in (listed, listed[1:], listed[:1] + listed[2:], listed[2:]):
        forged = OPENED.model_copy(update={"frozen": frozen})
        assert "belong to the commitment" in refused(forged, commitment)


def test_a_larger_tree_opens_no_more_triggers_than_the_key_has() -> None:
    """The root of 64 leaves under a key of 40: what lies beyond has no place, 0 to 39 have one."""
    salts, images = key().material.draw_salts(64), images_of(64)
    leaves = [compute_leaf(*each) for each in zip(salts, images, strict=True)]
    opened = []
    for index, path in enumerate(merkle.prove_inclusions(leaves, range(64))):
        try:
            opened.append(
                merkle.compute_path_root(leaves[index], index, 40, path)
                == merkle.compute_root(leaves)
            )
        except ConfigError:
            opened.append(False)
    assert sum(opened) == 32  # those whose way to the root has the same turns
