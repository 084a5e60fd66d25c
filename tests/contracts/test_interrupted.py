"""A marked training that is killed at any moment goes on with its first key, in every loop."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from countermark.embedding.integrations.distributed import require_agreement
from countermark.errors import KeyFileError
from countermark.keys.key import Key
from countermark.schemes.uchida.scheme import Uchida

STEPS, EVERY, BATCH = 40, 8, 32
SCHEME = Uchida("0.weight", 128, strength=0.5)
LAST = STEPS // EVERY
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "countermark.verification.verify", "countermark.embedding.integrations.hf_trainer",
        "countermark.embedding.integrations.lightning",
        "torch._dynamo", "transformers.trainer", "transformers.modeling_utils",
        "lightning.pytorch.callbacks",
    ]
)  # fmt: skip


def host() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


def batch() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(2)
    return torch.randn(BATCH * EVERY, 32, generator=drawn), torch.arange(BATCH * EVERY) % 4


class Kill:
    """Ends this process by SIGKILL after a step, or inside the writing of a checkpoint."""

    def __init__(self, step: int | None = None, writing: tuple[int, str] | None = None) -> None:
        self._step, self._writing, self._taken, self._saves = step, writing, 0, 0

    def take_step(self) -> None:
        self._taken += 1
        if self._taken == self._step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, place: Any, name: str) -> None:
        """Kill before, after or in the middle of one of the calls that write a file."""
        whole = getattr(place, name)

        def counted(*given: Any, **named: Any) -> Any:
            self._saves += 1
            number, when = self._writing or (0, "")
            if self._saves == number and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            done = whole(*given, **named)
            if self._saves == number and when == "torn":
                torn = next(each for each in given if isinstance(each, str | Path))
                os.truncate(torn, Path(torn).stat().st_size // 2)
            if self._saves == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(place, name, counted)


# --- the recipes of docs/loops.md


def plain(kill: Kill) -> nn.Module:
    kill.watch(torch, "save")
    model = host()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    x, y = batch()
    with SCHEME.embed(model, owner="ACME Inc.", key="acme.key", resume=True) as mark:
        step = 0
        if Path("own.pt").exists():
            saved = torch.load("own.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            mark.restore(saved["mark"])
            step = saved["step"]
        while step < STEPS:
            rows = torch.arange(BATCH) + BATCH * (step % EVERY)
            (F.cross_entropy(model(x[rows]), y[rows]) + mark.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % EVERY == 0:
                parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save(states | {"mark": mark.state(), "step": step}, "own.pt.new")
                Path("own.pt.new").replace("own.pt")
            kill.take_step()
    return model


def trainer(kill: Kill) -> nn.Module:
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

    from countermark.embedding.integrations import hf_trainer

    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = host()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Killing(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            kill.take_step()

    kill.watch(torch, "save")
    kill.watch(TrainerState, "save_to_json")
    kill.watch(hf_trainer, "write_state")
    model, (x, y) = Answering(), batch()
    arguments = TrainingArguments(
        "out", num_train_epochs=LAST, per_device_train_batch_size=BATCH, learning_rate=0.02,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="epoch",
        save_total_limit=2, logging_strategy="no",
    )  # fmt: skip
    with SCHEME.embed(model.body, owner="ACME Inc.", key="acme.key", resume=True) as mark:
        examples = [{"x": each, "labels": label} for each, label in zip(x, y, strict=True)]
        Trainer(
            model, arguments, train_dataset=examples,  # type: ignore[arg-type]
            callbacks=[hf_trainer.MarkTrainerCallback(mark), Killing()],
        ).train(resume_from_checkpoint=hf_trainer.last_checkpoint("out"))  # fmt: skip
    return model.body


def lightning(kill: Kill) -> nn.Module:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    from countermark.embedding.integrations.lightning import MarkLightningCallback

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = host()

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.body.parameters(), 0.02)

    class Killing(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            kill.take_step()

    kill.watch(torch, "save")
    model, saved = Lit(), Path("lit/last.ckpt")
    keep = ModelCheckpoint("lit", save_last=True, enable_version_counter=False)
    with SCHEME.embed(model.body, owner="ACME Inc.", key="acme.key", resume=True) as mark:
        pl.Trainer(
            max_epochs=LAST, accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[MarkLightningCallback(mark), keep, Killing()],
        ).fit(
            model, DataLoader(TensorDataset(*batch()), BATCH, shuffle=True),
            ckpt_path=str(saved) if saved.exists() else None,
        )  # fmt: skip
    return model.body


LOOPS = {"plain": plain, "trainer": trainer, "lightning": lightning}


def work(name: str, kill: Kill, folder: Path) -> None:
    """Train by the recipe in a process that loaded the libraries already; save the model."""
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    model = LOOPS[name](kill)
    save_file(model.state_dict(), "model.safetensors")


def run(name: str, kill: Kill, folder: Path) -> int | None:
    child = FORKS.Process(target=work, args=(name, kill, folder))
    child.start()
    child.join(60)
    return child.exitcode


WRITES = {"plain": LAST, "trainer": 5 * LAST, "lightning": LAST}
"""How many files a whole training writes at least; Trainer writes five for each checkpoint."""


def moments(name: str, count: int) -> list[Kill]:
    """So many moments, drawn from the loop's name: after a step, and while a file is written."""
    drawn = random.Random(name)  # noqa: S311 - no secret
    kills = []
    for number in range(count):
        if number % 2:
            when = "torn" if name == "plain" else drawn.choice(["before", "after"])
            kills.append(Kill(writing=(drawn.randint(1, WRITES[name]), when)))
        else:
            kills.append(Kill(step=drawn.randint(1, STEPS - 1)))
    return kills


def require_first_key(name: str, kill: Kill, folder: Path, *, twice: bool) -> None:
    """Kill a training at a moment, perhaps once more soon after it went on, and let it end."""
    folder.mkdir()
    assert run(name, kill, folder) == -signal.SIGKILL, (folder / "said").read_text()
    unfinished = folder / "acme.key.unfinished"
    first = Key.load(unfinished / "begun")
    for path, mode in ((unfinished, 0o700), (unfinished / "begun" / "key.safetensors", 0o600)):
        assert path.stat().st_mode & 0o777 == mode
    if twice:
        code = run(name, Kill(step=2), folder)
        assert code in {0, -signal.SIGKILL}, (folder / "said").read_text()
    if unfinished.exists():
        assert run(name, Kill(), folder) == 0, (folder / "said").read_text()
    assert not unfinished.exists()
    key, model = Key.load(folder / "acme.key"), host()
    assert key.c0 == first.c0
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        evidence = SCHEME.extract({"0.weight": model.get_parameter("0.weight").numpy()}, key)
    assert evidence.match_count == evidence.bits


@pytest.mark.parametrize("name", LOOPS)
def test_a_killed_training_goes_on_with_its_first_key(name: str, tmp_path: Path) -> None:
    for number, kill in enumerate(moments(name, 2)):
        require_first_key(name, kill, tmp_path / str(number), twice=number == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_ten_kills_lose_nothing(name: str, tmp_path: Path) -> None:
    for number, kill in enumerate(moments(name, 10)):
        require_first_key(name, kill, tmp_path / str(number), twice=True)


def train_on_two_ranks(rank: int, attempt: int, folder: Path) -> None:
    """The first attempt ends after a step, the second at the end."""
    os.chdir(folder)
    dist.init_process_group("gloo", f"file://{folder}/{attempt}", rank=rank, world_size=2)
    model = host()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    x, y = batch()
    with SCHEME.embed(model, owner="ACME Inc.", key="acme.key", resume=bool(attempt)) as mark:
        require_agreement(mark)
        for _ in range(STEPS):
            (F.cross_entropy(model(x), y) + mark.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if attempt == 0:
                dist.barrier()
                os._exit(7)
    try:
        SCHEME.embed(host(), owner="ACME Inc.", key="acme.key")
    except KeyFileError as error:
        Path(f"rank-{rank}").write_text(f"{mark.key.commitment} {error}")
    dist.barrier()
    os._exit(0)


def test_all_ranks_embed_the_key_of_one_place(tmp_path: Path) -> None:
    for attempt, code in enumerate((7, 0)):
        ranks = [
            FORKS.Process(target=train_on_two_ranks, args=(rank, attempt, tmp_path))
            for rank in (0, 1)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(60)
        assert [each.exitcode for each in ranks] == [code, code]
        if attempt == 0:
            first = Key.load(tmp_path / "acme.key.unfinished" / "begun")
    said = {(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)}
    assert len(said) == 1
    assert said.pop().startswith(f"{first.commitment} acme.key exists")
