"""What has to hold of Wang 2020: live on the bundled digits, and in the committed results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from torch import nn

from countermark.keys.key import Key, KeyMaterial
from countermark.results.null_hypotheses import PermutedUnits
from countermark.results.statistics import compute_randomised_sequential_p
from countermark.schemes import load_scheme
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.training.data import load_data
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.training.siblings import train_siblings
from countermark.verification.verify import verify
from countermark_lab.experiments.experiment import expand_cells, get_result_path, load_experiment
from countermark_lab.experiments.suspect_groups import compute_kolmogorov_smirnov
from countermark_lab.hosts.model_zoo import HostSpec, train_hosts

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments" / "wang2020"
SECRET = KeyMaterial(bytes(range(32)), bytes(16))
HOSTS = [HostSpec("digits", 100 + number, epochs=1 + number % 4) for number in range(40)]


def host() -> nn.Module:
    seed_torch(1, "init")
    return build("mlp", {})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module", params=[False, True], ids=["hardened", "published"])
def key(request: pytest.FixtureRequest, cache: Path) -> Key:
    data, course, model = load_data("digits"), Course(8, seed=1), host()
    siblings = train_siblings(host, data, recipe("mlp"), course, count=6, folder=cache)
    scheme = IndependentNetwork("2.weight", 256, as_published=request.param)
    with scheme.embed(
        model, owner="ACME Inc.", material=SECRET, unmarked=siblings.shown,
        siblings=siblings.held_out,
    ) as mark:  # fmt: skip
        fit(model, data, recipe("mlp"), course, mark=mark)
    return mark.key


def test_ranks_of_unmarked_hosts_are_uniform(key: Key, cache: Path) -> None:
    uniform, ps = np.random.default_rng(1), []
    for _, arrays in train_hosts(HOSTS, cache):
        null = load_scheme(key).nulls({"2.weight": arrays["2.weight"]}, key, 2000)["permuted_units"]
        assert isinstance(null, PermutedUnits)
        drawn = null.count_exceedances()
        ps.append(compute_randomised_sequential_p(*drawn, null.stop_at, float(uniform.random())))
    tested = scipy.stats.kstest(ps, "uniform")
    assert tested.pvalue > 1e-3
    assert tested.statistic == pytest.approx(compute_kolmogorov_smirnov(ps)[0])


def test_bits_are_found_where_they_never_were(key: Key, cache: Path) -> None:
    """The published criterion accuses; the hardened reader knows nothing of the same hosts."""
    scheme, losses, full = load_scheme(key), [], 0
    for _, arrays in train_hosts(HOSTS, cache):
        evidence = scheme.extract({"2.weight": arrays["2.weight"]}, key)
        full += evidence.match_count == key.bits
        losses.append(evidence.cross_entropy)
    if key.fields["as_published"]:
        assert full > 7
    else:
        assert min(losses) > 0.3  # ln 2 is .69, the marked host has less than 1e-4


def test_a_twin_is_never_claimed(key: Key, tmp_path: Path) -> None:
    """Same initial weights; the first has the same data order and epochs as well."""
    strange = host()
    for each in strange.modules():
        if isinstance(each, nn.Linear):
            each.reset_parameters()
    for order, epochs in ((1, 8), (70, 8), (71, 4), (72, 10)):
        twin = host()
        fit(twin, load_data("digits"), recipe("mlp"), Course(epochs, seed=order))
        verdict = verify(twin, key, alpha=1e-2, assume_dated=True, unmarked=[strange])
        assert not verdict.owned, verdict.explain()


# --- the committed results


def figures(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Label and figures of every cell of an experiment."""
    for cell in expand_cells(load_experiment(EXPERIMENTS / f"{name}.toml")):
        content = json.loads(get_result_path(cell, ROOT / "results").read_text())
        yield cell.label, content["cell"]["figures"]


def test_unmarked_models_are_not_claimed() -> None:
    band = scipy.stats.binom(200, 0.01).interval(0.99)
    for label, measured in figures("unmarked"):
        strangers, twins = measured["suspects"][:2], measured["suspects"][2]
        assert sum(each["hosts"] for each in strangers) == 200
        claims = sum(each["claims"]["0.01"] for each in strangers)
        assert claims <= band[1], label
        assert twins["hosts"] >= 9
        assert twins["claims"] == {"0.01": 0, "0.0001": 0}, label
        assert sum(each["claims"]["0.0001"] for each in strangers) == 0, label


def test_ranks_are_honest_in_every_variant() -> None:
    low, high = scipy.stats.binom(200, 0.01).interval(0.99)
    for label, measured in figures("unmarked"):
        strangers = [each for each in measured["suspects"][:2] if each["p"]]
        if not strangers:
            continue
        ps = [p for each in strangers for p in each["p"]]
        assert scipy.stats.kstest(ps, "uniform").pvalue > 1e-2, label
        assert low <= sum(each["reached"]["0.01"] for each in strangers) <= high, label
        assert sum(each["reached"]["0.0001"] for each in strangers) == 0, label


def test_the_published_criterion_accuses_most_of_the_innocent() -> None:
    full = {
        label: sum(each["all_bits"] for each in measured["suspects"][:2])
        for label, measured in figures("unmarked")
    }
    assert full["AUTO, published"] > 100
    assert full["MANU, published"] > 50


def hardened_rows() -> Iterator[Any]:
    """Experiment and label of every hardened row; those are marked that read unmarked models."""
    known = pytest.mark.xfail(
        strict=True,
        reason="shown copies that lack units, readers have a least L2 of .22 to .47 there",
    )
    for name in ("unmarked", "shared_base", "attempts"):
        for row in load_experiment(EXPERIMENTS / f"{name}.toml").rows:
            if "published" in row.label or "Uchida" in row.label:
                continue
            reads = name == "attempts" or (name, row.label) == ("unmarked", "AUTO, hardened")
            yield pytest.param(name, row.label, marks=[known] if reads else [])


@pytest.mark.parametrize(("name", "label"), list(hardened_rows()))
def test_hardened_readers_know_nothing_of_unmarked_models(name: str, label: str) -> None:
    measured = dict(figures(name))[label]
    least = min(min(each["L2"]) for each in measured["suspects"])
    assert least >= 0.5


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("label", ["AUTO, hardened", "MANU, hardened"])
def test_hardened_marks_are_found_and_stay(
    label: str, seed: int, request: pytest.FixtureRequest
) -> None:
    measured = [each for name, each in figures("hardened") if name == label][seed - 1]
    assert measured["wrong"] == 0
    assert measured["E_R"] <= 1e-3
    assert measured["outcome"] == "owned"
    by_share = {each["fraction"]: each for each in measured["pruned"]}
    assert by_share[0.9]["E_R"] <= 0.1
    if (label, seed) == ("MANU, hardened", 3):
        reason = "its rank is lost with nine tenths of the weights: log10 p -5.4, all bits read"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    assert by_share[0.9]["outcome"] == "owned"
    assert [each["outcome"] for each in measured["attacked"][:2]] == ["owned", "owned"]


def test_hardened_marks_keep_the_accuracy() -> None:
    marked: dict[str, list[float]] = {}
    for label, measured in figures("hardened"):
        marked.setdefault(label, []).append(measured["accuracy"])
    plain = statistics.mean(marked.pop("not embedded"))
    for label, accuracies in marked.items():
        assert len(accuracies) == 5
        assert math.fabs(statistics.mean(accuracies) - plain) <= 0.3, label


def test_fine_tunes_of_a_shared_base_are_not_claimed() -> None:
    for label, measured in figures("shared_base"):
        (others,) = measured["suspects"]
        assert others["hosts"] >= 8
        if "Uchida" in label:  # its null is exact for siblings, too: a claim at .01 is a coin's
            assert others["claims"]["0.0001"] == 0
        else:
            assert others["claims"] == {"0.01": 0, "0.0001": 0}
        if "hardened" in label:
            assert measured["outcome"] == "owned"
            assert {each["outcome"] for each in measured["attacked"]} == {"owned"}
