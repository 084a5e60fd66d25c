"""Alignment undoes what leaves outputs equal, and looks at nothing that the key reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from countermark.alignment import Reference, realign_suspect
from countermark.alignment.symmetries import PermutationGroup, find_chain_groups
from countermark.alignment.symmetries.tracing import trace_permutation_groups
from countermark.attacks.base import Attack
from countermark.attacks.fold import Fold
from countermark.attacks.invariants import Dummies, FlipSigns, Permute, Rescale
from countermark.attacks.isomorph import Isomorph, OnnxModel
from countermark.attacks.noise import Noise
from countermark.checkpoints import ModuleWeights, open_weights, save_weights
from countermark.errors import AlignmentError, ConfigError
from countermark.training.data import load_data
from countermark.training.models import build

HOSTS = {
    "mlp": ({}, ("0.weight", "2.weight")),
    "lenet": ({}, ("conv1.weight", "conv2.weight", "fc1.weight")),
    "vgg16": ({"width": 0.125}, ("features.0.weight", "features.24.weight")),
    "resnet18": ({"width": 0.125}, ("conv1.weight", "layer2.0.conv1.weight",
                                    "layer4.1.conv2.weight")),
    "wrn-10-4": ({"widen": 1}, ("conv2.0.conv2.weight",)),
}  # fmt: skip
CASES = [(name, layer) for name, (_, layers) in HOSTS.items() for layer in layers]


def host(name: str, seed: int = 0) -> nn.Module:
    """An untrained model whose batch norms have seen something."""
    torch.manual_seed(seed)
    model = build(name, HOSTS[name][0])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def after(model: nn.Module, *attacks: Attack) -> nn.Module:
    for attack in attacks:
        model = attack.run(model).model
    return model


def read(suspect: nn.Module, reference: Reference, *layers: str) -> list[np.ndarray]:
    with open_weights(reference.weights) as weights:
        wanted = {name: weights.tensors[name].shape for name in layers}
    found = realign_suspect(ModuleWeights(suspect), reference, wanted)
    return [found.tensors[name] for name in layers]


DISGUISES: dict[str, Sequence[Attack]] = {
    "nothing": (),
    "order and scale": (Permute(), Rescale()),
    "zeros": (Dummies("zero"), Rescale(), Permute()),
    "copies": (Dummies("split"), Rescale(), Permute()),
    "cliques": (Dummies("clique"), Rescale(), Permute()),
    "all": (Dummies("split"), Dummies("zero"), Dummies("clique"), Rescale(), Permute(seed=1)),
}


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_disguises_are_undone(name: str, layer: str, disguise: str) -> None:
    model = host(name)
    suspect = after(model, *DISGUISES[disguise])
    own = model.get_parameter(layer).detach().numpy()
    (found,) = read(suspect, Reference.from_module(model), layer)
    if disguise != "nothing":
        worn = suspect.get_parameter(layer).detach().numpy()
        assert worn.shape != own.shape or np.abs(worn - own).max() > 0.1 * np.abs(own).max()
    assert np.abs(found - own).max() < 1e-3 * np.abs(own).max()


@pytest.mark.parametrize("attacks", [(FlipSigns(), Permute()), (Permute(), Rescale(), Fold())],
                         ids=["flipped", "folded"])  # fmt: skip
@pytest.mark.parametrize(("name", "layer"), [each for each in CASES if "conv" in each[1]][2:])
def test_flips_and_folds_are_undone(name: str, layer: str, attacks: Sequence[Attack]) -> None:
    model = host(name)
    suspect, own = after(model, *attacks), model.get_parameter(layer).detach().numpy()
    (found,) = read(suspect, Reference.from_module(model), layer)
    assert np.abs(found - own).max() < 1e-3 * np.abs(own).max()


@pytest.mark.parametrize("layer", ["features.0.weight", "features.3.weight", "features.24.weight"])
def test_flips_are_undone_by_initial_weights(layer: str) -> None:
    """Their norms have seen nothing yet, so that the sign of a norm's weight alone tells."""
    model = host("vgg16")
    start = copy.deepcopy(model)
    for module in start.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    suspect = after(model, Noise(0.2), FlipSigns(), Permute())
    own = model.get_parameter(layer).detach().numpy()
    (found,) = read(suspect, Reference.from_module(start), layer)
    assert np.corrcoef(found.ravel(), own.ravel())[0, 1] > 0.9


def test_a_norm_of_the_reference_may_be_negative() -> None:
    model = host("vgg16")
    turned = after(model, FlipSigns(seed=1))
    norm = turned.get_parameter("features.1.weight")
    assert (norm < 0).any()
    assert (norm > 0).any()
    for layer in HOSTS["vgg16"][1]:
        own = turned.get_parameter(layer).detach().numpy()
        (found,) = read(after(turned, FlipSigns(), Permute()), Reference.from_module(turned), layer)
        assert np.abs(found - own).max() < 1e-3 * np.abs(own).max()


def test_noise_costs_no_more_than_it_is() -> None:
    model = host("vgg16")
    suspect = after(model, Noise(0.3), Rescale(), Permute())
    own = model.get_parameter("features.24.weight").detach().numpy()
    (found,) = read(suspect, Reference.from_module(model), "features.24.weight")
    assert np.corrcoef(found.ravel(), own.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(("name", "layer"), [("mlp", "2.weight"), ("vgg16", "features.24.weight")])
def test_what_the_key_reads_of_the_reference_has_no_say(name: str, layer: str) -> None:
    """Else the order would depend on the message, and unmarked models would seem marked."""
    model, other = host(name), host(name, seed=1)
    poisoned = copy.deepcopy(model)
    nn.init.normal_(poisoned.get_parameter(layer), 0, 7)
    one, two = (read(other, Reference.from_module(each), layer) for each in (model, poisoned))
    assert np.array_equal(one[0], two[0])
    away = copy.deepcopy(model)
    nn.init.normal_(away.get_parameter("0.weight" if name == "mlp" else "features.21.weight"))
    assert not np.array_equal(read(other, Reference.from_module(away), layer)[0], one[0])


def test_a_key_that_reads_everything_cannot_be_aligned() -> None:
    model = host("mlp")
    with pytest.raises(AlignmentError, match="cannot be put in order without looking at the mark"):
        read(model, Reference.from_module(model), "0.weight", "2.weight")


def test_renamed_tensors_are_found_by_their_values(tmp_path: Path) -> None:
    model = host("vgg16")
    suspect = after(model, Permute())
    names = list(suspect.state_dict())
    order = np.random.default_rng(0).permutation(len(names))
    renamed = {f"t{order[at]}": suspect.state_dict()[name] for at, name in enumerate(names)}
    save_weights(renamed, tmp_path / "renamed.safetensors")
    layer = "features.24.weight"
    shape = {layer: tuple(model.get_parameter(layer).shape)}
    with open_weights(tmp_path / "renamed.safetensors") as weights:
        found = realign_suspect(weights, Reference.from_module(model), shape)
    assert found.where == {layer: f"t{order[names.index(layer)]}"}
    assert np.array_equal(found.tensors[layer], model.get_parameter(layer).detach().numpy())


@pytest.mark.parametrize("classes", [2, 100])
def test_a_head_for_other_classes_is_no_obstacle(classes: int) -> None:
    model = host("vgg16")
    suspect = after(model, Permute(), Rescale())
    suspect.classifier = nn.Linear(model.classifier.in_features, classes)  # type: ignore[arg-type,union-attr,assignment]
    layer = "features.10.weight"
    (found,) = read(suspect, Reference.from_module(model), layer)
    own = model.get_parameter(layer).detach().numpy()
    assert np.abs(found - own).max() < 1e-3 * np.abs(own).max()


def test_another_architecture_is_refused() -> None:
    with pytest.raises(AlignmentError):
        read(host("lenet"), Reference.from_module(host("mlp")), "2.weight")
    wide = after(host("mlp"), *[Dummies("zero", share=4, seed=n) for n in range(2)])
    with pytest.raises(AlignmentError, match="more than 16 times"):
        read(wide, Reference.from_module(host("mlp")), "2.weight")


def test_fewer_neurons_leave_zeros() -> None:
    model = host("mlp")
    cut = nn.Sequential(nn.Linear(784, 60), nn.ReLU(), nn.Linear(60, 10))
    kept = torch.randperm(64)[:60]
    with torch.no_grad():
        cut[0].weight.copy_(model.get_parameter("0.weight")[kept])
        cut[0].bias.copy_(model.get_parameter("0.bias")[kept])
        cut[2].weight.copy_(model.get_parameter("2.weight")[:, kept])
    (found,) = read(cut, Reference.from_module(model), "2.weight")
    own = model.get_parameter("2.weight").detach().numpy().copy()
    own[:, np.setdiff1d(np.arange(64), kept.numpy())] = 0
    assert np.allclose(found, own, atol=1e-6)


# --- which units there are


def simplified(
    units: Sequence[PermutationGroup],
) -> list[tuple[int, set[tuple[str, int, int, int]]]]:
    return [(u.size, {(m.name, m.axis, m.power, m.each) for m in u.members}) for u in units]


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg16"])
def test_a_chain_is_guessed_as_it_is_traced(name: str) -> None:
    model = host(name)
    guessed = find_chain_groups({n: tuple(t.shape) for n, t in model.state_dict().items()})
    assert simplified(guessed) == simplified(trace_permutation_groups(model))
    for one, other in zip(guessed, trace_permutation_groups(model), strict=True):
        assert [replace(norm, eps=0) for norm in one.norms] == [
            replace(norm, eps=0) for norm in other.norms
        ]
        assert one.domains == other.domains


@pytest.mark.parametrize("name", ["resnet18", "wrn-10-4"])
def test_what_is_no_chain_is_not_taken_for_one(name: str) -> None:
    with pytest.raises(ConfigError, match="no plain chain: name the architecture with --model"):
        find_chain_groups({n: tuple(t.shape) for n, t in host(name).state_dict().items()})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Shared(nn.Module):
    """One layer that is used twice, and one whose channels are mixed by an unknown step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.first(x)))
        return self.last(torch.cumsum(x, 1))


def test_what_cannot_be_followed_is_left_alone() -> None:
    with pytest.raises(ConfigError, match="cannot be traced"):
        trace_permutation_groups(Branching())
    assert trace_permutation_groups(Shared()) == ()
    with pytest.raises(ConfigError, match="no neurons of Shared were found"):
        Permute().run(Shared())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_an_exported_graph_is_read_as_what_it_was(name: str, tmp_path: Path) -> None:
    """Renamed, reordered, folded, half of it in Constant nodes; and permuted before."""
    model, layer = host(name), HOSTS[name][1][-1]
    digits = load_data("digits").subset(train=4)
    colour = replace(digits, train_images=digits.train_images.repeat(1, 3, 1, 1))
    graph = Isomorph().run(Permute().run(model).model, colour).model
    assert isinstance(graph, OnnxModel)
    graph.save(tmp_path / "m.onnx")
    own = model.get_parameter(layer).detach().numpy()
    with open_weights(tmp_path / "m.onnx") as weights:
        found = realign_suspect(weights, Reference.from_module(model), {layer: own.shape})
    assert found.folded
    assert np.abs(found.tensors[layer] - own).max() < 1e-3 * np.abs(own).max()


def test_no_hook_of_the_model_is_run() -> None:
    """A hook may change the model, as those of FSDP2 do when a part of it runs first."""
    ran: list[nn.Module] = []
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2))
    for module in model.modules():
        module.register_forward_pre_hook(lambda hooked, _: ran.append(hooked))
    assert trace_permutation_groups(model)
    assert not ran
