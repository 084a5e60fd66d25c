"""What single attacks promise beyond the contract: levels, ranks, shapes, rates, readings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from countermark.attacks.average import Average
from countermark.attacks.detect import DetectSorted, DetectStatistic
from countermark.attacks.fine_prune import FinePrune
from countermark.attacks.fold import Fold
from countermark.attacks.forge import ForgeReader, ForgeSigns, Invert, SearchKey
from countermark.attacks.forge_triggers import ForgeTriggers
from countermark.attacks.imitate import Imitate
from countermark.attacks.invariants import Dummies, FlipSigns, Permute, Rescale
from countermark.attacks.isomorph import Isomorph, OnnxModel
from countermark.attacks.lora import LoRA
from countermark.attacks.noise import Noise, Shift
from countermark.attacks.overwrite import OverwriteClosedForm
from countermark.attacks.prune_structured import PruneStructured
from countermark.attacks.quantise import Quantise
from countermark.attacks.sweep import FineTuneSweep
from countermark.checkpoints import open_weights, save_weights
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.uchida.scheme import Uchida
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, accuracy, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.verification.verify import read_suspect

MARK = {"layer": "2.weight", "bits": 128}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits").subset(train=1000, test=500)


@pytest.fixture(scope="module")
def marked(digits: Dataset) -> tuple[nn.Module, Key]:
    """An owner's model, in eval mode; no test may change it."""
    seed_torch(1, "init")
    model, material = build("mlp", {}), KeyMaterial.from_test_seed(1)
    with Uchida("2.weight", 256, strength=0.5).embed(model, owner="A", material=material) as mark:
        fit(model, digits, recipe("mlp"), Course(4, seed=1, device="cpu"), mark=mark)
    return model.eval(), mark.key


def weight(model: nn.Module, name: str = "2.weight") -> Tensor:
    return model.get_parameter(name).detach()


# --- small changes


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_quantised_weights_have_so_many_levels(
    marked: tuple[nn.Module, Key], bits: int, per: Any
) -> None:
    own, rounded = weight(marked[0]), weight(Quantise(bits, per).run(marked[0]).model)
    rows = rounded if per == "channel" else rounded[None]
    assert all(len(row.unique()) <= 2**bits - 1 for row in rows)
    step = own.abs().amax(1 if per == "channel" else (0, 1)) / (2 ** (bits - 1) - 1)
    assert ((rounded - own).abs() <= step.reshape(-1, 1) / 2 + 1e-7).all()
    with pytest.raises(ConfigError):
        Quantise(1)


def test_noise_has_the_size_that_is_said(marked: tuple[nn.Module, Key]) -> None:
    change = weight(Noise(0.5).run(marked[0]).model, "0.weight") - weight(marked[0], "0.weight")
    assert float(change.std() / weight(marked[0], "0.weight").std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(change.mean() / change.std())) < 0.02


def test_a_shift_takes_the_mean_filter_and_so_the_published_mark(digits: Dataset) -> None:
    seed_torch(1, "init")
    model = build("mlp", {})
    scheme = Uchida("0.weight", 128, read="filter_mean", regularizer="bce", strength=0.1)
    with scheme.embed(model, owner="A", material=KeyMaterial.from_test_seed(2)) as mark:
        fit(model, digits, recipe("mlp"), Course(3, seed=1, device="cpu"), mark=mark)
    shifted = Shift().run(model).model
    assert float(weight(shifted, "0.weight").mean(0).abs().max()) < 1e-7
    assert read_suspect(model, mark.key).match_count > 120
    assert read_suspect(shifted, mark.key).match_count < 90


def test_an_average_is_one(marked: tuple[nn.Module, Key], tmp_path: Path) -> None:
    other = Noise(1.0).run(marked[0]).model
    save_weights(other.state_dict(), tmp_path / "other.safetensors")
    merged = Average([str(tmp_path / "other.safetensors")], share=0.25).run(marked[0]).model
    torch.testing.assert_close(weight(merged), 0.25 * weight(marked[0]) + 0.75 * weight(other))
    save_weights(build("lenet", {}).state_dict(), tmp_path / "lenet.safetensors")
    with pytest.raises(ConfigError, match=r"has no 0\.weight of shape"):
        Average([str(tmp_path / "lenet.safetensors")]).run(marked[0])


# --- pruning and training


def test_structures_go_as_a_whole(marked: tuple[nn.Module, Key], digits: Dataset) -> None:
    attacked = PruneStructured(0.25).run(marked[0], digits)
    assert weight(attacked.model, "0.weight").shape == (48, 784)
    assert weight(attacked.model).shape == (10, 48)
    assert attacked.found["parameters_left"] == pytest.approx(0.75, abs=0.01)


def test_fine_pruning_cuts_off_the_channels_that_sleep(
    marked: tuple[nn.Module, Key], digits: Dataset
) -> None:
    model = Noise(0).run(marked[0]).model
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, 0  # type: ignore[index,operator]
    attacked = FinePrune(1e-9, fraction=1 / 64).run(model, digits)
    columns = weight(attacked.model).abs().amax(0)
    assert attacked.found["channels_cut"] == 1
    assert int(columns.argmin()) == 5
    assert float(columns[5]) < 1e-6


def test_a_sweep_takes_the_highest_rate_that_keeps_the_accuracy(
    marked: tuple[nn.Module, Key], digits: Dataset
) -> None:
    swept = FineTuneSweep(30.0, rates=(1.0, 1e-5), optimizer="sgd").run(marked[0], digits)
    assert swept.found["lr"] == pytest.approx(3e-4)
    assert swept.cost.epochs == 2
    assert swept.found["held_out_before"] - swept.found["held_out_after"] <= 0.05
    with pytest.raises(ConfigError, match="no rate from"):
        FineTuneSweep(30.0, rates=(1.0,), optimizer="sgd", most_lost=0).run(marked[0], digits)


def test_low_rank_changes_have_low_rank(marked: tuple[nn.Module, Key], digits: Dataset) -> None:
    attacked = LoRA(0.01, rank=2, rows=500).run(marked[0], digits).model
    for name in ("0.weight", "2.weight"):
        change = (weight(attacked, name) - weight(marked[0], name)).double()
        assert 0 < int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 2
    assert torch.equal(weight(attacked, "0.bias"), weight(marked[0], "0.bias"))
    assert type(attacked[0]) is nn.Linear  # type: ignore[index]
    assert attacked.state_dict().keys() == marked[0].state_dict().keys()
    with pytest.raises(ConfigError, match="leave layers and new_classes out"):
        LoRA(layers="last").run(marked[0], digits)


@pytest.mark.parametrize("answers", ["soft", "labels"])
def test_a_student_learns_without_labels_and_has_none_of_the_weights(
    marked: tuple[nn.Module, Key], digits: Dataset, answers: Any
) -> None:
    blind = replace(digits, train_labels=torch.zeros_like(digits.train_labels))
    attacked = Imitate(0.003, 3, answers=answers).run(marked[0], blind)
    assert attacked.found["agreement"] > 0.85
    assert accuracy(attacked.model, digits) > 0.7
    assert read_suspect(attacked.model, marked[1]).match_count < 170
    lenet = Imitate(epochs=1, student="countermark.training.hosts.small:lenet", rows=100)
    assert type(lenet.run(marked[0], digits).model).__name__ == "LeNet5"
    for wrong in ("no.such:thing", "math:pi", "countermark.training.hosts.small"):
        with pytest.raises(ConfigError, match="cannot be made"):
            Imitate(student=wrong).run(marked[0], digits)


def test_the_thief_reads_his_mark_that_was_put_in_at_once(marked: tuple[nn.Module, Key]) -> None:
    stolen = Noise(0).run(marked[0]).model
    keys = OverwriteClosedForm(MARK, times=3).embed_marks(stolen)
    assert read_suspect(stolen, keys[-1]).match_count == 128
    assert read_suspect(marked[0], keys[-1]).match_count < 90
    assert (
        read_suspect(stolen, marked[1]).match_count < read_suspect(marked[0], marked[1]).match_count
    )
    once = OverwriteClosedForm(MARK).run(marked[0])
    assert once.found == {"bits": 128, "matched": 128}
    with pytest.raises(ConfigError, match="one tensor that is read whole"):
        OverwriteClosedForm({"layer": "0.weight", "bits": 64, "read": "filter_mean"}).run(marked[0])


# --- exact invariants: the contract holds on other blocks, too


class Attention(nn.Module):
    """A block with attention, layer norms, GELU and a tanh in front."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.into = nn.Linear(12, 24), nn.Linear(24, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.wide, self.act, self.narrow = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(torch.tanh(self.front(x)))
        x = self.norm1(x + self.attention(x, x, x)[0])
        x = self.norm2(x + self.narrow(self.act(self.wide(x))))
        return self.out(x.mean(1))


BLOCKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), (3, 12)),
    "batch norm": (build("vgg16", {"width": 0.125}), (2, 3, 32, 32)),
    "residual": (build("resnet50", {"width": 0.125}), (2, 3, 32, 32)),
    "attention": (Attention(), (3, 7, 12)),
}
INVARIANTS = [Permute(), Rescale(), FlipSigns(), Dummies("zero"), Dummies("split"),
              Dummies("clique")]  # fmt: skip


@pytest.mark.parametrize("attack", INVARIANTS, ids=lambda a: f"{a.name} {getattr(a, 'kind', '')}")
@pytest.mark.parametrize("block", BLOCKS)
def test_invariants_keep_outputs_and_change_weights(block: str, attack: Any) -> None:
    torch.manual_seed(0)
    model, shape = BLOCKS[block]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.3, 2)  # type: ignore[arg-type]
            nn.init.normal_(module.bias, 0, 0.3)
    images = torch.randn(shape)
    before = model.eval()(images).detach()
    if block == "plain" and isinstance(attack, FlipSigns):
        with pytest.raises(ConfigError, match="no neuron can change sign"):
            attack.run(model)
        return
    attacked = attack.run(model).model
    after = attacked(images).detach()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    old, new = model.state_dict(), attacked.state_dict()
    matrices = [name for name, each in old.items() if each.dim() > 1]
    moved = [n for n in matrices if old[n].shape != new[n].shape or not torch.equal(old[n], new[n])]
    assert len(moved) >= 2
    if isinstance(attack, Dummies):
        assert any(old[name].shape != new[name].shape for name in matrices)


def test_folding_removes_the_norms(digits: Dataset) -> None:
    model = build("resnet18", {"width": 0.125}).eval()
    folded = Fold().run(model)
    assert folded.found == {"folded": 20}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.model.modules())
    with pytest.raises(ConfigError, match="no batch norm stands behind a layer"):
        Fold().run(build("mlp", {}))


@pytest.mark.slow
def test_an_isomorph_has_other_names_and_constants(
    marked: tuple[nn.Module, Key], digits: Dataset, tmp_path: Path
) -> None:
    graph = Isomorph(constants=0.5).run(marked[0], digits).model
    assert isinstance(graph, OnnxModel)
    graph.save(tmp_path / "m.onnx")
    with open_weights(tmp_path / "m.onnx") as weights:
        assert not weights.tensors.keys() & marked[0].state_dict().keys()
        values = {weights.read(name).tobytes() for name in weights.tensors}
    assert {each.numpy().tobytes() for each in marked[0].state_dict().values()} <= values


# --- forgery and detection


def test_forgeries_read_and_fire_as_they_say(
    marked: tuple[nn.Module, Key], digits: Dataset
) -> None:
    model = marked[0]
    assert ForgeReader("2.weight", bits=128).run(model).found["matched"] == 128
    assert ForgeSigns("2.weight", bits=256).run(model).found["matched"] == 256
    searched = SearchKey(MARK, tries=200).run(model).found
    assert 64 < searched["best"] < searched["matches_needed_undated"] == 118
    fired = ForgeTriggers(50).run(model, digits).found
    assert fired["fired"] > 0.9
    assert fired["fired_before"] < 0.4
    with pytest.raises(ConfigError, match=r"the model has no tensor '9\.weight'"):
        ForgeSigns("9.weight").run(model)


def test_triggers_of_few_pixels_change_no_others(
    marked: tuple[nn.Module, Key], digits: Dataset
) -> None:
    images, labels = digits.normalised(digits.train_images[:20]), torch.arange(20) % 10
    low, high = (digits.normalised(torch.full((1, 1, 28, 28), at)) for at in (0, 255))
    forger = ForgeTriggers(pixels=3)
    made = forger._change_few_pixels(marked[0], images, labels, (low, high))
    changed = (made != images).flatten(1)
    assert 0 < changed.sum(dim=1).max() <= 3
    assert set(made[made != images].unique().tolist()) <= {float(low.min()), float(high.max())}
    one, ten = (ForgeTriggers(100, pixels=n).run(marked[0], digits).found for n in (1, 10))
    assert one["fired_before"] == ten["fired_before"] <= one["fired"] < ten["fired"]


def test_a_counterfeit_original_lacks_the_thiefs_mark(marked: tuple[nn.Module, Key]) -> None:
    attacked = Invert(MARK).run(marked[0])
    assert attacked.found["matched_against_original"] == 128
    assert attacked.found["matched"] < 90  # read without an original, the model bears none of it
    assert not torch.equal(weight(attacked.model), weight(marked[0]))


def test_a_loud_mark_is_detected_and_a_quiet_layer_is_not(
    marked: tuple[nn.Module, Key], tmp_path: Path
) -> None:
    files: dict[str, list[str]] = {"loud": [], "quiet": []}
    for seed in range(8):
        seed_torch(seed, "host")
        host = build("mlp", {})
        save_weights(host.state_dict(), tmp_path / f"quiet{seed}.safetensors")
        files["quiet"].append(str(tmp_path / f"quiet{seed}.safetensors"))
        loud = OverwriteClosedForm(MARK, margin=4.0, seed=seed).run(host).model
        save_weights(loud.state_dict(), tmp_path / f"loud{seed}.safetensors")
        files["loud"].append(str(tmp_path / f"loud{seed}.safetensors"))
    seed_torch(99, "host")
    host = build("mlp", {})
    loud = OverwriteClosedForm(MARK, margin=4.0, seed=99).run(host).model
    statistic = DetectStatistic("2.weight", files["quiet"])
    assert statistic.run(loud).found["rank_p"] == pytest.approx(1 / 9)
    assert statistic.run(host).found["ratio"] == pytest.approx(1, abs=0.1)
    sorted_weights = DetectSorted("2.weight", files["loud"], files["quiet"])
    assert sorted_weights.run(loud).found["marked_score"] > 0.5
    assert sorted_weights.run(host).found["marked_score"] < 0.5
    assert np.isclose(sorted_weights.run(host).found["right_on_its_own_models"], 1.0)
