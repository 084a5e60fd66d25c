"""DDP and FSDP2 embed what one process with the whole batch embeds; every rank gives the same key.

Two gloo processes on the CPU, each with half of every batch, run all forms and leave what they
found in a file; the tests read it. The hosts are float64: the mean of two halves is not summed in
the order of the whole, and a learnt reader's Adam would amplify the float32 rounding of that.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from contracts.facts import OWNER, SCHEMES_UNDER_CONTRACT, Facts, covering, fresh_host
from contracts.test_loops import (
    BATCH,
    EPOCHS,
    MATERIAL,
    At,
    Step,
    X,
    Y,
    explicit,
    plain,
    strong,
)
from contracts.test_loops import run as run_loop
from countermark.embedding.integrations.distributed import (
    agreed_key,
    require_agreement,
    shared_material,
)
from countermark.errors import CountermarkError, LoopError, MarkNotTakenError
from countermark.keys.key import KeyMaterial
from draws import draw_from, name_draw

RANKS = 2
X64 = X.double()
FORM = SCHEMES_UNDER_CONTRACT[0]
LEARNT = next(facts for facts in SCHEMES_UNDER_CONTRACT if facts.learnt)
WAYS = ["ddp", "ddp-attach", "fsdp2", "fsdp2-attach"]
PRODUCT = [(facts, way) for facts in SCHEMES_UNDER_CONTRACT for way in WAYS]
QUICK = covering(WAYS)


def wrapped(host: nn.Module, kind: str) -> nn.Module:
    """The model that is called in training; the host itself is what is embedded into."""
    if kind == "ddp":
        return DistributedDataParallel(host)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(host[2], mesh=mesh)  # type: ignore[index]
    fully_shard(host, mesh=mesh)
    return host


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(facts: Facts, way: str) -> dict[str, Any]:
    """One form in one of the ways, on this rank's half of each batch."""
    kind, _, attach = way.partition("-")
    host = fresh_host().double()
    model = wrapped(host, kind)
    rank, half = dist.get_rank(), BATCH // RANKS
    optimizer = torch.optim.SGD(host.parameters(), 0.05, momentum=0.9)
    with strong(facts).embed(host, owner=OWNER, material=MATERIAL) as mark:
        if attach:
            mark.attach(optimizer)
        for _ in range(EPOCHS):
            for x, y in zip(X64.split(BATCH), Y.split(BATCH), strict=True):
                mine = slice(rank * half, (rank + 1) * half)
                step: Step = plain if attach else explicit
                step(At(model, optimizer, mark, x[mine], y[mine]))
                optimizer.zero_grad()
            mark.end_epoch()
    read = mark.read()
    assert read is not None
    return {
        "state": {name: whole(tensor.detach()) for name, tensor in host.state_dict().items()},
        "read": read.read,
        "commitment": said(lambda: agreed_key(mark).commitment),
        "drawn": mark.drawn_key and mark.drawn_key.commitment,
    }


def said(act: Callable[[], Any]) -> Any:
    """What a rank gets, or the error that it gets."""
    try:
        return act()
    except CountermarkError as error:
        return f"{type(error).__name__}: {error}"


def disagreeing(facts: Facts, what: str) -> str | None:
    """The error of a rank when rank 1 has another secret, or a learnt reader another start."""
    rank = dist.get_rank()
    secret = KeyMaterial.from_test_seed(rank if what == "secret" else 0)
    host = fresh_host(1 + (what == "start") * rank)
    with facts.scheme.embed(host, owner=OWNER, material=secret) as mark:
        mark.penalty()
        return said(lambda: require_agreement(mark))


def shared() -> tuple[bytes, bytes, str]:
    material = shared_material()
    return material.secret, material.nonce, repr(material)


Job = tuple[str, Callable[[], Any]]


def rank_main(rank: int, folder: Path, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    draw_from(name_draw("rank", rank, folder.name))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=600),
    )  # fmt: skip
    torch.save({name: job() for name, job in jobs}, folder / f"{rank}.pt")
    dist.barrier()  # nobody leaves while others still talk
    dist.destroy_process_group()


def on_every_rank(folder: Path, jobs: list[Job]) -> list[dict[str, Any]]:
    """What each rank got from each job."""
    mp.spawn(rank_main, (folder, jobs), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def named(pair: tuple[Facts, str]) -> str:
    return f"{pair[0].id}-{pair[1]}"


def jobs_of(pairs: list[tuple[Facts, str]]) -> list[Job]:
    return [(named(pair), partial(trained, *pair)) for pair in pairs]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    more: list[Job] = [
        ("secret", partial(disagreeing, FORM, "secret")),
        ("start", partial(disagreeing, LEARNT, "start")),
        ("neither", partial(disagreeing, LEARNT, "neither")),
        ("shared", shared),
        ("again", shared),
    ]
    return on_every_rank(tmp_path_factory.mktemp("quick"), [*jobs_of(QUICK), *more])


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    rest = [pair for pair in PRODUCT if pair not in QUICK]
    return on_every_rank(tmp_path_factory.mktemp("slow"), jobs_of(rest))


def agree(pair: tuple[Facts, str], ranks: list[dict[str, Any]]) -> None:
    scheme = strong(pair[0])
    expected, unmarked = fresh_host().double(), fresh_host().double()
    mark = run_loop(expected, scheme, explicit, attach=False, x=X64)
    run_loop(unmarked, scheme, plain, attach=False, x=X64)
    key, evidence = mark.drawn_key, mark.read()
    assert key is not None
    assert evidence is not None
    for found in (rank[named(pair)] for rank in ranks):
        moved = []
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(found["state"][name], tensor, rtol=0, atol=1e-6)
            moved.append((found["state"][name] - unmarked.state_dict()[name]).abs().max().item())
        assert max(moved) > 1e-3  # a loop that embeds nothing agrees with nothing
        if scheme.linear:  # a reader agrees to rounding, its commitment does not
            assert found["drawn"] == key.commitment
        np.testing.assert_array_equal(found["read"], evidence.read)
    one, other = (rank[named(pair)] for rank in ranks)
    assert one["commitment"] == other["commitment"]
    assert one["drawn"] == other["drawn"]
    assert one["commitment"] == one["drawn"] or one["commitment"].startswith("MarkNotTakenError")


@pytest.mark.parametrize("pair", QUICK, ids=named)
def test_ranks_equal_one_process(pair: tuple[Facts, str], ranks: list[dict[str, Any]]) -> None:
    agree(pair, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in PRODUCT if pair not in QUICK], ids=named)
def test_ranks_equal_one_process_in_every_way(
    pair: tuple[Facts, str], all_ranks: list[dict[str, Any]]
) -> None:
    agree(pair, all_ranks)


def test_every_rank_has_the_key(ranks: list[dict[str, Any]]) -> None:
    """Few steps embed the default form already, so that its key can be had here."""
    for rank in ranks:
        for way in ("ddp", "fsdp2-attach"):
            found = rank[named((FORM, way))]
            assert found["commitment"] == found["drawn"]


@pytest.mark.parametrize("what", ["secret", "start"])
def test_a_rank_that_embeds_another_mark_is_named(what: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank[what].startswith("LoopError: rank 1 of 2 embeds another mark than rank 0")
        assert "material=shared_material()" in rank[what]
        assert rank["neither"] is None


def test_material_is_shared_fresh_and_unseen(ranks: list[dict[str, Any]]) -> None:
    (secret, nonce, shown), again = ranks[0]["shared"], ranks[0]["again"]
    assert ranks[1]["shared"] == (secret, nonce, shown)
    assert (len(secret), len(nonce)) == (32, 16)
    assert again[0] != secret
    assert again[1] != nonce
    assert repr(secret) not in shown


def test_one_process_shares_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_material() != shared_material()
    with FORM.scheme.embed(fresh_host(), owner=OWNER, material=MATERIAL) as mark:
        require_agreement(mark)
    with pytest.raises(MarkNotTakenError):
        agreed_key(mark)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LoopError, match="init_process_group"):
        shared_material()
