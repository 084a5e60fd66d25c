"""The contract that every attack keeps, one row of facts each; a new attack adds its row here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from countermark.attacks import ATTACKS
from countermark.attacks.base import Attack, AttackResult
from countermark.checkpoints import save_weights
from countermark.errors import ConfigError
from countermark.training.data import load_data
from countermark.training.loop import Course, fit, seed_torch
from countermark.training.models import build, recipe
from tiny_transformers import TINY, WORDS_GIVEN, tiny_lm

DATA = load_data("digits").subset(train=300, test=100)
IMAGES = DATA.normalised(DATA.test_images)
LAYER = "layer"  # replaced by the name of the tensor that the host's marks lie in
OTHERS = "others"  # replaced by files of unmarked models


@dataclass(frozen=True)
class Facts:
    """What the contract needs to know of an attack.

    Attributes:
        does: "equal" changes weights and keeps outputs to 1e-5; "changes" changes outputs, too;
            "finds" leaves the model as it is and finds something.
        host: the model that it is run on.
    """

    name: str
    does: Literal["equal", "changes", "finds"]
    fields: dict[str, Any] = field(default_factory=dict)
    host: str = "mlp"


MARK = {"layer": LAYER, "bits": 128}
ROWS = [
    Facts("prune", "changes"),
    Facts("prune_unused", "equal"),
    Facts("prune_structured", "changes"),
    Facts("fine_prune", "changes", {"rows": 64}),
    Facts("quantise", "changes", {"bits": 3}),
    Facts("noise", "changes"),
    Facts("shift", "changes"),
    Facts("average", "changes", {"others": OTHERS}),
    Facts("fine_tune", "changes", {"lr": 0.001}),
    Facts("fine_tune_sweep", "changes", {"lr": 0.001}),
    Facts("lora", "changes"),
    Facts("retrain", "changes", {"epochs": 2}),
    Facts("imitate", "changes", {"epochs": 1}),
    Facts("overwrite", "changes", {"mark": MARK}),
    Facts("overwrite_closed_form", "changes", {"mark": MARK}),
    Facts("permute", "equal"),
    Facts("rescale", "equal"),
    Facts("flip_signs", "equal", host="resnet18"),
    Facts("dummies", "equal", {"kind": "split"}),
    Facts("fold", "equal", host="resnet18"),
    Facts("isomorph", "equal"),
    Facts("dead_units", "changes"),
    Facts("shift_logits", "changes"),
    Facts("reorder_classes", "changes"),
    Facts("rotate", "equal", host="llama"),
    Facts("turn_values", "equal", host="gpt"),
    Facts("move_blocks", "equal", host="gpt"),
    Facts("forge_reader", "finds", {"layer": LAYER, "bits": 64}),
    Facts("forge_signs", "finds", {"layer": LAYER}),
    Facts("search_key", "finds", {"mark": MARK, "tries": 5}),
    Facts("forge_triggers", "finds", {"triggers": 20}),
    Facts("invert", "changes", {"mark": MARK}),
    Facts("detect_statistic", "finds", {"layer": LAYER, "others": OTHERS}),
    Facts("detect_sorted", "finds", {"layer": LAYER, "marked": OTHERS, "unmarked": OTHERS}),
]
HOSTS: dict[str, tuple[dict[str, Any], str]] = {
    "mlp": ({}, "2.weight"),
    "resnet18": ({"width": 0.125, "channels": 1}, "layer1.0.conv2.weight"),
    "gpt": ({}, "model.h.0.mlp.c_fc.weight"),
    "llama": ({}, "model.layers.0.mlp.up_proj.weight"),
}
SLOW = {"isomorph"}  # an export takes seconds
every_attack = pytest.mark.parametrize(
    "facts",
    [pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.name in SLOW else [])
     for row in ROWS],
)  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """Small hosts that have learnt a little, in eval mode; no test may change them."""
    found = {name: tiny_lm(name) for name in TINY if name in HOSTS}
    for name, (arguments, _) in HOSTS.items():
        if name in found:
            continue
        seed_torch(1, name)
        host = build(name, arguments)
        fit(host, DATA, replace(recipe(name), batch_size=32), Course(1, device="cpu"))
        found[name] = host.eval()
    return found


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, files = tmp_path_factory.mktemp("others"), []
    for seed in range(3):
        seed_torch(seed, "other")
        path = folder / f"{seed}.safetensors"
        save_weights(build("mlp", {}).state_dict(), path)
        files.append(str(path))
    return files


def filled(value: Any, layer: str, others: list[str]) -> Any:
    """Fields with the names that stand for something replaced by it."""
    if isinstance(value, dict):
        return {name: filled(each, layer, others) for name, each in value.items()}
    return {LAYER: layer, OTHERS: others}.get(value, value) if isinstance(value, str) else value


def attack_of(facts: Facts, others: list[str]) -> Attack:
    return ATTACKS[facts.name].from_fields(filled(facts.fields, HOSTS[facts.host][1], others))


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(WORDS_GIVEN if hasattr(model, "lm_head") else IMAGES)
    return scores


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_every_attack_is_under_contract() -> None:
    assert [row.name for row in ROWS] == list(ATTACKS)
    assert len(ATTACKS) >= 20


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_no_attack_can_be_handed_a_key(attack: type[Attack]) -> None:
    assert list(inspect.signature(attack.run).parameters) == ["self", "model", "data"]
    assert not {"key", "keys", "secret"} & set(inspect.signature(attack).parameters)
    assert attack.run is Attack.run
    assert attack.does
    assert attack.source


@every_attack
def test_the_input_stays_as_it_is(
    facts: Facts, hosts: dict[str, nn.Module], others: list[str]
) -> None:
    host, files = hosts[facts.host], [Path(each).read_bytes() for each in others]
    before, shapes = states(host), [(each.shape, each.dtype) for each in host.parameters()]
    grads, drawn = [p.requires_grad for p in host.parameters()], torch.get_rng_state()
    attacked = attack_of(facts, others).run(host, DATA)
    assert same(states(host), before)
    assert [(each.shape, each.dtype) for each in host.parameters()] == shapes
    assert [p.requires_grad for p in host.parameters()] == grads
    assert all(each.grad is None for each in host.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [Path(each).read_bytes() for each in others] == files
    assert attacked.model is not host
    does_what_it_says(facts, host, attacked)


def does_what_it_says(facts: Facts, host: nn.Module, attacked: AttackResult) -> None:
    before, after = answers(host), answers(attacked.model.eval())
    changed = not same(states(host), states(attacked.model))
    if facts.does == "finds":
        assert not changed
        assert attacked.found
    elif facts.does == "equal":
        assert changed
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    else:
        assert changed
        assert float((after - before).abs().max()) > 1e-4 * float(before.abs().max())
    assert attacked.cost.seconds > 0
    assert 0 <= attacked.cost.data_share <= 1
    assert (
        facts.name == "prune_unused"
        or bool(attacked.cost.data_share) == ATTACKS[facts.name].needs_data
    )


@every_attack
def test_an_attack_is_repeated_exactly(
    facts: Facts, hosts: dict[str, nn.Module], others: list[str]
) -> None:
    attack = attack_of(facts, others)
    one, two = (attack.run(hosts[facts.host], DATA) for _ in range(2))
    assert same(states(one.model), states(two.model))
    assert one.found == two.found
    assert type(attack).from_fields(attack.to_fields()) == attack


@pytest.mark.parametrize("facts", [row for row in ROWS if ATTACKS[row.name].needs_data],
                         ids=lambda row: row.name)  # fmt: skip
def test_without_data_it_says_so(
    facts: Facts, hosts: dict[str, nn.Module], others: list[str]
) -> None:
    with pytest.raises(ConfigError, match=f"^{facts.name} trains and needs data"):
        attack_of(facts, others).run(hosts[facts.host])
