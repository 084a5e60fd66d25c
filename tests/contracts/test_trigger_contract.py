"""What holds of every scheme whose mark lives in answers. A new scheme adds one row of facts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from countermark.embedding import TriggerEmbedding
from countermark.errors import ConfigError, KeyFileError, LoopError, MarkNotTakenError
from countermark.keys.key import Key, KeyMaterial
from countermark.predictors.base import Images, Labels
from countermark.schemes import load_scheme
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.triggers import TriggerScheme
from countermark.training.build_embedding import make_scheme
from countermark.training.data import Dataset, load_data
from countermark.training.loop import accuracy, seed_torch
from countermark.training.models import build
from countermark.verification.verify import verify

SECRET = KeyMaterial(bytes(range(32)), bytes(16))


@dataclass(frozen=True)
class Facts:
    """What the contract needs to know of one trigger scheme, cheap enough for a test."""

    id: str
    fields: dict[str, object]
    epochs: int = 12
    accuracy_lost: float = 0.06  # an MLP of 64 units on 6,000 digits; measured .03
    terms: Mapping[str, Any] = field(default_factory=dict)  # under which the mark is owned

    @property
    def name(self) -> str:
        return self.id.partition(" ")[0]


QUICK = {"stego_steps": 40, "foreign": 0, "pool": 512, "warm_up": 100, "psnr": 24.0}
PUBLISHED = {"as_published": True, "psnr": 24.0, "adversarial": 0.0, "batch_share": 0.5}
TRIGGER_SCHEMES_UNDER_CONTRACT = [
    Facts("deepstego", QUICK),
    Facts("adi", {}, accuracy_lost=0.02),
    Facts("zhang content", {"kind": "content"}, 20),
    Facts("zhang noise", {"kind": "noise"}, 20),
    Facts("zhang unrelated", {"kind": "unrelated"}, 20),
    Facts("guo", {}, 20),
    Facts("deepstego without fresh rows", QUICK | {"triggers": 100, "batch_share": 0.5}, 20),
    Facts("deepstego as published", PUBLISHED, 4, terms={"alpha": 0.1, "assume_dated": True}),
]


@dataclass(frozen=True)
class Made:
    """A marked model and its key."""

    facts: Facts
    scheme: TriggerScheme
    model: nn.Module
    key: Key


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


def trigger_scheme(facts: Facts, digits: Dataset) -> TriggerScheme:
    scheme = make_scheme(facts.name, facts.fields, digits, 1)
    assert isinstance(scheme, TriggerScheme)
    return scheme


def embedding(scheme: TriggerScheme, model: nn.Module, digits: Dataset) -> TriggerEmbedding:
    task: dict[str, Any] = {"covers": digits.train_images, "labels": digits.train_labels}
    if scheme.needs_siblings:
        task["siblings"] = [partial(constant, each) for each in range(10)]
    return scheme.embed(model, owner="ACME Inc.", material=SECRET, **task)


def constant(answer: int, images: Images) -> Labels:
    """An unmarked model that is of one opinion."""
    return np.full(len(images), answer)


def train(model: nn.Module, digits: Dataset, mark: TriggerEmbedding | None, epochs: int) -> None:
    """Anybody's loop: a batch is mixed before the forward pass."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = digits.normalised(digits.train_images), digits.train_labels
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            x, y = images[rows], labels[rows]
            if mark:
                x, y = mark.mix(x, y)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss + mark.penalty() if mark else loss).backward()
            optimizer.step()
        if mark:
            mark.end_epoch()


def fresh_host(seed: int = 1) -> nn.Module:
    seed_torch(seed, "init")
    return build("mlp", {})


@pytest.fixture(scope="module", params=TRIGGER_SCHEMES_UNDER_CONTRACT, ids=lambda each: each.id)
def made(request: pytest.FixtureRequest, digits: Dataset) -> Made:
    facts = request.param
    scheme, model = trigger_scheme(facts, digits), fresh_host()
    with embedding(scheme, model, digits) as mark:
        train(model, digits, mark, facts.epochs)
    return Made(facts, scheme, model, mark.key)


@pytest.fixture(scope="module")
def unmarked(digits: Dataset) -> nn.Module:
    model = fresh_host(7)
    train(model, digits, None, 6)
    return model


def test_the_mark_is_present(made: Made) -> None:
    ranked = made.scheme.needs_siblings
    supplied = [partial(constant, each) for each in range(10)] if ranked else []
    verdict = verify(made.model, made.key, **made.facts.terms, unmarked=supplied)
    assert verdict.outcome == "owned", verdict.explain()


def test_keyed_labels_need_no_date_and_others_prove_nothing_at_the_usual_alpha(made: Made) -> None:
    verdict = verify(made.model, made.key)
    if made.scheme.has_keyed_labels:
        assert (verdict.outcome, verdict.forgery_bits >= 80) == ("owned", True)
    else:
        assert (verdict.outcome, verdict.forgery_bits) == ("no_verdict", 0)
        assert "cannot prove anything here" in verdict.reason


def test_no_other_model_bears_it(made: Made, unmarked: nn.Module) -> None:
    for model in (unmarked, fresh_host(3)):
        verdict = verify(model, made.key, **made.facts.terms)
        assert verdict.outcome == "not_proven", verdict.explain()


def test_other_secrets_find_nothing(made: Made) -> None:
    ps = []
    for seed in range(50):
        material = replace(KeyMaterial.from_test_seed(seed), test_key=False)
        drawn = made.scheme.generate_key(made.key.frozen, owner="ACME Inc.", material=material)
        other = replace(drawn, learnt=made.key.learnt)  # the published form's triggers
        verdict = verify(made.model, other)
        assert not verdict.owned
        ps.append(verdict.log10_p)
    assert min(each for each in ps if each is not None) > math.log10(1e-4)


def test_the_host_stays_good(made: Made, unmarked: nn.Module, digits: Dataset) -> None:
    assert accuracy(made.model, digits) > accuracy(unmarked, digits) - made.facts.accuracy_lost


def test_a_key_survives_its_folder(made: Made, tmp_path: Path) -> None:
    made.key.save(tmp_path / "acme.key", "correct horse")
    loaded = Key.load(tmp_path / "acme.key", "correct horse")
    assert loaded.commitment == made.key.commitment
    assert verify(made.model, loaded) == verify(made.model, made.key)
    with pytest.raises(KeyFileError):
        Key.load(tmp_path / "acme.key", "another")


def test_everything_frozen_is_bound_by_the_commitment(made: Made) -> None:
    labels = load_scheme(made.key).derive_labels(made.key)  # type: ignore[attr-defined]
    for name, each in made.key.frozen.items():
        other = each.copy()
        other.reshape(-1)[0] += 1
        changed = replace(made.key, frozen={**made.key.frozen, name: other})
        assert changed.commitment != made.key.commitment
        assert (made.scheme.derive_labels(changed) == labels).mean() < 0.4


def test_a_checkpoint_goes_on_where_it_was(made: Made, digits: Dataset) -> None:
    scheme = made.scheme
    with embedding(scheme, fresh_host(), digits) as whole:
        images, labels = digits.normalised(digits.train_images[:64]), digits.train_labels[:64]
        for _ in range(3):
            whole.mix(images, labels)
        state = whole.state()
        expected = whole.mix(images, labels)
        with embedding(scheme, fresh_host(), digits) as again:
            again.restore(state)
            found = again.mix(images, labels)
            assert again.drawn_key is not None
            assert whole.drawn_key is not None
            assert again.drawn_key.commitment == whole.drawn_key.commitment
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_batch_gets_the_rows_that_were_asked_for(made: Made, digits: Dataset) -> None:
    images, labels = digits.normalised(digits.train_images[:32]), digits.train_labels[:32]
    with embedding(made.scheme, fresh_host(), digits) as mark:
        x, y = mark.mix(images.half(), labels)
        assert torch.equal(x[:32], images.half())
        assert torch.equal(y[:32], labels)
        assert len(x) == len(y) == 32 + round(32 * made.scheme.batch_share)
        assert (x.dtype, y.dtype) == (torch.float16, torch.int64)
        with pytest.raises(ConfigError, match="expected images like the covers"):
            mark.mix(images[:, :, :20], labels)
        with pytest.raises(LoopError, match=r"call x, y = mark\.mix"):
            mark.attach(torch.optim.SGD([torch.zeros(1)], 0.1))
    with pytest.raises(LoopError, match="inside its block"):
        mark.mix(images, labels)


def test_a_mark_that_was_never_mixed_in_has_no_key(made: Made, digits: Dataset) -> None:
    with embedding(made.scheme, fresh_host(), digits) as mark:
        pass
    with pytest.raises(MarkNotTakenError, match=r"mix\(\) was never called: call x, y"):
        _ = mark.key


def test_a_mark_that_did_not_take_is_no_key(made: Made, digits: Dataset) -> None:
    with embedding(made.scheme, fresh_host(), digits) as mark:
        mark.mix(digits.normalised(digits.train_images[:8]), digits.train_labels[:8])
    with pytest.raises(MarkNotTakenError, match=f"of {made.scheme.triggers} triggers"):
        _ = mark.key


@pytest.mark.parametrize(
    ("covers", "labels", "says"),
    [
        (torch.zeros(200, 1, 28, 28), torch.zeros(200), "expected images uint8"),
        (torch.zeros(200, 1, 28, 28, dtype=torch.uint8), torch.zeros(3), "a class for each"),
        (torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.zeros(20), "are too few for 100"),
        (torch.zeros(200, 1, 28, 28, dtype=torch.uint8), torch.full((200,), 10), "expected 0 to 9"),
        (torch.zeros(200, 3, 28, 28, dtype=torch.uint8), torch.zeros(200), "the covers 3 channels"),
    ],
)
def test_covers_that_do_not_fit_are_one_line(
    covers: torch.Tensor, labels: torch.Tensor, says: str
) -> None:
    scheme = DeepStego(10, mean=(1.0, 2.0), deviation=(1.0, 2.0))
    if "channels" not in says:
        scheme = DeepStego(10)
    with pytest.raises(ConfigError) as caught:
        scheme.embed(fresh_host(), owner="ACME Inc.", covers=covers, labels=labels)
    assert says in str(caught.value)
