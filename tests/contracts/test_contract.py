"""The contract that every form of every scheme keeps, one test a law; forms stand in `facts`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from contracts.facts import (
    DATA,
    OWNER,
    SCHEMES_UNDER_CONTRACT,
    Facts,
    every_form,
    foreign_key,
    fresh_host,
    material_of,
)  # fmt: skip
from contracts.test_output_contract import OUTPUT_SCHEMES_UNDER_CONTRACT
from contracts.test_trigger_contract import TRIGGER_SCHEMES_UNDER_CONTRACT
from countermark.keys.key import Key
from countermark.results.statistics import compute_log10_binomial_tail
from countermark.results.verdict import Verdict, VerificationOptions
from countermark.schemes import SCHEMES, load_scheme
from countermark.training.loop import Course, accuracy, fit
from countermark.training.models import recipe
from countermark.verification.verify import examine, read_suspect, verify
from draws import remember


@dataclass(frozen=True)
class Marked:
    """A trained host of one form, its key, and the unmarked twin."""

    facts: Facts
    model: nn.Module
    key: Key
    accuracy: float
    unmarked_accuracy: float


@pytest.fixture(scope="session")
def marked_hosts() -> dict[str, Marked]:
    return {}


@pytest.fixture
def marked(facts: Facts, marked_hosts: dict[str, Marked]) -> Marked:
    if facts.id not in marked_hosts:
        marked_hosts[facts.id] = train_marked(facts)
    return marked_hosts[facts.id]


def train_marked(facts: Facts) -> Marked:
    host, material = fresh_host(), material_of(facts)
    orders = range(1, 7 if facts.learnt else 2)
    twin, *others = (copy.deepcopy(twin_of_the_host(facts.epochs, each)) for each in orders)
    shown, siblings = [twin, *others[:2]] if facts.learnt else [], others[2:]
    with facts.scheme.embed(
        host, owner=OWNER, material=material, unmarked=shown, siblings=siblings
    ) as mark:
        fit(host, DATA, recipe("mlp"), Course(facts.epochs, seed=1), mark=mark)
    return Marked(facts, host, mark.key, accuracy(host, DATA), accuracy(twin, DATA))


@remember
def twin_of_the_host(epochs: int, order: int) -> nn.Module:
    """The host without the mark, for all forms; with order 1 it sees the data as the host does."""
    twin = fresh_host()
    fit(twin, DATA, recipe("mlp"), Course(epochs, seed=order))
    return twin


def test_every_scheme_is_under_contract() -> None:
    names = {facts.scheme.name for facts in SCHEMES_UNDER_CONTRACT}
    names |= {facts.name for facts in TRIGGER_SCHEMES_UNDER_CONTRACT}
    assert names | set(OUTPUT_SCHEMES_UNDER_CONTRACT) == set(SCHEMES)


@every_form
def test_round_trip(marked: Marked) -> None:
    supplied = [fresh_host(60 + each) for each in range(3)] if marked.facts.learnt else []
    verdict = verify(marked.model, marked.key, **marked.facts.terms, unmarked=supplied)
    assert verdict.outcome == marked.facts.outcome, verdict.explain()
    assert verdict.matched == verdict.bits == marked.facts.scheme.bits
    assert verdict.payload is True


@every_form
def test_accuracy_is_kept(marked: Marked) -> None:
    assert marked.accuracy >= marked.unmarked_accuracy - marked.facts.accuracy_lost


@every_form
def test_no_tensor_of_the_key_is_in_the_model(marked: Marked) -> None:
    plain = fresh_host()
    assert list(marked.model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in marked.model.named_modules()] == [
        name for name, _ in plain.named_modules()
    ]


@every_form
def test_key_survives_the_disk_byte_for_byte(marked: Marked, tmp_path: Path) -> None:
    marked.key.save(tmp_path / "a.key")
    loaded = Key.load(tmp_path / "a.key")
    loaded.save(tmp_path / "b.key")
    for name in ("key.json", "key.safetensors"):
        assert (tmp_path / "a.key" / name).read_bytes() == (tmp_path / "b.key" / name).read_bytes()
    assert np.array_equal(read_suspect(marked.model, loaded).read, marked.key.message)


@every_form
def test_same_secret_gives_the_same_key(facts: Facts, marked: Marked) -> None:
    key = marked.key
    again = load_scheme(key).generate_key(
        key.tensors, owner=key.owner, material=key.material, frozen=key.frozen
    )
    assert again.c0 == key.c0
    assert np.array_equal(again.message, key.message)


def changed_keys(facts: Facts, key: Key) -> Iterator[Key]:
    """The key with one thing changed that the commitment holds."""
    scheme = replace(load_scheme(key), **facts.other)
    yield replace(key, fields=scheme.to_fields())
    yield replace(key, owner=key.owner + " ")
    yield replace(key, tensors={**key.tensors, "extra": (1, 1)})
    flipped = bytes([key.material.secret[0] ^ 1]) + key.material.secret[1:]
    yield replace(key, material=replace(key.material, secret=flipped))
    yield replace(key, material=replace(key.material, nonce=bytes(16)))
    yield replace(key, material=replace(key.material, test_key=not key.test_key))
    for name in key.frozen:
        yield replace(key, frozen={**key.frozen, name: 1 - key.frozen[name]})


@every_form
def test_one_changed_field_redraws_every_bit(facts: Facts, marked: Marked) -> None:
    for other in changed_keys(facts, marked.key):
        agree = int((other.message == marked.key.message).sum())
        assert compute_log10_binomial_tail(agree, marked.key.bits) > -6
        assert compute_log10_binomial_tail(marked.key.bits - agree, marked.key.bits) > -6


@every_form
def test_wrong_key_is_rejected(facts: Facts, marked: Marked) -> None:
    keys = [foreign_key(facts, marked.key, number) for number in range(5)]
    terms = VerificationOptions(**facts.terms, allow_test_key=True)
    require_rejected(facts, [examine(marked.model, key, terms) for key in keys])


@every_form
def test_unmarked_is_not_claimed(marked: Marked) -> None:
    hosts = [fresh_host(seed + 10) for seed in range(5)]
    verdicts = [verify(host, marked.key, **marked.facts.terms) for host in hosts]
    require_rejected(marked.facts, verdicts)


def require_rejected(facts: Facts, verdicts: list[Verdict]) -> None:
    """All say so; but one rank in a thousand reaches an alpha of 1e-3, and may be no verdict."""
    assert not any(each.owned for each in verdicts)
    unclear = [each for each in verdicts if each.outcome != "not_proven"]
    assert len(unclear) <= (1 if facts.learnt else 0), unclear[0].explain()


def test_facts_name_only_fields_of_the_scheme() -> None:
    for facts in SCHEMES_UNDER_CONTRACT:
        assert set(facts.other) <= {each.name for each in fields(facts.scheme)}
