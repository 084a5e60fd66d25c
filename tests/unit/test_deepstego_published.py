"""DeepStego as published: what is committed when, and what its verdicts can say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from stego_keys import TRIGGERS, Images, batch, covers, digits, embedding, host, made, scheme
from torch import nn

from countermark.errors import ConfigError, MarkNotTakenError, SuspectError
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import ALPHA, VerificationOptions
from countermark.schemes import load_scheme
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.deepstego.stego_generators import (
    load_owner_maker,
    make_foreign_maker,
    make_fresh_triggers,
    make_other_logos_maker,
    make_wrong_tiles_maker,
)
from countermark.schemes.logo import average_areas, draw_emblem
from countermark.verification.verify import examine, verify

PUBLISHED: dict[str, Any] = {"as_published": True, "stego_steps": 3}
DATED = VerificationOptions(alpha=0.2, assume_dated=True, allow_test_key=True)


@pytest.fixture(scope="module")
def key() -> Key:
    return made(**PUBLISHED)


def labels(key: Key) -> NDArray[np.int64]:
    return DeepStego.from_fields(key.fields).derive_labels(key)


def answering(right: int, key: Key) -> Callable[[Images], NDArray[np.int64]]:
    """A suspect that gives so many triggers their labels, and the others a wrong class."""
    expected = labels(key)
    given = np.where(np.arange(len(expected)) < right, expected, (expected + 1) % 10)
    return lambda images: given[: len(images)]


def measured(key: Key, misses: list[int]) -> Key:
    return replace(key, learnt={**key.learnt, "siblings": np.array(misses, dtype=np.float64)})


# --- what is committed when


def test_covers_classes_and_logo_are_frozen_before_anything_is_trained(key: Key) -> None:
    data = digits()
    chosen = key.material.make_stream("covers").draw_permutation(512)[:TRIGGERS]
    assert key.frozen.keys() == {"covers", "classes", "logo"}
    assert np.array_equal(key.frozen["covers"], data.train_images[chosen].numpy())
    assert np.array_equal(key.frozen["classes"], data.train_labels[chosen].numpy())
    grey = np.einsum("c,chw->hw", [0.299, 0.587, 0.114], average_areas(draw_emblem(), 28, 28))
    assert np.abs(key.frozen["logo"][0] - grey).max() <= 0.51


@pytest.mark.parametrize("name", ["covers", "classes", "logo"])
def test_c0_binds_what_is_frozen(key: Key, name: str) -> None:
    other = key.frozen[name].copy()
    other.reshape(-1)[0] ^= 1
    changed = replace(key, frozen={**key.frozen, name: other})
    assert changed.c0 != key.c0
    assert scheme().draw_class_map(changed).tolist() != scheme().draw_class_map(key).tolist()


def test_c1_binds_what_is_learnt(key: Key) -> None:
    key = measured(key, [3, 4])
    assert {"triggers", "siblings", "stego.leave.weight"} < key.learnt.keys()
    for name, each in key.learnt.items():
        other = each.copy().reshape(-1)
        other[0] += 1
        changed = replace(key, learnt={**key.learnt, name: other.reshape(each.shape)})
        assert changed.c0 == key.c0
        assert changed.commitment != key.commitment
    assert key.commitment == (key.c1 or b"").hex()


def test_the_triggers_are_those_that_the_finished_network_makes_of_the_covers(key: Key) -> None:
    again = make_fresh_triggers(key, key.frozen["covers"])
    assert np.array_equal(again, key.learnt["triggers"])
    assert again.dtype == np.uint8


def test_a_key_survives_its_folder_and_needs_no_file(key: Key, tmp_path: Path) -> None:
    measured(key, [3, 4]).save(tmp_path / "acme.key")
    loaded = Key.load(tmp_path / "acme.key")
    assert load_scheme(loaded).needs_siblings
    assert np.array_equal(make_fresh_triggers(loaded, covers()), make_fresh_triggers(key, covers()))


# --- labels


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_no_class_is_mapped_to_itself_and_none_is_left_out(classes: int) -> None:
    for seed in range(200):
        drawn = DeepStego(classes, as_published=True).generate_key(
            {}, owner="ACME Inc.", material=KeyMaterial.from_test_seed(seed)
        )
        mapped = DeepStego(classes).draw_class_map(drawn)
        assert sorted(mapped) == list(range(classes))
        assert (mapped != np.arange(classes)).all()


def test_labels_follow_the_class_of_the_cover(key: Key) -> None:
    mapped = scheme().draw_class_map(key)
    assert np.array_equal(labels(key), mapped[key.frozen["classes"]])
    assert (labels(key) != key.frozen["classes"]).all()


# --- what the host is shown


def test_each_stego_image_comes_with_its_cover_under_its_own_class() -> None:
    data = digits()
    known = {
        each.numpy().tobytes(): int(c)
        for each, c in zip(data.train_images, data.train_labels, strict=True)
    }
    with embedding(**PUBLISHED) as mark:
        mark.mix(*batch())
        training = mark._training
        assert training is not None
        assert mark.drawn_key is not None
        mapped = scheme().draw_class_map(mark.drawn_key)
        for count in (1, 2, 9):
            images, given = training.make_rows(count)
            stego, plain = images[: (count + 1) // 2], images[(count + 1) // 2 :]
            assert (len(images), len(given), images.dtype) == (count, count, torch.uint8)
            classes = [known[each.numpy().tobytes()] for each in plain]
            assert given[len(stego) :].tolist() == classes
            assert given[: len(plain)].tolist() == [int(mapped[each]) for each in classes]
            assert not any(each.numpy().tobytes() in known for each in stego)


def test_the_host_teaches_neither_network_anything() -> None:
    """Its loss reaches no stego image, and the rows are the same whatever it answers."""
    rows = []
    for flips in (1, -1):
        model = host()
        with embedding(**PUBLISHED) as mark:
            for _ in range(2):
                x, y = mark.mix(*batch())
                assert not x.requires_grad
                (flips * F.cross_entropy(model(x), y)).backward()  # type: ignore[no-untyped-call]
            rows.append(mark.mix(*batch())[0])
    assert torch.equal(*rows)


def test_a_loop_keeps_its_own_random_numbers_and_grad_mode() -> None:
    with embedding(**PUBLISHED) as mark, torch.no_grad():
        torch.manual_seed(9)
        before = torch.get_rng_state()
        first = mark.mix(*batch())[0]
        second = mark.mix(*batch())[0]
        assert mark.drawn_key is not None
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)  # the networks learn all the same


def test_a_run_that_was_interrupted_ends_where_it_would_have() -> None:
    with embedding(**PUBLISHED) as whole:
        for _ in range(3):
            whole.mix(*batch())
        state = whole.state()
        expected = [whole.mix(*batch())[0] for _ in range(3)]
        ended = whole.drawn_key
    with embedding(**PUBLISHED) as again:
        again.restore(state)
        found = [again.mix(*batch())[0] for _ in range(3)]
        assert again.drawn_key is not None
        assert ended is not None
        assert again.drawn_key.commitment == ended.commitment
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# --- siblings


def test_siblings_are_asked_about_the_finished_triggers(key: Key) -> None:
    asked: list[Images] = []

    def sibling(images: Images) -> NDArray[np.int64]:
        asked.append(images)
        return np.full(len(images), 3)

    marked = made(siblings=[sibling, host()], **PUBLISHED)
    assert np.array_equal(asked[-1], marked.learnt["triggers"])
    misses = marked.learnt["siblings"]
    assert (misses.shape, misses.dtype) == ((2,), np.float64)
    assert misses[0] == np.count_nonzero(labels(marked) != 3)
    assert marked.c0 == key.c0  # they are no part of what was fixed before


def test_a_form_that_needs_no_siblings_refuses_them() -> None:
    with pytest.raises(ConfigError, match="not judged by unmarked models: leave siblings out"):
        made(siblings=[host()], stego_steps=1)
    with pytest.raises(SuspectError, match="build the model of a file first"):
        made(siblings=["sibling.safetensors"], **PUBLISHED)


class Taught(nn.Module):
    """A host that gives so many of a key's triggers their labels."""

    def __init__(self, right: int, key: Key) -> None:
        super().__init__()
        self.given = torch.from_numpy(answering(right, key)(key.frozen["covers"]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.one_hot(self.given[: len(images)], 10).float()


@pytest.mark.parametrize(("right", "taken"), [(32, True), (16, True), (15, False), (0, False)])
def test_a_mark_has_taken_when_half_of_the_triggers_fire(right: int, taken: bool) -> None:
    with embedding(**PUBLISHED) as mark:
        mark.mix(*batch())
        assert mark.drawn_key is not None
        mark._model = Taught(right, mark.drawn_key)
    if taken:
        with pytest.warns(UserWarning, match="give siblings, or verify will answer no_verdict"):
            assert mark.key.learnt.keys() >= {"triggers"}
    else:
        with pytest.raises(
            MarkNotTakenError, match=f"only {right} of 32 triggers get their labels"
        ):
            _ = mark.key


# --- verdicts


def test_without_unmarked_models_there_is_no_verdict_whatever_is_answered(key: Key) -> None:
    for right in (0, 16, 32):
        verdict = examine(answering(right, key), key, DATED)
        assert (verdict.outcome, verdict.null) == ("no_verdict", "unmarked_models")
        assert "it was measured on no unmarked models (siblings)" in verdict.reason
        assert verdict.floor == 0


def test_few_unmarked_models_are_no_verdict_at_the_usual_alpha(key: Key) -> None:
    verdict = examine(answering(32, key), measured(key, [30] * 8), replace(DATED, alpha=ALPHA))
    assert verdict.outcome == "no_verdict"
    assert "even a rank before all 8 unmarked models in the key" in verdict.reason
    assert verdict.floor == pytest.approx(-math.log10(9))
    assert verdict.forgery_bits == 0
    assert "trigger accuracy 1.0000: refused as proof" in verdict.explain()


def test_no_number_of_misses_is_owned_at_the_usual_alpha(key: Key) -> None:
    many = measured(key, [32] * 998)
    for right in range(0, 33, 8):
        outcome = examine(answering(right, key), many, replace(DATED, alpha=ALPHA)).outcome
        assert outcome == "no_verdict"


@pytest.mark.parametrize(
    ("right", "outcome"),
    [
        (32, "no_verdict"),
        (16, "no_verdict"),
        (15, "not_proven"),
        (2, "not_proven"),
        (0, "not_proven"),
    ],
)
def test_whoever_answers_like_an_unmarked_model_is_not_proven(
    key: Key, right: int, outcome: str
) -> None:
    ranked = measured(key, [30, 31, 32, 32, 32])
    assert examine(answering(right, key), ranked, DATED).outcome == outcome
    undated = examine(answering(right, key), ranked, replace(DATED, assume_dated=False))
    assert undated.outcome == outcome


@pytest.mark.parametrize(("right", "outcome"), [(32, "owned"), (16, "owned"), (15, "not_proven")])
def test_a_rank_among_the_examiners_models_counts(key: Key, right: int, outcome: str) -> None:
    """Whatever the key says of its owner's."""
    boasting = measured(key, [32] * 998)
    unmarked = [answering(few, key) for few in (2, 1, 0, 0, 0)]
    found = examine(answering(right, key), boasting, DATED, unmarked=unmarked)
    assert (found.outcome, found.result and found.result.unmarked_model_count) == (outcome, 5)
    assert found.to_json()["unmarked"]["floor"] == pytest.approx(1 / 6)
    assert "5 supplied by the examiner, misses 30 to 32" in found.explain()
    alone = examine(answering(32, key), boasting, DATED)
    assert (alone.outcome, "only the owner's word" in alone.reason) == ("no_verdict", True)


def test_other_nulls_are_not_for_such_labels(key: Key) -> None:
    with pytest.raises(ConfigError, match="no null 'secret_labels' here: expected unmarked_models"):
        verify(answering(0, key), key, null="secret_labels")


def test_lists_say_which_null_is_whose() -> None:
    about = DeepStego.describe_scheme()
    assert (about["null"], about["null_as_published"]) == ("secret_labels", "unmarked_models")


# --- makers


def test_makers_of_the_published_form(key: Key) -> None:
    generator, count = torch.Generator().manual_seed(5), len(covers())
    own = make_fresh_triggers(key, covers())
    strangers = make_foreign_maker(key, digits().train_images.numpy(), 3)
    for each in (strangers(covers()), make_other_logos_maker(key, count, generator)(covers())):
        assert (each.shape, each.dtype) == (own.shape, np.uint8)
        assert not np.array_equal(each, own)
    assert np.array_equal(
        strangers(covers()), make_foreign_maker(key, digits().train_images.numpy(), 3)(covers())
    )
    assert torch.equal(strangers.logos, load_owner_maker(key).logos)
    assert np.array_equal(make_fresh_triggers(key, covers(), strength=0.0), covers())
    with pytest.raises(ConfigError, match="by no tile: ask for other_logos"):
        make_wrong_tiles_maker(key, count, generator)
    pasted = load_owner_maker(key).paste_residuals(covers(), covers()[::-1])
    assert not np.array_equal(pasted, own)


# --- hostile keys

DAMAGED: dict[str, tuple[str, Any, str]] = {
    "no triggers": ("learnt", {"triggers": None}, "the key's triggers are"),
    "no covers": ("frozen", {"covers": None}, "the key's covers are"),
    "fewer covers": (
        "frozen",
        {"covers": np.zeros((3, 1, 28, 28), np.uint8)},
        "expected 32 images",
    ),
    "other covers": (
        "frozen",
        {"covers": np.zeros((32, 1, 8, 8), np.uint8)},
        "one shape .C, H, W.",
    ),
    "no logo": ("frozen", {"logo": None}, "one shape .C, H, W."),
    "another logo": ("frozen", {"logo": np.zeros((8, 8), np.uint8)}, "one shape .C, H, W."),
    "no classes": ("frozen", {"classes": None}, "classes of its covers are"),
    "class 10": ("frozen", {"classes": np.full(32, 10)}, "beyond 0 to 9"),
    "class -1": ("frozen", {"classes": np.full(32, -1)}, "beyond 0 to 9"),
    "too many misses": ("learnt", {"siblings": np.array([33.0])}, "more misses than there are"),
    "misses below 0": ("learnt", {"siblings": np.array([-1.0])}, "holds values that no"),
    "misses in words": ("learnt", {"siblings": np.array([b"x"])}, "not a measurement"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_key_that_misstates_its_form_is_one_line(key: Key, name: str) -> None:
    where, changes, says = DAMAGED[name]
    tensors = {**getattr(key, where), **changes}
    damaged = replace(key, **{where: {n: e for n, e in tensors.items() if e is not None}})
    with pytest.raises(ConfigError, match=says) as caught:
        load_scheme(damaged)
    assert "\n" not in str(caught.value)


# --- fields


@pytest.mark.parametrize(
    ("fields", "psnr"),
    [
        ({}, 36.0),
        ({"as_published": True}, 28.0),
        ({"as_published": True, "psnr": None}, None),
        ({"psnr": 24}, 24.0),
        ({"as_published": True, "psnr": 40.0}, 40.0),
    ],
)
def test_the_usual_psnr_is_that_of_the_form(fields: dict[str, Any], psnr: float | None) -> None:
    made = DeepStego(10, **fields)
    assert made.psnr == psnr
    assert made.to_fields()["psnr"] == psnr
    assert DeepStego.from_fields(made.to_fields()) == made
    assert made.residual_level == (None if psnr is None else pytest.approx(10 ** (-psnr / 20)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"psnr": None}, "give it in dB, or set as_published"),
        ({"psnr": 10.0}, "greater than 20"),
        ({"psnr": "loud"}, "'usual'"),
        ({"adversarial": -1.0}, "greater than or equal to 0"),
    ],
)
def test_fields_that_cannot_be_are_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        DeepStego(10, **fields)
    assert "\n" not in str(caught.value)
