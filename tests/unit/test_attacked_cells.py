"""What a cell says of attacks: their cost, what is read after alignment, what cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from countermark_lab.experiments.cell import compute_host_cell
from countermark_lab.experiments.experiment import (
    AttackChain,
    AttackStep,
    Cell,
    Experiment,
    HostSettings,
    SchemeRow,
    expand_cells,
)

CHAINS = (
    AttackChain(label="tuned", steps=(AttackStep(attack="fine_tune", fields={"lr": 0.001, "rows": 200}),),
            cost=True),
    AttackChain(label="permuted", steps=(AttackStep(attack="permute"),), reference="start", cost=True),
    AttackChain(label="joined", steps=(AttackStep(attack="dummies"), AttackStep(attack="permute")),
            reference="marked"),
    AttackChain(label="plain", steps=(AttackStep(attack="quantise"),)),
)  # fmt: skip


@dataclass(frozen=True)
class Computed:
    """The figures of a cell, and each chain's by its label."""

    cell: Cell
    figures: dict[str, Any]

    @property
    def chains(self) -> dict[str, dict[str, Any]]:
        return {each["label"]: each for each in self.figures["attacked"]}


@pytest.fixture(scope="module")
def computed() -> Computed:
    fields = {"layer": "2.weight", "bits": 128, "strength": 1.0}
    experiment = Experiment(
        name="attacked", title="t", track="tiny", seeds=(1,), attacks=CHAINS,
        host=HostSettings(model="mlp", data="digits", train=800, test=200, epochs=4),
        rows=(SchemeRow(label="u", scheme="uchida", fields=fields),),
    )  # fmt: skip
    (cell,) = expand_cells(experiment)
    return Computed(cell, compute_host_cell(cell))


def test_costs_are_shares_of_the_host_s_own_training(computed: Computed) -> None:
    chains = computed.chains
    assert chains["tuned"]["cost"] == pytest.approx(100 * 200 / 800 / 4)
    assert chains["permuted"]["cost"] == 0
    assert "cost" not in chains["plain"]


def test_what_is_read_after_alignment_stands_beside_what_is_read_before(
    computed: Computed,
) -> None:
    chains, own = computed.chains, computed.figures["wrong"]
    assert own < 20
    assert chains["permuted"]["wrong"] > 40
    assert chains["permuted"]["aligned"]["outcome"] == "owned"
    assert chains["permuted"]["aligned"]["null"] == "fair_coin"
    assert chains["joined"]["wrong"] is None  # a tensor of that shape is gone
    assert chains["joined"]["outcome"] == "no_verdict"
    assert chains["joined"]["aligned"]["wrong"] == own
    assert chains["joined"]["aligned"]["null"] == "aligned_coin"
    assert "aligned" not in chains["plain"]


def test_cells_that_ask_for_none_of_it_keep_their_names(computed: Computed) -> None:
    plain = computed.cell.model_dump(mode="json")["attacks"][-1]
    assert plain == {
        "label": "plain", "steps": [{"attack": "quantise", "fields": {}}],
    }  # fmt: skip
