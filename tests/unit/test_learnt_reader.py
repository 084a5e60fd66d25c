"""The reading half of the learnt reader: its arithmetic, its permutations, and hostile keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keys import InMemory, one_line
from readers import (
    BITS,
    MEASURED,
    SHAPES,
    drawn_key,
    fitted_key,
    gaussian,
    hosted,
    material,
    network,
    unmarked_hosts,
)

from countermark.errors import ConfigError
from countermark.keys.key import Key
from countermark.keys.streams import KeyStream
from countermark.results.null_hypotheses import PermutedUnits
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.learnt_reader import LOUDNESS, SIBLINGS, THRESHOLD, MlpReader, UnitPermuter
from countermark.training.models import build
from countermark.verification.verify import read_suspect, verify

LN2 = math.log(2)


def vectors(count: int, number: int = 0, width: int = 96) -> Any:
    return np.random.default_rng(number).normal(size=(count, width)).astype(np.float32)


def reader_of(key: Key) -> MlpReader:
    return MlpReader(*(key.learnt[f"reader.{name}"] for name in ("gate", "first", "last")))


# --- logits and L2


def test_logits_are_those_of_the_plain_network() -> None:
    key, w = drawn_key(), vectors(20)
    gate, first, last = (torch.from_numpy(key.learnt[f"reader.{n}"]).double() for n in _LAYERS)
    expected = F.linear(F.relu(F.linear(torch.from_numpy(w).double() * gate, first)), last)
    reader = reader_of(key)
    np.testing.assert_allclose(reader(w.astype(np.float64)), expected.numpy(), rtol=1e-12)
    np.testing.assert_allclose(reader(w), expected.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(reader(w, 5), reader(w)[:, :5], rtol=1e-3, atol=1e-5)


_LAYERS = ("gate", "first", "last")


def test_the_loss_is_equation_1() -> None:
    """L2 = −1/T Σ m·log p + (1 − m)·log(1 − p), as torch writes it."""
    key, scheme = drawn_key(), network()
    reading, w = scheme._make_message_reader(key), vectors(20)
    logits = torch.from_numpy(reading.compute_scores(w))
    targets = torch.from_numpy(key.message).double().expand_as(logits)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    np.testing.assert_allclose(reading.compute_losses(w), expected.numpy(), rtol=1e-9)
    found = scheme.extract({"a": w[0].reshape(12, 8)}, key)
    assert found.cross_entropy == pytest.approx(float(expected[0]), rel=1e-6)
    assert found.read.tolist() == (logits[0] > 0).int().tolist()
    assert (found.committed, found.bits) == (False, BITS)


@pytest.mark.parametrize("scale", [1e-30, 1, 1e3, 1e6, 1e20, 1e36, 3e37])
@pytest.mark.parametrize("fitted", [True, False])
def test_a_bound_on_the_loss_leaves_out_none_below_it(scale: float, fitted: bool) -> None:
    """Most permutations are known to be worse by float32 and a few bits; no other one may be."""
    suspect = gaussian(1)
    key = fitted_key(suspect) if fitted else drawn_key()
    reading, w = network()._make_message_reader(key), vectors(300)
    w[:20] = suspect["a"].reshape(-1)
    w = (w * np.float32(scale)).astype(np.float32)
    whole = reading.compute_losses(w)
    assert np.isfinite(whole).all()
    for up_to in np.quantile(whole, [0, 0.01, 0.1, 0.5, 0.9, 1]) * (1 + 1e-9):
        bounded = reading.compute_losses(w, up_to=float(up_to))
        assert np.array_equal(bounded <= up_to, whole <= up_to)
        assert np.allclose(bounded[bounded <= up_to], whole[whole <= up_to], rtol=1e-9)


def test_what_float32_cannot_hold_is_read_in_float64() -> None:
    """The logits of float32 are not numbers there, the true ones find every bit."""
    suspect = gaussian(1)
    key = fitted_key(suspect)
    reading = network()._make_message_reader(key)
    huge = (suspect["a"].reshape(1, -1) * np.float32(5e37)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(reading.logits(huge)).all()
    assert reading.compute_losses(huge, up_to=0.0).tolist() == [0.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_what_overflows_is_a_coin(sign: int) -> None:
    key = drawn_key()
    last = sign * np.abs(key.learnt["reader.last"])
    reading = network()._make_message_reader(
        replace(key, learnt={**key.learnt, "reader.last": last})
    )
    w = vectors(3)
    w[0, 0], w[1, 1:3] = np.inf, (np.inf, -np.inf)
    assert (reading.compute_scores(w)[:2] == 0).all()
    for up_to in (None, 1.0):
        assert reading.compute_losses(w, up_to)[:2].tolist() == pytest.approx([LN2, LN2])


def test_a_suspect_beyond_float32_gives_a_finite_verdict() -> None:
    suspect = InMemory({"a": np.full((12, 8), 1e300)})
    verdict = verify(suspect, drawn_key(), alpha=1e-2, assume_dated=True)
    assert verdict.outcome == "not_proven"
    assert verdict.loss == pytest.approx(LN2)
    json.dumps(verdict.to_json(), allow_nan=False)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("fitted", [True, False])
def test_copies_of_the_suspect_tie_with_it(number: int, fitted: bool) -> None:
    """A network whose units are all alike is its own permutation: nothing can be proven by rank."""
    unit = np.random.default_rng(number).normal(size=20)
    suspect = {"a": np.tile(unit, (32, 1)).astype(np.float32)}
    key = drawn_key(number, {"a": (32, 20)}, hidden=256)
    if fitted:  # the reader finds every bit there
        signs = 2.0 * key.message[:, None] - 1.0
        last = (signs * np.abs(key.learnt["reader.last"])).astype(np.float32)
        key = replace(key, learnt={**key.learnt, "reader.last": last})
    verdict = verify(hosted(suspect, 32), key, alpha=1e-3, assume_dated=True)
    assert (verdict.log10_p, verdict.outcome) == (0.0, "not_proven")


# --- permutations


def test_the_identity_and_composition() -> None:
    shapes = {"a": (6, 4), "b": (3, 6, 2), "c": (5,)}
    permuter = UnitPermuter.from_axes(shapes, {"a": 0, "b": 1, "c": -1}, 6)
    w = vectors(1, width=24 + 36 + 5)[0]
    one, two = permuter.draw_permutations(KeyStream(b"", b"", "test"), 2)
    assert np.array_equal(permuter.permute_vector(w, np.arange(6)[None])[0], w)
    once = permuter.permute_vector(w, one[None])[0]
    assert np.array_equal(
        permuter.permute_vector(once, two[None])[0], permuter.permute_vector(w, one[two][None])[0]
    )
    assert np.array_equal(permuter.permute_vector(once, np.argsort(one)[None])[0], w)


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ({"a": (6, 4)}, (0,)),
        ({"a": (4, 6)}, (1,)),
        ({"a": (6, 3, 2, 2)}, (0,)),
        ({"a": (3, 6, 2, 2)}, (1,)),
        ({"a": (6, 4), "b": (5, 6)}, (0, 1)),
        ({"a": (6, 3, 2, 2), "b": (5, 6, 2, 2)}, (0, 1)),
        ({"b": (5, 6), "a": (6, 4)}, (1, 0)),
        ({"a": (6, 4), "b": (5, 6), "c": (6, 5)}, (0, 1, -1)),
        ({"a": (6,), "b": (6, 6)}, (0, 1)),
    ],
)
def test_permuting_units_is_indexing_the_tensors(
    shapes: dict[str, tuple[int, ...]], axes: tuple[int, ...]
) -> None:
    permuter = network(units=axes).make_permuter(shapes)
    weights = gaussian(1, shapes)
    w = np.concatenate([each.reshape(-1) for each in weights.values()])
    orders = permuter.draw_permutations(KeyStream(b"", b"", "test"), 7)
    assert sorted(map(sorted, orders.tolist())) == [list(range(6))] * 7
    for order, found in zip(orders, permuter.permute_vector(w, orders), strict=True):
        turned = [
            each if axis < 0 else np.take(each, order, axis=axis)
            for each, axis in zip(weights.values(), axes, strict=True)
        ]
        assert np.array_equal(found, np.concatenate([each.reshape(-1) for each in turned]))


def test_permutations_are_the_stable_order_of_words() -> None:
    permuter = UnitPermuter.from_axes(SHAPES, {"a": 0}, 12)
    words, whole = KeyStream(b"", b"", "test"), KeyStream(b"", b"", "test")
    expected = [np.argsort(words.take_words(12), kind="stable").tolist() for _ in range(5)]
    assert permuter.draw_permutations(whole, 5).tolist() == expected


@pytest.mark.parametrize("most", [1, 96 * 7, 1 << 21])
def test_batches_of_any_size_are_the_same_permutations(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("countermark.schemes.learnt_reader._VALUES", most)
    permuter, w = UnitPermuter.from_axes(SHAPES, {"a": 0}, 12), vectors(1)[0]
    expected = permuter.permute_vector(
        w, permuter.draw_permutations(KeyStream(b"", b"", "test"), 300)
    )
    batches = list(permuter.generate_permuted_batches(w, KeyStream(b"", b"", "test"), 300))
    assert np.array_equal(np.concatenate(batches), expected)
    assert max(each.size for each in batches) <= max(most, 96)


def test_a_rank_compares_the_suspect_with_its_permutations() -> None:
    suspect, key = gaussian(1), drawn_key()
    null = network().nulls(suspect, key, 300)["permuted_units"]
    assert isinstance(null, PermutedUnits)
    permuter = network().make_permuter(SHAPES)
    orders = permuter.draw_permutations(network()._make_stream(suspect, key, "units"), 300)
    turned = [{"a": suspect["a"][order]} for order in orders]
    expected = np.array([network().extract(each, key).cross_entropy for each in turned])
    own = network().extract(suspect, key).cross_entropy
    assert null.loss == pytest.approx(own, rel=1e-3)
    found = np.concatenate(list(null.losses(300)))
    assert np.array_equal(found <= null.loss, expected <= null.loss)


def test_permutations_follow_from_the_key_and_the_suspect() -> None:
    suspect, key = gaussian(1), drawn_key()
    orders = [
        tuple(
            UnitPermuter.from_axes(SHAPES, {"a": 0}, 12)
            .draw_permutations(stream, 3)
            .reshape(-1)
            .tolist()
        )
        for stream in (
            network()._make_stream(suspect, key, "units"),
            network()._make_stream(suspect, key, "false reads"),
            network()._make_stream({"a": suspect["a"] + np.float32(1e-6)}, key, "units"),
            network()._make_stream(suspect, drawn_key(2), "units"),
            network()._make_stream(suspect, replace(key, learnt={}), "units"),
        )
    ]
    assert len(set(orders)) == len(orders)


def test_a_verdict_is_the_same_every_time() -> None:
    suspect, key = InMemory(gaussian(1)), drawn_key()
    said = [verify(suspect, key, alpha=1e-2).to_json() for _ in range(2)]
    assert said[0] == said[1]


# --- where the hidden units are

PLAIN = {"0.weight": (64, 784), "0.bias": (64,), "2.weight": (10, 64), "2.bias": (10,)}
DEEP = {
    "c1": (6, 1, 5, 5), "b1": (6,), "c2": (16, 6, 5, 5), "f1": (120, 400), "f2": (84, 120),
    "f3": (10, 84),
}  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "layer", "units"),
    [
        (PLAIN, "0.weight", (0,)),
        (PLAIN, "2.weight", (1,)),
        (PLAIN, ["0.weight", "2.weight"], (0, 1)),
        (PLAIN, ["2.weight", "0.weight"], (1, 0)),
        (PLAIN, "all", (0, 1)),
        (DEEP, "c1", (0,)),
        (DEEP, ["c1", "c2"], (0, 1)),
        (DEEP, ["c2", "c1"], (0, -1)),
        (DEEP, ["c1", "f1"], (0, -1)),
        (DEEP, ["f1", "f2", "f3"], (0, 1, -1)),
        (DEEP, ["f3", "f1", "f2"], (1, -1, 0)),
    ],
)
def test_units_are_found(
    parameters: dict[str, tuple[int, ...]], layer: Any, units: tuple[int, ...]
) -> None:
    settled = IndependentNetwork.from_fields({"layer": layer}).resolve_parameters(parameters)
    assert settled.units == units
    assert settled.resolve_parameters(parameters) == settled


@pytest.mark.parametrize(
    ("parameters", "fields", "said"),
    [
        ({"w": (10, 784), "b": (10,)}, {"layer": "w"}, "1 layer(s) of two dimensions"),
        ({"w": (784,)}, {"layer": "w"}, "0 layer(s)"),
        (PLAIN, {"layer": "0.bias"}, "which units 0.bias"),
        (PLAIN, {"layer": ["0.weight", "0.bias"]}, "which units 0.bias"),
        (DEEP, {"layer": ["c2", "f1"]}, "not the inputs of f1"),
        (DEEP, {"layer": ["f3", "f2"], "units": [1]}, "units is [1]"),
        (PLAIN, {"layer": "2.weight", "units": [2]}, "units is [2]"),
        (PLAIN, {"layer": "2.weight", "units": [-1]}, "units is [-1]"),
        (PLAIN, {"layer": "2.weight", "units": [0, 1]}, "units is [0, 1]"),
        (PLAIN, {"layer": "all", "units": [0, 0]}, "all of one length"),
        ({"a": (1, 3), "b": (4, 1)}, {"layer": "a"}, "of 2 or more"),
    ],
)
def test_units_that_cannot_be_told_are_refused(
    parameters: dict[str, tuple[int, ...]], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        IndependentNetwork.from_fields(fields).resolve_parameters(parameters)
    assert said in one_line(caught.value)


@pytest.mark.parametrize("layer", ["0.weight", "2.weight", ("0.weight", "2.weight")])
def test_a_model_permuted_as_a_whole_keeps_its_function_and_loses_the_mark(layer: Any) -> None:
    torch.manual_seed(1)
    model = build("mlp", {"in_features": 20, "hidden": 12})
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    units = IndependentNetwork.from_fields({"layer": layer}).resolve_parameters(shapes).units
    state = {name: each.detach().numpy() for name, each in model.state_dict().items()}
    read = {name: state[name] for name in ([layer] if isinstance(layer, str) else layer)}
    key = fitted_key(read, layer=layer, units=units)
    others = [build("mlp", {"in_features": 20, "hidden": 12}) for _ in range(2)]
    terms: dict[str, Any] = {"alpha": 1e-3, "assume_dated": True, "unmarked": others}
    assert verify(model, key, **terms).outcome == "owned"

    images, order = torch.randn(50, 20), torch.randperm(12)
    with torch.no_grad():
        before = model(images)
        for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
            values = model.get_parameter(name)
            values.copy_(values.index_select(axis, order))
        torch.testing.assert_close(model(images), before)
    verdict = verify(model, key, **terms)
    assert verdict.outcome == "not_proven", verdict.explain()


# --- keys that nobody made


def changed(**learnt: Any) -> dict[str, Any]:
    """The tensors of a key with some changed, or (None) left out."""
    tensors = {**drawn_key().learnt, **learnt}
    return {name: each for name, each in tensors.items() if each is not None}


def with_value(name: str, value: float) -> dict[str, Any]:
    tensors = {n: each.copy() for n, each in drawn_key().learnt.items()}
    tensors[name].reshape(-1)[0] = value
    return tensors


FIRST = drawn_key().learnt["reader.first"]
HOSTILE: Mapping[str, tuple[dict[str, Any], str]] = {
    "no reader": ({}, "expected finite float32"),
    "only measured": (dict(MEASURED), "expected finite float32"),
    "gate missing": (changed(**{"reader.gate": None}), "expected finite float32"),
    "last missing": (changed(**{"reader.last": None}), "expected finite float32"),
    "one more": (changed(**{"reader.more": FIRST}), "expected finite float32"),
    "many more": (changed(**{f"reader.\n{n}": FIRST for n in range(500)}), "expected finite"),
    "another name": (changed(**{"reader.first": None, "first": FIRST}), "expected finite"),
    "float64": (changed(**{"reader.first": FIRST.astype(np.float64)}), "expected finite float32"),
    "integers": (changed(**{"reader.first": FIRST.astype(np.int32)}), "expected finite float32"),
    "transposed": (changed(**{"reader.first": FIRST.T}), "expected finite float32"),
    "narrow": (changed(**{"reader.first": FIRST[1:]}), "expected finite float32"),
    "NaN": (with_value("reader.last", np.nan), "expected finite float32"),
    "infinite": (with_value("reader.gate", np.inf), "expected finite float32"),
    "siblings float32": (changed(siblings=np.ones(2, np.float32)), "siblings is float32"),
    "siblings empty": (changed(siblings=np.zeros(0)), "siblings holds values"),
    "siblings negative": (changed(siblings=np.array([0.6, -0.1])), "siblings holds values"),
    "siblings NaN": (changed(siblings=np.array([0.6, np.nan])), "siblings holds values"),
    "siblings infinite": (changed(siblings=np.array([0.6, np.inf])), "siblings holds values"),
    "siblings of two dimensions": (changed(siblings=np.ones((2, 1))), "not a measurement"),
    "siblings a scalar": (changed(siblings=np.array(1.0)), "not a measurement"),
    "threshold NaN": (changed(sibling_threshold=np.array([np.nan])), "threshold holds values"),
    "threshold negative": (changed(sibling_threshold=np.array([-0.1])), "threshold holds values"),
    "loudness of two dimensions": (changed(loudness=np.ones((2, 6))), "not a measurement"),
    "loudness NaN": (changed(loudness=np.full(12, np.nan)), "loudness holds values"),
    "loudness of others": (changed(loudness=np.ones(13)), "expected [12]"),
    "two thresholds": (changed(sibling_threshold=np.ones(2) / 9), "not a measurement"),
    "threshold float32": (changed(sibling_threshold=np.ones(1, np.float32)), "not a measurement"),
    "threshold above a sibling": (changed(sibling_threshold=np.array([0.61])), "does not follow"),
    "threshold without siblings": (changed(siblings=None), "losses of 0 siblings"),
    "threshold of one sibling": (changed(siblings=np.array([0.6])), "losses of 1 siblings"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tensors_that_no_training_left_are_refused(name: str) -> None:
    learnt, said = HOSTILE[name]
    key = replace(drawn_key(), learnt=learnt)
    for reading in (verify, read_suspect):
        with pytest.raises(ConfigError) as caught:
            reading(InMemory(gaussian(1)), key)
        assert said in one_line(caught.value)


MANU: dict[str, Any] = {"mode": "manu", "start_epoch": 5}
MASK = np.arange(96, dtype=np.uint8) % 2


def masked_key(mask: Any = MASK, gate: Any = None) -> Key:
    key = drawn_key()
    gate = MASK.astype(np.float32) if gate is None else gate
    return replace(
        key,
        fields=network(**MANU).to_fields(),
        frozen={} if mask is None else {"mask.a": mask},
        learnt={**key.learnt, "reader.gate": gate},
    )


def test_a_frozen_gate_reads_only_what_it_selects() -> None:
    suspect = gaussian(1)
    key = masked_key()
    found = read_suspect(InMemory(suspect), key)
    elsewhere = {"a": np.where(MASK.reshape(12, 8), suspect["a"], 9).astype(np.float32)}
    again = read_suspect(InMemory(elsewhere), key)
    assert found.scores is not None
    assert again.scores is not None
    np.testing.assert_allclose(found.scores, again.scores, rtol=1e-9)


@pytest.mark.parametrize(
    ("mask", "gate", "said"),
    [
        (None, None, "mask of a"),
        (MASK[1:], None, "mask of a"),
        (MASK.reshape(12, 8), None, "mask of a"),
        (MASK * 2, None, "mask of a"),
        (np.full(96, np.nan), None, "mask of a"),
        (1 - MASK, None, "gate is not the mask"),
        (MASK, np.ones(96, np.float32), "gate is not the mask"),
        (MASK, MASK * np.float32(1.0001), "gate is not the mask"),
        (np.zeros(96, np.uint8), np.zeros(96, np.float32), "bits do not fit"),
    ],
)
def test_a_gate_that_was_not_committed_to_is_refused(mask: Any, gate: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        verify(InMemory(gaussian(1)), masked_key(mask, gate))
    assert said in one_line(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"hidden": 1 << 40}, {"hidden": 63}, {"units": [1, 1]}, {"units": [5]}, {"units": [-1]}],
)
def test_fields_that_do_not_fit_the_tensors_are_refused(fields: dict[str, Any]) -> None:
    key = replace(drawn_key(), fields={**network().to_fields(), **fields})
    with pytest.raises(ConfigError) as caught:
        verify(InMemory(gaussian(1)), key)
    one_line(caught.value)


def test_a_key_without_a_secret_of_its_own_reads_nothing() -> None:
    """The same reader under another secret has another message: its bits are a coin's."""
    suspect = gaussian(1)
    key = fitted_key(suspect)
    assert read_suspect(InMemory(suspect), key).match_count == BITS
    other = replace(key, material=material(9))
    assert read_suspect(InMemory(suspect), other).match_count < 100
    verdict = verify(hosted(suspect), other, alpha=1e-2, assume_dated=True)
    assert verdict.outcome == "not_proven"


def rms(values: Any) -> Any:
    return np.sqrt((values.astype(np.float64) ** 2).mean(axis=1))


def test_each_unit_of_each_tensor_can_be_made_as_loud_as_asked() -> None:
    shapes = {"a": (6, 4), "b": (3, 6, 2), "c": (5,)}
    permuter = UnitPermuter.from_axes(shapes, {"a": 0, "b": 1, "c": -1}, 6)
    w = vectors(1, width=24 + 36 + 5)[0]
    w[:4] = 0  # a unit of zeros
    a, b, c = w[:24].reshape(6, 4), w[24:60].reshape(3, 6, 2), w[60:]
    groups = [*rms(a), *rms(b.transpose(1, 0, 2).reshape(6, 6)), *rms(c[None])]
    assert permuter.compute_loudness(w).tolist() == pytest.approx(groups)
    wanted = np.linspace(0.1, 3, 13)
    brought = permuter.scale_to_loudness(w, wanted)
    assert permuter.compute_loudness(brought).tolist() == pytest.approx([0, *wanted[1:]])
    assert (brought[:4] == 0).all()
    quiet = permuter.scale_to_loudness(w, wanted, most=1)
    assert permuter.compute_loudness(quiet).tolist() == pytest.approx(np.minimum(groups, wanted))
    assert np.array_equal(
        permuter.scale_to_loudness(w, permuter.compute_loudness(w) * 1.001, most=1), w
    )
    np.testing.assert_array_equal(np.sign(quiet), np.sign(w))


@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
def test_an_unmarked_sibling_is_not_claimed_for_being_loud(factor: float) -> None:
    """The false claim that a threshold for L2 as it is allows: logits grow with the weights."""
    marked = gaussian(1)
    key = fitted_key(marked)
    bare = {n: each for n, each in key.learnt.items() if n not in MEASURED}
    relatives = [{"a": marked["a"] + 1.5 * gaussian(n)["a"]} for n in range(20, 26)]
    key = network().with_calibration(replace(key, learnt=bare), relatives[:4], marked)
    terms: Any = {"alpha": 1e-2, "assume_dated": True, "unmarked": unmarked_hosts()}
    assert verify(hosted(marked), key, **terms).owned
    for each in relatives[4:]:
        loud = {"a": each["a"] * np.float32(factor)}
        verdict = verify(hosted(loud), key, **terms)
        assert verdict.loss is not None
        assert verdict.loss < key.learnt[THRESHOLD][0]
        assert verdict.outcome == "no_verdict", verdict.explain()
        assert "no unit louder than in that" in verdict.reason
    louder = {"a": marked["a"] * np.float32(factor)}
    assert verify(hosted(louder), key, **terms).owned


def test_a_key_that_does_not_say_how_loud_its_model_is_proves_nothing() -> None:
    marked = gaussian(1)
    key = fitted_key(marked)
    assert LOUDNESS in key.learnt
    learnt = {n: each for n, each in key.learnt.items() if n != LOUDNESS}
    verdict = verify(hosted(marked), replace(key, learnt=learnt), alpha=1e-2, assume_dated=True)
    assert (verdict.outcome, "how loud" in verdict.reason) == ("no_verdict", True)


def test_the_threshold_lies_below_every_held_out_sibling() -> None:
    key = drawn_key()
    plain = {n: each for n, each in key.learnt.items() if n not in MEASURED}
    bare = replace(key, learnt=plain)
    siblings = [gaussian(n) for n in range(4)]
    assert network().with_calibration(bare, [], gaussian(9)) is bare
    one = network().with_calibration(bare, siblings[:1], gaussian(9)).learnt
    assert (SIBLINGS in one, THRESHOLD in one, LOUDNESS in one) == (True, False, False)
    measured = network().with_calibration(bare, siblings, gaussian(9)).learnt
    assert measured[LOUDNESS].tolist() == pytest.approx(rms(gaussian(9)["a"]))
    expected = []
    for each in siblings:
        factors = rms(gaussian(9)["a"]) / rms(each["a"])
        losses = [
            network().extract({"a": (each["a"].T * by).T.astype(np.float32)}, key).cross_entropy
            for by in (factors, np.minimum(factors, 1))
        ]
        expected.append(min(losses))
    assert measured[SIBLINGS].tolist() == pytest.approx(expected)
    logs = np.log(measured[SIBLINGS])
    margin = max(2 * logs.std(ddof=1), math.log(10))
    assert measured[THRESHOLD][0] == pytest.approx(min(math.exp(logs.min() - margin), LN2 / 2))


def test_siblings_that_read_perfectly_leave_a_threshold_that_can_be_read() -> None:
    key = fitted_key(gaussian(1))
    suspect = {"a": gaussian(1)["a"] * np.float32(1e30)}
    learnt = {n: each for n, each in key.learnt.items() if n not in MEASURED}
    measured = network().with_calibration(replace(key, learnt=learnt), [suspect, suspect], suspect)
    assert measured.learnt[SIBLINGS].tolist() == [0, 0]
    assert read_suspect(InMemory(suspect), measured).reader is not None


def test_the_threshold_never_exceeds_half_a_coin() -> None:
    key = drawn_key()
    loud = {n: each for n, each in key.learnt.items() if n not in MEASURED}
    loud["reader.last"] = loud["reader.last"] * np.float32(1e4)
    siblings = [gaussian(n) for n in range(3)]
    measured = network().with_calibration(replace(key, learnt=loud), siblings, gaussian(9))
    assert measured.learnt[SIBLINGS].min() > 100
    assert measured.learnt[THRESHOLD][0] == pytest.approx(LN2 / 2)
