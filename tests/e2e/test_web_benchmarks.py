"""The benchmark pages: rendered from results by a process of their own, never typed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cli_calls import ROOT
from rooms import settings_of, visited

from countermark.bench.figures import FIGURES
from countermark.bench.tables import format_table, load_table, render_table
from countermark.web import rendering
from countermark.web.rendering import render_results
from countermark.web.results import INDEX, RenderedResults, digest_results

PAPER = "uchida2017"
BESIDE = "robustness"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of a clone the pages of one paper need; one table's cells are missing."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("experiments", "tables", "results"):
        shutil.copytree(ROOT / part / PAPER, folder / part / PAPER)
    shutil.rmtree(folder / "results" / PAPER / "distilling")
    shutil.copytree(ROOT / "experiments" / BESIDE, folder / "experiments" / BESIDE)
    shutil.copytree(ROOT / "results" / BESIDE / "mlp", folder / "results" / BESIDE / "mlp")
    return folder


@pytest.fixture(scope="module")
def made(clone: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        name = f"{PAPER}/pruning"
        patch.setattr(rendering, "FIGURES", {name: FIGURES[name]})
        render_results(clone / "results", clone / "made")
    return clone / "made"


def test_tables_say_what_the_documentation_says(clone: Path, made: Path) -> None:
    shown = {
        each["name"]: each for each in RenderedResults(None, made).read_papers()[PAPER]["tables"]
    }
    table = load_table(clone / "tables" / PAPER / "pruning.toml")
    told = render_table(table, clone / "results", clone / "experiments")
    lines = "\n".join(format_table(told))
    for row in shown[table.name]["rows"]:
        assert f"| {row['label']} | {' | '.join(row['cells'])} |" in lines
    missing = [each for each in shown.values() if each["missing"]]
    assert [each["missing"] for each in missing] == ["not measured yet"] * len(missing)
    assert missing


def test_a_heat_map_counts_every_verdict(made: Path) -> None:
    (found,) = RenderedResults(None, made).read_papers()[PAPER]["heat_maps"]
    assert found["name"] == f"{PAPER}/robustness"
    assert found["track"].startswith("shortened for a CPU")
    for row in found["rows"]:
        assert len(row["cells"]) == len(found["columns"])
        for cell in filter(None, row["cells"]):
            counts = re.findall(r"(\d+) (owned|not proven|no verdict)", cell["says"])
            every = sum(int(n) for n, _ in counts)
            owned = sum(int(n) for n, outcome in counts if outcome == "owned")
            assert cell["fifths"] == round(5 * owned / every)


def test_pages_show_what_was_rendered_and_nothing_else(
    room: Path, clone: Path, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "state" / "results")
    settings = replace(settings_of(room), state=tmp_path / "state", results=clone / "results")
    with visited(settings) as visitor:
        assert not visitor.site.results.is_rendering, "nothing is stale"
        visitor.log_in()
        listed = visitor.http.get("/benchmarks").text
        assert "Uchida 2017" in listed
        assert "Robustness" in listed, "what was measured beside the papers is shown as well"
        page = visitor.http.get(f"/benchmarks/{PAPER}").text
        for said in ("not measured yet", "shortened for a CPU", 'class="heat5"', "(paper "):
            assert said in page
        figure = visitor.http.get(f"/figures/{PAPER}/pruning.png")
        assert figure.content[:4] == b"\x89PNG"
        for name in ("absent.png", "index.png", "..%2findex.png"):
            assert visitor.http.get(f"/figures/{PAPER}/{name}").status_code == 404
        assert visitor.http.get("/benchmarks/absent").status_code == 404
        assert "not embedded" in visitor.http.get(f"/benchmarks/{BESIDE}").text
        assert visitor.program.get("/api/benchmarks").json()[PAPER]["title"] == "Uchida 2017"


def test_what_changed_is_rendered_again(clone: Path, made: Path, tmp_path: Path) -> None:
    assert json.loads((made / INDEX).read_text())["stamp"] == digest_results(clone / "results")
    results = tmp_path / "results"  # changed for this test alone
    shutil.copytree(clone / "results", results)
    stamp = digest_results(results)
    (results / PAPER / "another.json").write_text("{}")
    assert stamp != digest_results(results)
