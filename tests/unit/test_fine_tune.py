"""Fine-tuning does what it says: it trains what it names, on what the thief has, reproducibly."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from countermark.attacks import ATTACKS
from countermark.attacks.base import Attack, NamedTensors, TrainingData
from countermark.attacks.fine_tune import FineTune
from countermark.attacks.prune import Prune
from countermark.checkpoints import save_weights
from countermark.cli import run
from countermark.errors import ConfigError
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, accuracy, fit
from countermark.training.models import build, recipe

LR = 1e-3


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits").subset(train=1000)


@pytest.fixture(scope="module")
def victim(digits: Dataset) -> nn.Module:
    """A trained mlp; no test may change it."""
    return trained("mlp", digits)


def trained(name: str, data: Dataset, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build(name, arguments)
    fit(model, data, recipe(name), Course(2, device="cpu"))
    return model


def moved(model: nn.Module, attacked: nn.Module) -> set[str]:
    """The names of the state whose values differ."""
    before, after = model.state_dict(), attacked.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def loss(model: nn.Module, data: TrainingData) -> float:
    with torch.no_grad():
        scores = model(data.normalised(data.train_images))
    return float(F.cross_entropy(scores, data.train_labels))


# --- what is trained


def test_a_good_rate_lowers_the_loss_and_keeps_the_accuracy(
    victim: nn.Module, digits: Dataset
) -> None:
    attacked = FineTune(LR).run(victim, digits)
    assert moved(victim, attacked.model) == set(victim.state_dict())
    assert loss(attacked.model, digits) < 0.95 * loss(victim, digits)
    assert accuracy(attacked.model, digits) > accuracy(victim, digits) - 0.02
    assert (attacked.cost.epochs, attacked.cost.data_share) == (1.0, 1.0)
    assert attacked.cost.seconds > 0


def test_an_absurd_rate_costs_the_accuracy(victim: nn.Module, digits: Dataset) -> None:
    attacked = FineTune(30.0, optimizer="sgd").run(victim, digits)
    assert accuracy(victim, digits) > 0.75
    assert accuracy(attacked.model, digits) < 0.5


def test_more_epochs_train_longer(victim: nn.Module, digits: Dataset) -> None:
    attacked = FineTune(LR, 3).run(victim, digits)
    assert attacked.cost.epochs == 3.0
    assert loss(attacked.model, digits) < loss(FineTune(LR).run(victim, digits).model, digits)


@pytest.mark.parametrize(
    ("name", "last"), [("mlp", {"2.weight", "2.bias"}), ("lenet", {"fc3.weight", "fc3.bias"})]
)
def test_last_moves_only_the_last_layer(name: str, last: set[str], digits: Dataset) -> None:
    model = build(name, {})
    attacked = FineTune(LR, layers="last", rows=64).run(model, digits)
    assert moved(model, attacked.model) == last
    assert all(each.grad is None for each in attacked.model.parameters())


@pytest.mark.parametrize("layers", ["all", "last"])
def test_batch_norms_follow_the_thieves_data(layers: Any, digits: Dataset) -> None:
    torch.manual_seed(0)
    model = build("wrn-10-4", {"widen": 1, "channels": 1}).eval()
    attacked = FineTune(LR, layers=layers, rows=65).run(model, digits)
    running = {name for name, _ in model.named_buffers()}
    assert "bn.running_mean" in running
    assert moved(model, attacked.model) - {"fc.weight", "fc.bias"} >= running
    assert (moved(model, attacked.model) - running == {"fc.weight", "fc.bias"}) == (
        layers == "last"
    )
    assert int(attacked.model.get_buffer("bn.num_batches_tracked")) == 3
    assert not any(each.training for each in attacked.model.modules())


def test_frozen_layers_and_a_caller_without_gradients_do_not_hinder_a_thief(
    victim: nn.Module, digits: Dataset
) -> None:
    frozen = copy.deepcopy(victim).requires_grad_(False)
    with torch.no_grad():
        attacked = FineTune(LR, rows=64).run(frozen, digits)
    assert moved(frozen, attacked.model) == set(frozen.state_dict())
    assert not any(each.requires_grad for each in frozen.parameters())


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [(torch.optim.Adam, "adam"), (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), "sgd")],
)
def test_two_steps_are_those_of_the_optimizer(
    victim: nn.Module, digits: Dataset, optimizer: Any, step: Any
) -> None:
    few = digits.subset(train=8)
    by_hand = copy.deepcopy(victim)
    steps = optimizer(by_hand.parameters(), 0.01)
    for _ in range(2):
        steps.zero_grad()
        F.cross_entropy(by_hand(few.normalised(few.train_images)), few.train_labels).backward()
        steps.step()
    attacked = FineTune(0.01, 2, optimizer=step).run(victim, few)
    for name, each in by_hand.named_parameters():
        torch.testing.assert_close(attacked.model.get_parameter(name), each)


# --- the contract


def test_victim_and_random_state_stay_as_they_are(victim: nn.Module, digits: Dataset) -> None:
    model = nn.Sequential(copy.deepcopy(victim), nn.Dropout(0.5), nn.Linear(10, 10)).train()
    before, state = states(model), torch.get_rng_state()
    attacked = FineTune(LR, rows=64, new_classes=10).run(model, digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model.training
    assert not attacked.model.training
    with pytest.raises(ConfigError):
        FineTune(LR, new_classes=7).run(model, digits)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_repeats_it_and_another_does_not(victim: nn.Module, digits: Dataset) -> None:
    model = nn.Sequential(nn.Dropout(0.2), copy.deepcopy(victim))

    def state(seed: int) -> Tensor:
        torch.rand(1)  # the caller's generator stands elsewhere each time
        attack = FineTune(LR, rows=100, new_classes=10, seed=seed)
        return attack.run(model, digits).model.get_parameter("1.2.weight")

    first = state(0)
    assert torch.equal(first, state(0))
    assert not torch.equal(first, state(1))


def test_only_the_drawn_rows_are_trained_on(victim: nn.Module, digits: Dataset) -> None:
    seen: list[Tensor] = []

    class Watched:
        train_images, train_labels = digits.train_images, digits.train_labels
        classes = digits.classes

        def normalised(self, images: Tensor) -> Tensor:
            seen.extend(images)
            return digits.normalised(images)

    attacked = FineTune(LR, 2, rows=50, batch_size=16).run(victim, Watched())
    assert attacked.cost.data_share == 0.05
    assert len(seen) == 1 + 2 * 50  # the first asks how many classes the model knows
    pictures = {each.numpy().tobytes() for each in seen[1:]}
    assert len(pictures) == 50
    assert pictures != {each.numpy().tobytes() for each in digits.train_images[:50]}


def test_an_attack_that_needs_no_data_ignores_it(victim: nn.Module, digits: Dataset) -> None:
    alone, given = Prune(0.5).run(victim), Prune(0.5).run(victim, digits)
    assert not moved(alone.model, given.model)
    assert given.cost.data_share == 0.0


# --- another domain


@pytest.mark.parametrize("layers", ["all", "last"])
def test_another_domain_gets_an_output_layer_of_its_own(
    victim: nn.Module, digits: Dataset, layers: Any
) -> None:
    parity = replace(
        digits, train_labels=digits.train_labels % 2, test_labels=digits.test_labels % 2, classes=2
    )
    attacked = FineTune(LR, 2, new_classes=2, layers=layers).run(victim, parity).model
    output = attacked.get_submodule("2")
    assert isinstance(output, nn.Linear)
    assert (output.weight.shape, output.out_features) == ((2, 64), 2)
    assert output.bias.shape == (2,)
    assert victim.get_parameter("2.weight").shape == (10, 64)
    assert accuracy(attacked, parity) > 0.7
    first = attacked.get_parameter("0.weight")
    assert torch.equal(first, victim.get_parameter("0.weight")) == (layers == "last")


def test_the_same_number_of_classes_relearns_the_layer(victim: nn.Module, digits: Dataset) -> None:
    attacked = FineTune(LR, 2, new_classes=10, layers="last").run(victim, digits).model
    assert moved(victim, attacked) == {"2.weight", "2.bias"}
    old, new = (states(each)["2.weight"].flatten() for each in (victim, attacked))
    assert torch.corrcoef(torch.stack([old, new]))[0, 1] < 0.6
    assert accuracy(attacked, digits) > 0.5


def test_a_convolution_without_bias_stays_one(digits: Dataset) -> None:
    torch.manual_seed(0)
    head = nn.Conv2d(4, 10, 3, stride=2, padding=1, bias=False)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    attacked = FineTune(LR, rows=32, new_classes=10).run(model, digits).model
    output = attacked.get_submodule("2")
    assert isinstance(output, nn.Conv2d)
    assert output.bias is None
    assert (output.stride, output.padding) == ((2, 2), (1, 1))
    assert output.weight.shape == (10, 4, 3, 3)


def test_a_bare_layer_is_its_own_output_layer(digits: Dataset) -> None:
    flat = replace(digits, train_images=digits.train_images[:, :, 14, :])  # (N, 1, 28)

    class Rows(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.flatten(1))

    flat = replace(flat, train_images=flat.train_images[:, :, None])
    attacked = FineTune(LR, rows=32, new_classes=10).run(Rows(28, 3), flat)
    assert attacked.model.get_parameter("weight").shape == (10, 28)


# --- what cannot be right


class Silent(nn.Module):
    """A model with parameters that answers with no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def forward(self, _: Tensor) -> str:
        return "no scores"


NORMED = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))


class Aside(nn.Sequential):
    """A model whose last registered layer has no part in its answer."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 10), nn.Linear(3, 3))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self[1](self[0](images))
        return scores


@pytest.mark.parametrize(
    ("model", "fields", "says"),
    [
        (build("mlp", {}), {"rows": 1001}, "rows is 1001, the data have 1000 training rows"),
        (build("mlp", {"classes": 12}), {}, "set new_classes=10"),
        (build("mlp", {}), {"new_classes": 7}, "set new_classes=10"),
        (build("mlp", {"in_features": 5}), {}, "does not take images of shape (1, 1, 28, 28)"),
        (NORMED, {"rows": 1}, "Expected more than 1 value"),
        (Aside(), {"new_classes": 10}, "convolutional layer has no part in the model's answer"),
        (Aside(), {"layers": "last"}, "set layers=all"),
        (Aside().requires_grad_(False), {"layers": "last"}, "set layers=all"),
        (Silent(), {}, "the model answers with a str"),
        (nn.Conv2d(1, 10, 3), {}, "the model answers with shape (1, 10, 26, 26)"),
        (nn.Flatten(), {}, "no parameters"),
        (nn.PReLU(), {"new_classes": 10}, "no linear or convolutional layer"),
        (NamedTensors({"2.weight": torch.ones(10, 64)}), {}, 'missing the required "forward"'),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_does_not_fit_is_one_line(
    model: nn.Module, fields: dict[str, Any], says: str, digits: Dataset
) -> None:
    with pytest.raises(ConfigError) as caught:
        FineTune(LR, **fields).run(model, digits)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


REQUIRED: dict[str, dict[str, Any]] = {
    "fine_tune": {"lr": LR},
    "overwrite": {"mark": {"layer": "2.weight"}},
}


@pytest.mark.parametrize("attack", [each for each in ATTACKS.values() if each.needs_data])
def test_an_attack_that_trains_asks_for_data(attack: type[Attack], victim: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"needs data: call run\(model, data\)"):
        attack.from_fields(REQUIRED.get(attack.name, {})).run(victim)


def test_the_learning_rate_must_be_given() -> None:
    with pytest.raises(ConfigError, match="fine_tune needs 'lr'"):
        FineTune.from_fields({})
    with pytest.raises(TypeError, match="lr"):
        FineTune()  # type: ignore[call-arg]
    assert FineTune.list_default_fields()["lr"] == "(required)"
    assert FineTune.from_fields(FineTune(LR, rows=5).to_fields()) == FineTune(LR, rows=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("epochs", 0),
        ("batch_size", 0),
        ("optimizer", "rmsprop"),
        ("layers", "first"),
        ("rows", 0),
        ("new_classes", 0),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"field {field} is"):
        FineTune.from_fields({"lr": LR, field: value})


# --- from the command line


@pytest.fixture
def made(victim: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the victim's file `m.safetensors`."""
    monkeypatch.chdir(tmp_path)
    save_weights(victim.state_dict(), tmp_path / "m.safetensors")
    return tmp_path


TUNE = "attack run fine_tune m.safetensors --out t.safetensors"
HOST = f"{TUNE} --model mlp --data digits"


def test_the_command_prints_rate_cost_and_accuracy(
    made: Path, victim: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{HOST} --model-arg hidden=64 --set lr=0.001 --set rows=300"
    assert run([*line.split(), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fields"] == FineTune(0.001, rows=300).to_fields()
    assert (said["cost"]["epochs"], said["cost"]["data_share"]) == (1.0, 0.05)
    data = load_data("digits")
    assert said["accuracy_before"] == accuracy(victim, data)
    tuned = FineTune(0.001, rows=300).run(victim, data).model
    if not torch.cuda.is_available():
        assert said["accuracy_after"] == accuracy(tuned, data)
        written = load_file("t.safetensors")
        assert all(torch.equal(written[n], each) for n, each in tuned.state_dict().items())
    (made / "t.safetensors").unlink()
    assert run(line.split()) == 0
    text = capsys.readouterr().out
    assert "lr=0.001" in text
    before, after = (100 * said[f"accuracy_{when}"] for when in ("before", "after"))
    assert f"test accuracy {before:.2f} % before, {after:.2f} % after" in text


def test_a_model_of_other_classes_has_no_accuracy_before(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(build("mlp", {"classes": 3}).state_dict(), made / "three.safetensors")
    line = f"{HOST} --model-arg classes=3 --set lr=0.01 --set rows=300 --set new_classes=10 --json"
    assert run(line.replace("m.safetensors", "three.safetensors", 1).split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["accuracy_before"] is None
    assert said["accuracy_after"] > 0.3
    assert load_file("t.safetensors")["2.weight"].shape == (10, 64)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{HOST}", "fine_tune needs 'lr'"),
        (f"{TUNE} --set lr=0.1", "give it --model NAME and --data NAME|DIR"),
        (f"{TUNE} --set lr=0.1 --model mlp", "give it --model NAME and --data NAME|DIR"),
        (f"{TUNE} --set lr=0.1 --data digits", "give it --model NAME and --data NAME|DIR"),
        (f"{HOST} --set lr=fast", "field lr is 'fast'"),
        (f"{HOST} --set lr=0.1 --model-arg hidden=8", "does not fit the model"),
        (f"{HOST} --set lr=0.1 --model-arg hiden=8", "it takes in_features, hidden, classes"),
        (f"{TUNE} --set lr=0.1 --model mpl --data digits", "unknown model 'mpl'"),
        (f"{TUNE} --set lr=0.1 --model mlp --data digit", "no data directory 'digit'"),
        (f"{HOST} --set lr=0.1 --set rows=6001", "the data have 6000 training rows"),
        (f"{HOST} --set lr=0.1".replace("fine_tune", "prune"), "prune has no field 'lr'"),
        (HOST.replace("fine_tune", "prune"), "prune works on the tensors alone: leave out --model"),
    ],
)
def test_the_command_refuses_in_one_line(
    made: Path, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (why,) = said.err.splitlines()
    assert says in why
    assert [each.name for each in made.iterdir()] == ["m.safetensors"]
