"""What a cheat tries who has the recipe, and a suspect that never saw a mark: none may be owned.

Each of these would make any model his, were the check that it runs into not there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from opened import OPENED
from torch import nn

from countermark.alignment import SuspectWithReference
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.streams import KeyStream
from countermark.predictors.base import PredictorWithSubject
from countermark.results.key_dating import KeyDating
from countermark.results.null_hypotheses import SecretClassMap
from countermark.results.reading import Reading
from countermark.results.subject import Subject
from countermark.results.verdict import KeyIdentity, Verdict, VerificationOptions, judge
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.learnt_reader import check_calibration
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.stamp.training import StampTraining
from countermark.schemes.triggers import FreshTriggers
from countermark.schemes.uchida.scheme import Uchida
from countermark.training.data import load_data
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.verification.disclosure import TriggerDisclosure, disclose_triggers
from countermark.verification.verify import examine

DATED = VerificationOptions(assume_dated=True)


def test_one_salt_for_all_triggers_would_give_them_one_label() -> None:
    opened = OPENED.model_dump()
    for each in opened["opened"]:
        each["salt"] = "ab" * 32
    with pytest.raises(ValueError, match="two triggers have one salt, hence one label"):
        TriggerDisclosure.model_validate(opened)


# --- references


def test_a_marked_reference_is_one_though_the_key_keeps_the_weights_from_before() -> None:
    """Its other tensors were trained with the mark: unrelated models align to what they let it."""
    data = load_data("digits").subset(train=1500)
    seed_torch(1, "init")
    host = build("mlp", {})
    start, scheme = host.state_dict()["2.weight"].numpy().copy(), Stamp("2.weight", bits=256)
    scheme = replace(scheme, margin=2.0, strength=0.02)
    material = KeyMaterial.from_test_seed(1)
    place = scheme.draw_places({"2.weight": (10, 64)}, material)["2.weight"]
    before = {"before.2.weight": start.reshape(-1)[place.start : place.stop].copy()}
    key = scheme.generate_key({"2.weight": (10, 64)}, owner="A", material=material, frozen=before)
    training, images = StampTraining(scheme, key), data.normalised(data.train_images)
    optimizer = torch.optim.Adam(host.parameters(), 1e-3)
    for _ in range(6):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(host(images[rows]), data.train_labels[rows])
            (loss + training.loss([host.get_parameter("2.weight")])).backward()
            optimizer.step()
    terms = replace(DATED, allow_test_key=True)
    assert examine(host, key, terms).owned
    seed_torch(7, "init")
    stranger = build("mlp", {})
    fit(stranger, data, recipe("mlp"), Course(3, seed=7, device="cpu"))
    found = examine(SuspectWithReference(stranger, host), key, terms)
    assert found.outcome == "not_proven"
    assert "the reference bears the mark" in found.subject.reference.refused
    copied = examine(SuspectWithReference(copy.deepcopy(host), host), key, terms)
    assert (copied.outcome, copied.null) == ("owned", "fair_coin")  # read as it is, no reference


def disguised(terms: VerificationOptions) -> Verdict:
    """Anybody's model, and a reference that was made to fit: in the order that reads best."""
    key = Uchida("2.weight", 128).generate_key(
        {"2.weight": (10, 64)}, owner="Cheat", material=KeyMaterial.from_test_seed(2)
    )
    torch.manual_seed(7)
    suspect = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    weights = suspect[2].weight.detach().numpy().astype(np.float64)
    scheme = Uchida("2.weight", 128)
    rows = np.concatenate(list(scheme.generate_row_blocks(key))).reshape(128, 10, 64)
    wanted = 2.0 * key.message - 1
    gains = np.einsum("toj,oi->tji", rows, weights) * wanted[:, None, None]
    drawn = np.random.default_rng(0)
    order = drawn.permutation(64)
    reached = gains[:, np.arange(64), order].sum(1)

    def worth(values: Any) -> float:
        return float(np.tanh(4 * values / weights.std() / 25).sum())

    for _ in range(40_000):
        j, k = drawn.integers(0, 64, 2)
        left = gains[:, j, order[j]] + gains[:, k, order[k]]
        tried = reached - left + gains[:, j, order[k]] + gains[:, k, order[j]]
        if worth(tried) > worth(reached):
            reached, order[j], order[k] = tried, order[k], order[j]
    reference = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        reference[0].weight.copy_(suspect[0].weight[order])
        reference[0].bias.copy_(suspect[0].bias[order])
    return examine(SuspectWithReference(suspect, reference), key, terms)


CLAIMED = KeyDating(
    "c" * 64, "2026-01-01T00:00:00Z", "2020-01-01T00:00:00Z", ("TSA",), 1, "pinned", None
)


def test_a_claim_of_a_key_does_not_date_a_reference() -> None:
    """Nor would one of the reference: it may have been made to fit a base that suspects share."""
    found = disguised(VerificationOptions(dating=CLAIMED, allow_test_key=True))
    assert found.log10_p is not None
    assert found.log10_p < -6  # the order alone makes it so
    assert found.outcome == "no_verdict"
    assert "a claim dates a key, no reference" in found.reason
    assert disguised(replace(DATED, allow_test_key=True)).owned  # the owner's own word, recorded


# --- readers


def test_terms_that_cancel_do_not_hide_permutations_that_read_as_well() -> None:
    """2³⁶ times nothing is nothing in float64, and noise in float32."""
    bits, width, parts, huge = 128, 640, 6, float(2**36)
    drawn = np.random.default_rng(0)
    scheme = IndependentNetwork("2.weight", bits=bits, hidden=2 + 6 * parts, units=(1,))
    key = scheme.generate_key(
        {"2.weight": (10, 64)}, owner="Cheat", material=KeyMaterial.from_test_seed(3)
    )
    wanted = 2.0 * key.message - 1
    same = np.kron(np.where(np.arange(10) % 2, 1.0, -1.0), np.ones(64))  # whatever the order
    first, last = [same, -same], [50 * wanted, 50 * wanted]
    for _ in range(parts):
        whole, chosen = drawn.integers(0, 2, width) * 2.0 - 1, drawn.integers(0, 2, width)
        signs = drawn.integers(0, 2, bits) * 2.0 - 1
        for part, sign in ((whole, 1), (whole * chosen, -1), (whole * (1 - chosen), -1)):
            first += [part, -part]
            last += [sign * huge * signs, -sign * huge * signs]
    learnt = {
        "reader.gate": np.ones(width, np.float32), "reader.first": np.array(first, np.float32),
        "reader.last": np.array(last, np.float32).T.copy(), "siblings": np.array([3.0, 3.0]),
        "sibling_threshold": np.array([0.3]), "loudness": np.full(64, 1e6),
    }  # fmt: skip
    torch.manual_seed(1)
    found = examine(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        replace(key, learnt=learnt), VerificationOptions(1e-3, assume_dated=True, allow_test_key=True),
    )  # fmt: skip
    assert found.loss is not None
    assert found.loss < 0.01
    assert (found.outcome, found.log10_p) == ("not_proven", 0.0)
    assert any("take" in each and "traced architecture" in each for each in found.limits)


def test_the_inputs_of_a_layer_behind_a_flattened_map_are_no_units() -> None:
    shapes = {"0.weight": (8, 1, 3, 3), "1.weight": (10, 392)}
    with pytest.raises(ConfigError, match="are not the inputs of"):
        IndependentNetwork("1.weight", bits=8).resolve_parameters(shapes)


def test_nobody_measured_a_million_unmarked_models() -> None:
    with pytest.raises(ConfigError, match="expected at most 10,000"):
        check_calibration({"siblings": np.full(999_999, 100.0)})


# --- answers


def test_a_network_that_was_learnt_after_the_map_is_not_judged_by_it() -> None:
    scheme = DeepStego(10, 100, as_published=True)
    covers = np.zeros((100, 1, 8, 8), np.uint8)
    frozen = {"covers": covers, "classes": np.zeros(100, np.int64), "logo": covers[0]}
    key = scheme.generate_key(frozen, owner="Cheat", material=KeyMaterial.from_test_seed(4))
    fresh = FreshTriggers(key, covers, np.zeros(100, np.int64))
    with pytest.raises(ConfigError, match="may know it: no null judges its fresh triggers"):
        scheme.query_fresh_triggers(lambda images: np.zeros(len(images), np.int64), fresh)


def test_a_claim_does_not_keep_out_a_map_that_was_picked_before_it() -> None:
    """There are few maps, and each key has one: some are soon tried."""
    scheme = DeepStego(10, 100)
    map_of = np.roll(np.arange(10), 1)
    classes = np.arange(100) % 10
    evidence = Reading(
        map_of[classes], map_of[classes], committed=False, choices=10, unit="triggers"
    )
    null = SecretClassMap(classes, KeyStream(bytes(32), bytes(32), "other class maps"))
    claimed = VerificationOptions(1e-4, blind_choice=True, dating=CLAIMED)
    found = judge(
        evidence,
        null,
        subject=Subject("s"),
        key=KeyIdentity(scheme.name, "0", "Cheat"),
        terms=claimed,
    )
    assert found.outcome == "no_verdict"
    assert "could have been picked before the claim" in found.reason


def named(classes: int, answers: Callable[[Key], Any]) -> tuple[Key, PredictorWithSubject]:
    """A key of 128 triggers, and a service that answers by name; the cheat orders the names."""
    scheme, material = Adi(classes, 128), KeyMaterial.from_test_seed(5)
    images = np.random.default_rng(0).integers(0, 256, (128, 1, 8, 8), dtype=np.uint8)
    key = scheme.generate_key({"triggers": images}, owner="Cheat", material=material)
    read = np.asarray(answers(key), dtype=np.int64)
    return key, PredictorWithSubject(lambda _: read, lambda: Subject("x", class_names=classes))


def test_the_order_of_names_could_have_been_made_to_fit() -> None:
    terms = replace(DATED, allow_test_key=True)
    key, service = named(1000, lambda key: key.draw_labels(128, 1000))
    found = examine(service, key, terms)
    assert found.outcome == "no_verdict"
    assert "some order fits any answers" in found.reason
    stated = examine(service, key, replace(terms, blind_choice=True))
    assert stated.owned
    assert any("the examiner's own statement" in each and "name" in each for each in stated.limits)
    key, service = named(10, lambda key: key.draw_labels(128, 10))
    few, plain = examine(service, key, terms), examine(service.predict, key, terms)
    assert few.log10_p is not None
    assert plain.log10_p is not None
    assert few.log10_p == pytest.approx(plain.log10_p + math.log10(math.factorial(10)))
    assert few.forgery_bits == pytest.approx(plain.forgery_bits - math.log2(math.factorial(10)))
    assert any("all 10! orders" in each for each in few.limits)


def test_a_blind_choice_of_names_is_none_of_opened_triggers() -> None:
    """The owner opens those that an innocent answers as drawn; the names were known to all."""
    key, service = named(10, lambda key: np.roll(key.draw_labels(128, 10), 1))
    fits = np.flatnonzero(service.predict(key.frozen["triggers"]) == key.draw_labels(128, 10))
    opened = disclose_triggers(key, [int(each) for each in fits])
    answers = key.draw_labels(128, 10)[fits]
    service = PredictorWithSubject(lambda _: answers, service.subject)
    stated = examine(service, opened, replace(DATED, allow_test_key=True, blind_choice=True))
    plain = examine(service.predict, opened, replace(DATED, allow_test_key=True, blind_choice=True))
    assert stated.log10_p is not None
    assert plain.log10_p is not None
    orders = math.log10(math.factorial(10))
    assert stated.log10_p == pytest.approx(min(0.0, plain.log10_p + orders))
    assert any("all 10! orders" in each for each in stated.limits)
