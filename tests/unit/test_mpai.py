"""The evaluation of MPAI-NNW counts what it says, on as many networks as it says."""

from __future__ import annotations

from typing import Any

import pytest

from countermark.bench.mpai import MODIFICATIONS, Trial, evaluate, page
from countermark.errors import ConfigError

TINY: dict[str, Any] = {"train": 600, "epochs": 3}
FIELDS = {"layer": "2.weight", "bits": 128, "strength": 1.0}


@pytest.fixture(scope="module")
def done() -> dict[str, Any]:
    chosen = [("noise", {"std": 0.1}), ("permute", {}), ("prune", {"fraction": 1.0})]
    return evaluate(
        Trial("uchida", FIELDS, networks=2, payloads=2, modifications=chosen, alpha=1e-3, **TINY)
    )


def test_every_network_is_modified_and_judged(done: dict[str, Any]) -> None:
    rows = {row["modification"]: row for row in done["robustness"]}
    assert list(rows) == ["none", "noise", "permute", "prune"]
    assert all(row["networks"] == 6 and row["false_positives"] == 0 for row in rows.values())
    assert [rows[name]["false_negatives"] for name in rows] == [0, 0, 4, 4]
    assert rows["none"]["symbol_error_rate"] < 0.2
    assert 0.35 < rows["permute"]["symbol_error_rate"] < 0.65
    assert rows["permute"]["accuracy"] == pytest.approx(rows["none"]["accuracy"], abs=0.3)
    assert rows["prune"]["accuracy"] < 20 < done["imperceptibility"]["accuracy_marked"]
    assert all(done["cost"][name] > 0 for name in done["cost"])
    assert done["trial"]["modifications"][0] == {"attack": "noise", "std": 0.1}


def test_the_page_has_a_line_for_each_modification(done: dict[str, Any]) -> None:
    lines = page(done).splitlines()
    assert len(lines) == 5 + 4
    assert "× the CPU time of the unmarked training" in lines[1]
    assert lines[-1].startswith("| prune fraction 1.0 | 0 of 2 | 4 of 4 | ")


def test_a_scheme_that_needs_siblings_gets_them() -> None:
    fields = {"layer": "2.weight", "bits": 128, "hidden": 32, "settling": 20}
    trial = Trial(
        "independent_network", fields, networks=1, payloads=1, siblings=3, alpha=1e-2,
        modifications=[("noise", {"std": 0.1})], **TINY,
    )  # fmt: skip
    done = evaluate(trial)
    assert [row["networks"] for row in done["robustness"]] == [2, 2]
    assert done["robustness"][0]["symbol_error_rate"] < 0.1


def test_what_cannot_be_evaluated_is_said() -> None:
    with pytest.raises(ConfigError, match="at least one network"):
        evaluate(Trial("uchida", FIELDS, networks=0))
    assert {name for name, _ in MODIFICATIONS} >= {"noise", "prune", "quantise", "fine_tune"}
