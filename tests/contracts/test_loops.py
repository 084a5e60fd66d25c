"""Every loop embeds what an explicit `loss + penalty` embeds, to 5e-6, and leaves no hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.facts import (
    DATA,
    OWNER,
    SCHEMES_UNDER_CONTRACT,
    Facts,
    covering,
    every_form,
    fresh_host,
)
from countermark.embedding import Embedding
from countermark.errors import LoopError
from countermark.keys.key import KeyMaterial
from countermark.schemes.weights import WeightScheme

X = DATA.normalised(DATA.train_images[:256])
Y = DATA.train_labels[:256]
EPOCHS, BATCH = 3, 32
MATERIAL = KeyMaterial.from_test_seed(3)


@dataclass
class At:
    """Where a loop stands: what it trains, and the batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mark: Embedding
    x: Tensor
    y: Tensor

    def loss(self, part: slice = slice(None)) -> Tensor:
        return F.cross_entropy(self.model(self.x[part]), self.y[part])


Step = Callable[[At], None]


def run(
    model: nn.Module, scheme: WeightScheme, step: Step, *, attach: bool, x: Tensor = X, **sgd: Any
) -> Embedding:
    """Train for a few epochs of a few batches, marking by `penalty` or by `attach`."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, **sgd)
    with scheme.embed(model, owner=OWNER, material=MATERIAL) as mark:
        if attach:
            mark.attach(optimizer)
        for _ in range(EPOCHS):
            for batch in zip(x.split(BATCH), Y.split(BATCH), strict=True):
                step(At(model, optimizer, mark, *mark.mix(*batch)))
                optimizer.zero_grad()
            mark.end_epoch()
    return mark


def strong(facts: Facts) -> WeightScheme:
    """The form, so strong that a few steps move the weights; the usual λ of a reader is small."""
    return facts.scheme if facts.scheme.linear else replace(facts.scheme, strength=1.0)


def explicit(at: At) -> None:
    (at.loss() + at.mark.penalty()).backward()
    at.optimizer.step()


def explicit_autocast(at: At) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = at.loss() + at.mark.penalty()
    loss.backward()
    at.optimizer.step()


def plain(at: At) -> None:
    at.loss().backward()
    at.optimizer.step()


def autocast(at: At) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = at.loss()
    loss.backward()
    at.optimizer.step()


def accumulated(at: At) -> None:
    for start in range(0, BATCH, 8):
        (at.loss(slice(start, start + 8)) / 4).backward()
    at.optimizer.step()


def accumulated_penalty(at: At) -> None:
    for start in range(0, BATCH, 8):
        ((at.loss(slice(start, start + 8)) + at.mark.penalty()) / 4).backward()
    at.optimizer.step()


def scaled(at: At) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(at.loss()).backward()
    scaler.step(at.optimizer)
    scaler.update()


def closure(at: At) -> None:
    def evaluate() -> Tensor:
        at.optimizer.zero_grad()
        loss = at.loss()
        loss.backward()
        return loss

    at.optimizer.step(evaluate)


@dataclass(frozen=True)
class Loop:
    """A loop, and the explicit loop that it has to equal."""

    id: str
    found: Callable[[nn.Module, WeightScheme], Embedding]
    expected: Step = explicit


LOOPS = [
    Loop("attach", partial(run, step=plain, attach=True)),
    Loop("accumulation", partial(run, step=accumulated, attach=True)),
    Loop("accumulation-penalty", partial(run, step=accumulated_penalty, attach=False)),
    Loop("grad-scaler", partial(run, step=scaled, attach=True)),
    Loop("grad-scaler-fused", partial(run, step=scaled, attach=True, fused=True)),
    Loop("closure", partial(run, step=closure, attach=True)),
    Loop("autocast", partial(run, step=autocast, attach=True), explicit_autocast),
]

PRODUCT = [(facts, loop) for facts in SCHEMES_UNDER_CONTRACT for loop in LOOPS]
PAIRS = covering(LOOPS)


def agree(facts: Facts, loop: Loop) -> None:
    expected, found = fresh_host(), fresh_host()
    run(expected, facts.scheme, loop.expected, attach=False)
    loop.found(found, facts.scheme)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("facts", "loop"), PAIRS, ids=lambda value: value.id)
def test_loop_equals_the_explicit_loop(facts: Facts, loop: Loop) -> None:
    agree(facts, loop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("facts", "loop"), [pair for pair in PRODUCT if pair not in PAIRS], ids=lambda value: value.id
)
def test_every_loop_equals_the_explicit_loop(facts: Facts, loop: Loop) -> None:
    agree(facts, loop)


@every_form
def test_the_penalty_moves_the_weights(facts: Facts) -> None:
    """The agreement above would be empty if no loop embedded anything."""
    marked, unmarked = fresh_host(), fresh_host()
    run(marked, strong(facts), explicit, attach=False)
    run(unmarked, strong(facts), plain, attach=False)
    weights = [name for name, p in unmarked.named_parameters() if p.dim() > 1]
    moved = [
        (marked.get_parameter(name) - unmarked.get_parameter(name)).abs().max().item()
        for name in weights
    ]
    assert max(moved) > 1e-3


def test_lbfgs_sees_the_penalty_in_its_loss() -> None:
    """A line search needs the loss that belongs to the gradient."""
    facts, model = SCHEMES_UNDER_CONTRACT[0], fresh_host()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    with facts.scheme.embed(model, owner=OWNER, material=MATERIAL) as mark:
        penalty = mark.penalty().item()
        loss = F.cross_entropy(model(X), Y).item()
        mark.attach(optimizer)

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(model(X), Y)
            value.backward()
            return value

        first = optimizer.step(evaluate)
    assert first.item() == pytest.approx(loss + penalty, rel=1e-5)


@every_form
@pytest.mark.parametrize("crash", [False, True], ids=["success", "crash"])
def test_no_hook_survives(facts: Facts, crash: bool) -> None:
    model = fresh_host()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    embedding = facts.scheme.embed(model, owner=OWNER, material=MATERIAL)
    try:
        with embedding as mark:
            mark.attach(optimizer)
            assert optimizer._optimizer_step_pre_hooks
            if crash:
                raise RuntimeError("out of memory")
    except RuntimeError:
        assert crash
    assert list(hooks(model, optimizer)) == []
    with pytest.raises(LoopError, match="inside its block"):
        embedding.penalty()


@every_form
def test_no_hook_survives_bad_input(facts: Facts) -> None:
    model, stranger = fresh_host(), fresh_host()
    wrong = torch.optim.SGD(stranger.parameters(), 0.05)
    right = torch.optim.SGD(model.parameters(), 0.05)
    with facts.scheme.embed(model, owner=OWNER, material=MATERIAL) as mark:
        with pytest.raises(LoopError, match="does not train"):
            mark.attach(wrong)
        with pytest.raises(LoopError, match="maximize=True"):
            mark.attach(torch.optim.SGD(model.parameters(), 0.05, maximize=True))
        mark.attach(right)
        for again in (right, torch.optim.Adam(model.parameters())):
            with pytest.raises(LoopError, match="attached already"):
                mark.attach(again)
        with pytest.raises(LoopError, match="twice"):
            mark.penalty()
    assert list(hooks(model, right)) == list(hooks(stranger, wrong)) == []


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """Everything that could still be called when model or optimizer work."""
    yield from optimizer._optimizer_step_pre_hooks.values()
    yield from optimizer._optimizer_step_post_hooks.values()
    for module in model.modules():
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()
        yield from module._backward_hooks.values()
    for parameter in model.parameters():
        yield from (parameter._backward_hooks or {}).values()
