"""Accelerate, Hugging Face Trainer and Lightning embed what an explicit `loss + penalty` embeds.

The hosts are float64: there the sum of the parts of a batch is the batch, and what is read from
them in float32 agrees to the last bit. A learnt reader, whose Adam amplifies rounding, then takes
the same steps everywhere.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from contracts.facts import OWNER, SCHEMES_UNDER_CONTRACT, Facts, fresh_host
from contracts.test_loops import (
    BATCH,
    EPOCHS,
    MATERIAL,
    At,
    Step,
    X,
    Y,
    explicit,
    hooks,
    plain,
    strong,
)
from contracts.test_loops import run as run_loop
from countermark.embedding import Embedding
from countermark.embedding.integrations import accelerate as accelerate_loop
from countermark.embedding.integrations import hf_trainer
from countermark.embedding.integrations import lightning as lightning_loop
from countermark.errors import LoopError, MissingExtraError
from countermark.schemes.weights import WeightScheme

pytestmark = [
    # Lightning's own: its use of torch's trees, and advice for data that is not in memory.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.usefixtures("apart"),
]

X64 = X.double()
CLIP = 0.5


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing of a trainer outlives a test, reaches the network or lands in the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass(frozen=True)
class Adapter:
    """Trains a host in somebody's loop, and the step of the explicit loop that it has to equal."""

    id: str
    train: Callable[[nn.Module, WeightScheme], None]
    expected: Step = explicit


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def embed(host: nn.Module, scheme: WeightScheme) -> Embedding:
    return scheme.embed(host, owner=OWNER, material=MATERIAL)


def with_accelerate(host: nn.Module, scheme: WeightScheme, *, parts: int = 1) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    model, optimizer = accelerator.prepare(host, sgd(host))
    with embed(accelerator.unwrap_model(model), scheme) as mark:
        accelerate_loop.attach(mark, optimizer)
        for _ in range(EPOCHS):
            for x, y in zip(X64.split(BATCH // parts), Y.split(BATCH // parts), strict=True):
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
            mark.end_epoch()


class Answering(nn.Module):
    """A host as Hugging Face's Trainer wants it: with the loss among its outputs."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.host(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class InOrder(Trainer):
    """Shows the images in their order, as the explicit loop does."""

    def get_train_dataloader(self) -> Any:
        pairs = [{"x": x, "labels": y} for x, y in zip(X64, Y, strict=True)]
        return DataLoader(pairs, self.args.per_device_train_batch_size)  # type: ignore[arg-type]


def with_hf(
    host: nn.Module, scheme: WeightScheme, *, parts: int = 1, clip: float = 0.0, **more: Any
) -> None:
    arguments = TrainingArguments(
        "out", num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH // parts,
        gradient_accumulation_steps=parts, max_grad_norm=clip, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip
    optimizer = sgd(host)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with embed(host, scheme) as mark:
        InOrder(
            Answering(host), arguments, callbacks=[hf_trainer.MarkTrainerCallback(mark)],
            optimizers=(optimizer, constant),
        ).train()  # fmt: skip


def module_of(
    host: nn.Module,
    optimizers: Callable[[nn.Module], Any] = sgd,
    flavour: ModuleType = lightning.pytorch,
) -> Any:
    """A host as Lightning wants it."""

    class Lit(flavour.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.host = host

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(self.host(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizers(host)

    return Lit()


def fit(
    module: Any, mark: Embedding, *, parts: int = 1, flavour: ModuleType = lightning.pytorch,
    callback: Any = None, **more: Any,
) -> None:  # fmt: skip
    trainer = flavour.Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=parts, accelerator="cpu", devices=1,
        callbacks=[callback or lightning_loop.MarkLightningCallback(mark)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X64, Y), BATCH // parts))


def with_lightning(
    host: nn.Module, scheme: WeightScheme, *, flavour: ModuleType = lightning.pytorch, **more: Any
) -> None:
    with embed(host, scheme) as mark:
        fit(module_of(host, flavour=flavour), mark, flavour=flavour, **more)


def clipped_with_the_mark(at: At) -> None:
    (at.loss() + at.mark.penalty()).backward()
    torch.nn.utils.clip_grad_norm_(at.model.parameters(), CLIP)
    at.optimizer.step()


def clipped_without_the_mark(at: At) -> None:
    at.loss().backward()
    torch.nn.utils.clip_grad_norm_(at.model.parameters(), CLIP)
    penalty = at.mark.penalty()
    if penalty.requires_grad:  # there is a key by now
        penalty.backward()
    at.optimizer.step()


ADAPTERS = [
    Adapter("accelerate", with_accelerate),
    Adapter("accelerate-accumulation", partial(with_accelerate, parts=4)),
    Adapter("hf", with_hf),
    Adapter("hf-accumulation", partial(with_hf, parts=4)),
    Adapter("hf-clipped", partial(with_hf, clip=CLIP), clipped_without_the_mark),
    Adapter("lightning", with_lightning),
    Adapter("lightning-accumulation", partial(with_lightning, parts=4)),
    Adapter(
        "lightning-clipped", partial(with_lightning, gradient_clip_val=CLIP), clipped_with_the_mark
    ),
    Adapter("pytorch-lightning", partial(with_lightning, flavour=pytorch_lightning)),
]

PRODUCT = [(facts, adapter) for facts in SCHEMES_UNDER_CONTRACT for adapter in ADAPTERS]
# Every form once and every adapter at least once.
PAIRS = [(facts, ADAPTERS[at % len(ADAPTERS)]) for at, facts in enumerate(SCHEMES_UNDER_CONTRACT)]


def agree(facts: Facts, adapter: Adapter) -> None:
    expected, unmarked, found = (fresh_host().double() for _ in range(3))
    run_loop(expected, strong(facts), adapter.expected, attach=False, x=X64)
    run_loop(unmarked, strong(facts), plain, attach=False, x=X64)
    adapter.train(found, strong(facts))
    moved = []
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=5e-6)
        moved.append((found.state_dict()[name] - unmarked.state_dict()[name]).abs().max().item())
    assert max(moved) > 1e-3  # a loop that embeds nothing agrees with nothing


@pytest.mark.parametrize(("facts", "adapter"), PAIRS, ids=lambda value: value.id)
def test_adapter_equals_the_explicit_loop(facts: Facts, adapter: Adapter) -> None:
    agree(facts, adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("facts", "adapter"),
    [pair for pair in PRODUCT if pair not in PAIRS],
    ids=lambda value: value.id,
)
def test_every_adapter_equals_the_explicit_loop(facts: Facts, adapter: Adapter) -> None:
    agree(facts, adapter)


FORM = SCHEMES_UNDER_CONTRACT[0].scheme


@pytest.mark.parametrize("train", [with_accelerate, with_hf, with_lightning])
def test_no_hook_survives(train: Callable[[nn.Module, WeightScheme], None]) -> None:
    host = fresh_host().double()
    train(host, FORM)
    assert list(hooks(host, sgd(host))) == []


@pytest.mark.parametrize("train", [with_hf, with_lightning])
def test_a_mark_in_another_model_is_refused(
    train: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Trainer that copied or sharded the host would embed nothing."""
    other = embed(fresh_host(), FORM)
    monkeypatch.setitem(globals(), "embed", lambda *_: other)
    with pytest.raises(LoopError, match=r"does not train 2\.weight"):
        train(fresh_host().double(), FORM)


def test_a_mark_in_the_loss_and_by_a_callback_is_refused() -> None:
    host = fresh_host().double()
    module = module_of(host)
    with embed(host, FORM) as mark:
        alone = module.training_step
        module.training_step = lambda batch: alone(batch) + mark.penalty()
        with pytest.raises(LoopError, match="twice"):
            fit(module, mark)


def test_attach_and_a_callback_are_refused() -> None:
    host = fresh_host().double()
    optimizer = sgd(host)
    with embed(host, FORM) as mark:
        mark.attach(optimizer)
        with pytest.raises(LoopError, match="attached already"):
            fit(module_of(host, lambda _: optimizer), mark)


def test_lightning_marks_with_the_optimizer_it_is_told() -> None:
    """By hand: two optimizers, of which the second trains the marked layer."""
    expected, found = fresh_host().double(), fresh_host().double()
    run_loop(expected, FORM, explicit, attach=False, x=X64)

    def two(host: nn.Module) -> list[torch.optim.Optimizer]:
        return [sgd(part) for part in (host[0], host[2:])]  # type: ignore[index]

    module = module_of(found, two)
    module.automatic_optimization = False

    def step(batch: tuple[Tensor, Tensor]) -> None:
        both = module.optimizers()
        for each in both:
            each.zero_grad()
        module.manual_backward(F.cross_entropy(found(batch[0]), batch[1]))
        for each in both:
            each.step()

    module.training_step = step
    with embed(found, FORM) as mark:
        fit(module, mark, callback=lightning_loop.MarkLightningCallback(mark, optimizer=1))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=5e-6)


def test_lightning_refuses_gradients_that_stay_scaled() -> None:
    host = fresh_host().double()
    plugin = lightning.pytorch.plugins.MixedPrecision(
        "16-mixed",
        "cpu",
        torch.amp.GradScaler("cpu"),  # type: ignore[arg-type]
    )
    fused = module_of(host, lambda host: torch.optim.SGD(host.parameters(), 0.05, fused=True))
    with embed(host, FORM) as mark, pytest.raises(LoopError, match="fused=False"):
        fit(fused, mark, plugins=[plugin])


def test_hf_refuses_gradients_that_may_stay_scaled() -> None:
    host = fresh_host()
    arguments = TrainingArguments("out", max_grad_norm=0.0, use_cpu=True, report_to="none")
    arguments.fp16 = True  # a CPU has none, so that Trainer itself would refuse
    with embed(host, FORM) as mark, pytest.raises(LoopError, match="set max_grad_norm"):
        hf_trainer.MarkTrainerCallback(mark).on_train_begin(arguments, None, None)


@pytest.mark.parametrize(
    ("name", "needs", "extra"),
    [
        ("accelerate", "accelerate.optimizer", "hf"),
        ("hf_trainer", "transformers", "hf"),
        ("lightning", "lightning.pytorch", "lightning"),
    ],
)
def test_a_missing_extra_is_named(
    name: str, needs: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, needs, None)
    monkeypatch.delitem(sys.modules, f"countermark.embedding.integrations.{name}")
    with pytest.raises(MissingExtraError, match=rf"'countermark\[{extra}\]'"):
        importlib.import_module(f"countermark.embedding.integrations.{name}")
