"""Experiments with attacks, siblings and models that never saw the mark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from countermark.bench import experiment as bench
from countermark.bench.data import load_data
from countermark.bench.figures import draw_false_reads, false_reads, is_drawn_from
from countermark.bench.models import build, recipe
from countermark.bench.run import run
from countermark.bench.siblings import train_siblings
from countermark.bench.suspects import Base, Suspects, kolmogorov_smirnov
from countermark.bench.tables import page, table
from countermark.bench.train import Course, seeded
from countermark.stats import randomised_sequential_p
from countermark.weights import load_state

ROOT = Path(__file__).parent.parent.parent

SMALL = """
name = "small"
title = "Small"
track = "the bundled digits"
source = "nobody"
seeds = [1]
[host]
model = "mlp"
data = "digits"
epochs = 3
siblings = 4
start = { seed = 5, epochs = 1 }
[[attacks]]
label = "pruned twice"
steps = [
    { attack = "prune", fields = { fraction = 0.5 } },
    { attack = "prune", fields = { fraction = 1.0, layers = ["2.weight"] } },
]
[[suspects]]
label = "strangers"
data = "digits"
count = 3
first = 100
epochs = [1, 2]
[[suspects]]
label = "twins"
data = "digits"
kind = "twins"
count = 2
first = 10
epochs = [1]
[[rows]]
label = "network"
scheme = "independent_network"
[rows.fields]
layer = "2.weight"
bits = 128
most_permutations = 1000
[[rows]]
label = "linear"
scheme = "uchida"
[rows.fields]
layer = "2.weight"
bits = 128
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_a_cell_measures_attacks_and_suspects(small: Path, tmp_path: Path) -> None:
    experiment, results = bench.load_experiment(small), tmp_path / "results"
    list(run(experiment, results))
    network, linear = table(experiment, results)
    for row in (network, linear):
        (attacked,) = row["attacked"]
        assert attacked["outcomes"] != {"owned": 1}  # nothing is left of the marked layer
        assert [each["hosts"] for each in row["suspects"]] == [3, 2]
        assert [each["claims"] for each in row["suspects"]] == [{"0.01": 0, "0.0001": 0}] * 2
    assert network["suspects"][0]["KS_critical"] == pytest.approx(1.358 / 3**0.5)
    assert linear["suspects"][0]["KS"] is None
    shown = page([small], results)
    assert "After an attack" in shown
    assert "| network | twins |" in shown

    drawn = false_reads(small, results)
    assert list(drawn) == ["network"]
    draw_false_reads(drawn, tmp_path / "figure.png")
    assert is_drawn_from(drawn, tmp_path / "figure.png")
    assert not is_drawn_from(drawn | {"more": 1}, tmp_path / "figure.png")
    assert not is_drawn_from(drawn, tmp_path / "none.png")


def test_fields_that_came_later_rename_no_cell() -> None:
    """A committed cell is found by the hash of its specification."""
    for cell in bench.cells(bench.load_experiment(ROOT / "experiments" / "digits.toml")):
        assert not {"attacks", "suspects"} & set(cell.model_dump(mode="json"))
        assert not {"start", "siblings"} & set(cell.model_dump(mode="json")["host"])
        assert bench.result_path(cell, ROOT / "results").exists()


def test_the_first_twin_differs_in_nothing_but_the_mark() -> None:
    twins = Suspects(label="twins", data="digits", kind="twins", count=3, first=90, epochs=(2, 4))
    first, second, third = twins.specs(7, 10, None)
    assert (first.seed, first.data_order, first.epochs) == (7, 7, 10)
    assert (second.seed, second.data_order, second.epochs) == (7, 91, 4)
    assert (third.seed, third.data_order, third.epochs) == (7, 92, 2)
    strangers = twins.model_copy(update={"kind": "strangers"})
    assert [each.seed for each in strangers.specs(7, 10, None)] == [90, 91, 92]


def test_a_base_is_trained_once(small: Path) -> None:
    base = Base(seed=1, epochs=1)
    first = base.path("digits")
    before = first.stat().st_mtime_ns
    assert base.path("digits") == first
    assert first.stat().st_mtime_ns == before


def test_siblings_start_where_the_host_starts_and_are_kept(tmp_path: Path) -> None:
    def host() -> nn.Module:
        seeded(3, "init")
        return build("mlp", {})

    data, started = load_data("digits").subset(320, 100), host().state_dict()
    made = train_siblings(
        host, data, recipe("mlp"), Course(2, seed=3), count=5, folder=tmp_path
    )  # fmt: skip
    assert (len(made.shown), len(made.held_out), made.epochs) == (2, 3, 2 + 1 + 2 + 1 + 2)
    states = [load_state(path) for path in made.shown + made.held_out]
    for state in states:
        moved = (state["0.weight"] - started["0.weight"]).abs().mean()
        assert 0 < moved < 0.02
    for other in states[1:]:
        assert not torch.equal(other["2.weight"], states[0]["2.weight"])
    again = train_siblings(host, data, recipe("mlp"), Course(2, seed=3), count=5, folder=tmp_path)
    assert again.seconds < made.seconds / 5
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 5


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (8, 4)])
def test_enough_siblings_are_held_out_before_any_is_shown(
    count: int, shown: int, tmp_path: Path
) -> None:
    data = load_data("digits").subset(64, 100)
    made = train_siblings(
        lambda: build("mlp", {}), data, recipe("mlp"), Course(1), count=count, folder=tmp_path
    )
    assert (len(made.shown), len(made.held_out)) == (shown, count - shown)


def test_distance_from_uniform_is_scipys() -> None:
    ps = list(np.random.default_rng(1).random(40) ** 1.5)
    distance, critical = kolmogorov_smirnov(ps)
    assert distance == pytest.approx(scipy.stats.kstest(ps, "uniform").statistic)
    assert critical == pytest.approx(scipy.stats.kstwo(40).isf(0.05), rel=0.03)


def test_sequential_ranks_are_uniform_once_randomised() -> None:
    """Each p is drawn from a rank that is uniform, by the rule of Besag and Clifford."""
    rng, ps = np.random.default_rng(2), []
    for _ in range(4000):
        hits = np.flatnonzero(rng.random(200) <= rng.random())
        counts = (10, int(hits[9]) + 1) if len(hits) >= 10 else (len(hits), 200)
        ps.append(randomised_sequential_p(*counts, 10, rng.random()))
    assert scipy.stats.kstest(ps, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("drawn", "u"), [((3, 2, 10), 0.5), ((1, 5, 10), 1.5), ((11, 20, 10), 0)])
def test_impossible_counts_are_refused(drawn: tuple[int, int, int], u: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        randomised_sequential_p(*drawn, u)
