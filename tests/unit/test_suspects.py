"""Experiments with attacks, siblings and models that never saw the mark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from countermark.checkpoints import load_state
from countermark.errors import ConfigError
from countermark.results.statistics import compute_randomised_sequential_p
from countermark.training import loop as training
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import Recipe, build, recipe
from countermark.training.siblings import train_siblings
from countermark_lab.experiments import cell as computing
from countermark_lab.experiments import experiment as bench
from countermark_lab.experiments.cell import _prepare_start as start_of
from countermark_lab.experiments.run import run
from countermark_lab.experiments.suspect_groups import (
    StartSpec,
    SuspectGroup,
    compute_kolmogorov_smirnov,
    make_unmarked_spec,
)
from countermark_lab.figures import draw_png, find_figure, is_drawn_from
from countermark_lab.hosts.model_zoo import CACHE, HostSpec, host_path
from countermark_lab.tables.outlines import outline_experiment
from countermark_lab.tables.pages import render_section

ROOT = Path(__file__).parent.parent.parent
SHARED_BASE = str(ROOT / "experiments" / "wang2020" / "shared_base.toml")

SMALL = """
name = "small"
title = "Small"
track = "the bundled digits"
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
[[rows]]
label = "answers"
scheme = "adi"
[rows.fields]
batch_share = 1.0
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
    network, linear, answers = outline_experiment(experiment, results)
    for row in (network, linear, answers):
        (attacked,) = row["attacked"]
        assert attacked["outcomes"] != {"owned": 1}  # nothing is left of the marked layer
        assert [each["hosts"] for each in row["suspects"]] == [3, 2]
        assert [each["claims"] for each in row["suspects"]] == [{"0.01": 0, "0.0001": 0}] * 2
    assert network["suspects"][0]["KS_critical"] == pytest.approx(1.358 / 3**0.5)
    assert linear["suspects"][0]["KS"] is None
    assert answers["outcomes"] == {"owned": 1}
    assert answers["bits"] == 100
    shown = "\n".join(render_section(experiment, results))
    assert "After an attack" in shown
    assert "| network | twins |" in shown

    figure = find_figure("wang2020/false_reads")
    (tmp_path / "wang2020").mkdir()
    small.rename(tmp_path / "wang2020" / "unmarked.toml")
    drawn = figure.shown(tmp_path, results)
    assert list(drawn) == ["network"]
    draw_png(figure, drawn, tmp_path / "figure.png")
    assert is_drawn_from(drawn, tmp_path / "figure.png")
    assert not is_drawn_from({**drawn} | {"more": 1}, tmp_path / "figure.png")
    assert not is_drawn_from(drawn, tmp_path / "none.png")


def test_fields_that_came_later_rename_no_cell() -> None:
    """A committed cell is found by the hash of its specification."""
    for cell in bench.expand_cells(bench.load_experiment(ROOT / "experiments" / "digits.toml")):
        assert not {"attacks", "suspects"} & set(cell.model_dump(mode="json"))
        assert not bench.HostSettings.since & set(cell.model_dump(mode="json")["host"])
        assert bench.get_result_path(cell, ROOT / "results").exists()


def host(**fields: Any) -> bench.HostSettings:
    """The marked host of an experiment: an MLP of ten epochs, where nothing else is said."""
    return bench.HostSettings.model_validate(
        {"model": "mlp", "data": "digits", "epochs": 10} | fields
    )


TWINS = SuspectGroup(label="twins", data="digits", kind="twins", count=3, first=90, epochs=(2, 4))
STRANGERS = TWINS.model_copy(update={"kind": "strangers"})
LENET = {"model": "lenet", "model_arguments": {"width": 0.5}, "recipe": {"milestones": [0.5]}}


def test_the_first_twin_differs_in_nothing_but_the_mark() -> None:
    first, second, third = TWINS.list_host_specs(host(), 7, None)
    assert (first.seed, first.data_order, first.epochs) == (7, 7, 10)
    assert (second.seed, second.data_order, second.epochs) == (7, 91, 4)
    assert (third.seed, third.data_order, third.epochs) == (7, 92, 2)
    assert [each.seed for each in STRANGERS.list_host_specs(host(), 7, None)] == [90, 91, 92]


@pytest.mark.parametrize("group", [TWINS, STRANGERS])
def test_suspects_are_models_of_the_hosts_kind(group: SuspectGroup) -> None:
    for each in group.list_host_specs(host(**LENET, unit_pixels=True), 7, None):
        assert (each.model, each.arguments) == ("lenet", (("width", 0.5),))
        assert each.full_recipe == recipe("lenet", {"milestones": (0.5,)})
        assert each.unit_pixels


def test_twins_see_what_the_host_sees_and_strangers_what_they_are_given() -> None:
    few = host(train=64)
    assert {each.rows for each in TWINS.list_host_specs(few, 7, None)} == {(0, 64)}
    assert {each.rows for each in STRANGERS.list_host_specs(few, 7, None)} == {None}
    given = STRANGERS.model_copy(update={"train": 32})
    assert {each.rows for each in given.list_host_specs(few, 7, None)} == {(0, 32)}
    assert "train" not in STRANGERS.model_dump()
    assert given.model_dump()["train"] == 32


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({}, HostSpec("digits", 5, epochs=1)),
        (
            LENET | {"train": 200},
            HostSpec(
                "digits", 5, epochs=1, rows=(0, 200), model="lenet", arguments=(("width", 0.5),),
                recipe=(("lr", 0.02),),
            ),
        ),
    ],
)  # fmt: skip
def test_a_base_is_a_host_of_the_same_kind_and_trained_once(
    small: Path, fields: dict[str, Any], spec: HostSpec
) -> None:
    """It has a recipe of its own, whatever the marked host changes in its."""
    begun = host(**fields, start={"seed": 5, "epochs": 1, "recipe": dict(spec.recipe)})
    cell = next(bench.expand_cells(bench.load_experiment(small))).model_copy(update={"host": begun})
    first = start_of(cell)
    assert first == host_path(spec, CACHE)
    before = first.stat().st_mtime_ns
    assert start_of(cell) == first
    assert first.stat().st_mtime_ns == before


def test_the_shared_base_of_the_results_is_what_it_was() -> None:
    cell = next(bench.expand_cells(bench.load_experiment(Path(SHARED_BASE))))
    assert cell.host.start == StartSpec(seed=50, epochs=5)
    base = replace(make_unmarked_spec(cell.host, cell.host.data, 50), epochs=5)
    assert base.digest == "dc101689c05e105a"


def test_a_teachers_answers_replace_the_labels(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marked host and its siblings learn from the base."""
    small.write_text(small.read_text().replace("epochs = 1 }", "epochs = 1 }\nteacher = true", 1))
    cell = next(bench.expand_cells(bench.load_experiment(small)))
    base, taught = load_state(start_of(cell)), list[int]()

    def seen(model: nn.Module, data: Dataset, how: Recipe, course: Course, **others: Any) -> None:
        assert course.teacher is not None
        assert not course.teacher.training
        answers = course.teacher.state_dict()
        assert all(torch.equal(answers[name], base[name]) for name in base)
        taught.append(course.epochs)
        fit(model, data, how, replace(course, epochs=1), **others)

    monkeypatch.setattr(training, "fit", seen)
    monkeypatch.setattr(computing, "fit", seen)
    computing._train_host(cell, load_data("digits").subset(64, 10), None, None)
    assert taught == [3, 1, 3, 1, 3], "four siblings and the host"


def test_a_teacher_without_a_start_is_refused(small: Path) -> None:
    small.write_text(
        small.read_text().replace("start = { seed = 5, epochs = 1 }", "teacher = true")
    )
    with pytest.raises(ConfigError, match=r"small\.toml: host: .*teacher needs a start"):
        bench.load_experiment(small)


def test_siblings_start_where_the_host_starts_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> nn.Module:
        seed_torch(3, "init")
        return build("mlp", {})

    data, started = load_data("digits").subset(320, 100), fresh().state_dict()
    made = train_siblings(
        fresh, data, recipe("mlp"), Course(2, seed=3), count=5, folder=tmp_path
    )  # fmt: skip
    assert (len(made.shown), len(made.held_out), made.epochs) == (2, 3, 2 + 1 + 2 + 1 + 2)
    states = [load_state(path) for path in made.shown + made.held_out]
    for state in states:
        moved = (state["0.weight"] - started["0.weight"]).abs().mean()
        assert 0 < moved < 0.02
    for other in states[1:]:
        assert not torch.equal(other["2.weight"], states[0]["2.weight"])
    assert made.seconds > 0
    monkeypatch.setattr(
        "countermark.training.siblings.fit_to_file", lambda *_: pytest.fail("again")
    )
    again = train_siblings(fresh, data, recipe("mlp"), Course(2, seed=3), count=5, folder=tmp_path)
    assert (again.shown, again.held_out) == (made.shown, made.held_out)
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
    distance, critical = compute_kolmogorov_smirnov(ps)
    assert distance == pytest.approx(scipy.stats.kstest(ps, "uniform").statistic)
    assert critical == pytest.approx(scipy.stats.kstwo(40).isf(0.05), rel=0.03)


def test_sequential_ranks_are_uniform_once_randomised() -> None:
    """Each p is drawn from a rank that is uniform, by the rule of Besag and Clifford."""
    rng, ps = np.random.default_rng(2), []
    for _ in range(4000):
        hits = np.flatnonzero(rng.random(200) <= rng.random())
        counts = (10, int(hits[9]) + 1) if len(hits) >= 10 else (len(hits), 200)
        ps.append(compute_randomised_sequential_p(*counts, 10, rng.random()))
    assert scipy.stats.kstest(ps, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("drawn", "u"), [((3, 2, 10), 0.5), ((1, 5, 10), 1.5), ((11, 20, 10), 0)])
def test_impossible_counts_are_refused(drawn: tuple[int, int, int], u: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        compute_randomised_sequential_p(*drawn, u)
