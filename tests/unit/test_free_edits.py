"""Free edits: the weights that a mark is read from change, the model's outputs do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from countermark.attacks.base import Attack, NamedTensors
from countermark.attacks.dead_units import DeadUnits
from countermark.attacks.fine_tune import FineTune
from countermark.attacks.move_blocks import MoveBlocks
from countermark.attacks.output_layer import ReorderClasses, ShiftLogits
from countermark.attacks.rotate import Rotate, TurnValues, draw_orthogonal_matrix
from countermark.errors import ConfigError
from countermark.training.data import load_data
from countermark.training.models import build
from tiny_transformers import TINY, WORDS, WORDS_GIVEN, tiny, tiny_lm

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@dataclass(frozen=True)
class Rows:
    """Anything as training data: pictures, or words."""

    train_images: Tensor
    train_labels: Tensor
    classes: int = 2

    def normalised(self, images: Tensor, /) -> Tensor:
        return images


class Relu(nn.Sequential):
    """A network with ReLU: 12 inputs, 40 hidden units, 5 classes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5))


def network(*, dead: int = 0, unheard: int = 0) -> nn.Module:
    """With so many units that never fire, first, and that nothing leaves, last."""
    torch.manual_seed(3)
    model = Relu()
    with torch.no_grad():
        model[0].bias[:dead] = -1e3  # type: ignore[index, operator]
        if unheard:
            model[2].weight[:, -unheard:] = 0  # type: ignore[index, operator]
    return model.eval()


def answers(model: nn.Module, given: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(given)
    scores: Tensor = getattr(found, "logits", found)
    return scores


INPUTS = torch.randn(200, 12, generator=torch.Generator().manual_seed(5))
LOOKED_AT = Rows(INPUTS, torch.zeros(200, dtype=torch.int64))


def moved(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """How far each tensor moved, in standard deviations of its weights."""
    one, other = before.state_dict(), after.state_dict()
    return {
        name: float((other[name] - each).abs().max() / each.std())
        for name, each in one.items() if each.dim() > 1 and other[name].shape == each.shape
    }  # fmt: skip


@pytest.mark.parametrize("distribution", ["normal", "cauchy"])
def test_units_that_never_fire_are_found_on_data_and_send_noise(distribution: Any) -> None:
    model = network(dead=4)
    attack = DeadUnits("found", distribution=distribution)
    done = attack.run(model, LOOKED_AT)
    assert done.found == {"dead": 4}
    assert done.cost.data_share == 1
    assert torch.equal(answers(done.model, INPUTS), answers(model, INPUTS))
    changed = (done.model[2].weight != model[2].weight).any(dim=0)  # type: ignore[index, operator]
    assert changed.nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert moved(model, done.model)["2.weight"] > 100
    with pytest.raises(ConfigError, match="finds units that never fire on data"):
        attack.run(model)
    with pytest.raises(ConfigError, match="no unit of this model is dead"):
        attack.run(network(), LOOKED_AT)


def test_units_that_nothing_leaves_hear_noise_without_any_data() -> None:
    model = network(unheard=3)
    done = DeadUnits("found", side="incoming").run(model)
    assert done.found == {"dead": 3}
    torch.testing.assert_close(answers(done.model, INPUTS), answers(model, INPUTS), **CLOSE)
    changed = (done.model[0].weight != model[0].weight).any(dim=1)  # type: ignore[index, operator]
    assert changed.nonzero()[:, 0].tolist() == [37, 38, 39]


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_transformers_units_and_value_dimensions_are_made_dead(name: str) -> None:
    """What is lost is what these units did, and no more: noise of any size is as good as none."""
    model = tiny_lm(name)
    quiet, loud = (DeadUnits("made", 0.05, scale=scale).run(model) for scale in (1e-3, 100.0))
    assert quiet.found == loud.found
    torch.testing.assert_close(
        answers(loud.model, WORDS_GIVEN), answers(quiet.model, WORDS_GIVEN), **CLOSE
    )
    far = moved(model, loud.model)
    last = {"gpt": ("mlp.c_proj", "attn.c_proj"), "llama": ("mlp.down_proj", "self_attn.o_proj")}
    assert all(far[each] > 100 for each in far if any(part in each for part in last[name]))
    found = DeadUnits("found").run(loud.model, Rows(WORDS_GIVEN, torch.zeros(3)))
    assert found.found["dead"] >= loud.found["dead"]
    torch.testing.assert_close(
        answers(found.model, WORDS_GIVEN), answers(loud.model, WORDS_GIVEN), **CLOSE
    )
    unheard = DeadUnits("made", 0.05, side="incoming").run(model)
    again = DeadUnits("found", side="incoming", seed=1).run(unheard.model)
    assert again.found == unheard.found
    torch.testing.assert_close(
        answers(again.model, WORDS_GIVEN), answers(unheard.model, WORDS_GIVEN), **CLOSE
    )


def test_channels_before_batch_norms_are_made_dead() -> None:
    torch.manual_seed(0)
    model = build("resnet18", {"width": 0.125, "channels": 1}).eval()
    images = torch.rand(8, 1, 8, 8)
    quiet, loud = (DeadUnits("made", 0.2, scale=scale).run(model) for scale in (1e-3, 100.0))
    before, after = answers(quiet.model, images), answers(loud.model, images)
    torch.testing.assert_close(after, before, **CLOSE)
    assert moved(model, loud.model)["layer1.0.conv2.weight"] > 100


def test_where_no_bias_silences_a_unit_its_weights_are_zero() -> None:
    torch.manual_seed(2)
    for between in (nn.LeakyReLU(), nn.Tanh()):
        model = nn.Sequential(nn.Linear(12, 40), between, nn.Linear(40, 5)).eval()
        done = DeadUnits("made", 0.1, scale=1e3).run(model)
        rows = done.model[0].weight.abs().sum(1) + done.model[0].bias.abs()  # type: ignore[index, operator, union-attr]
        assert int((rows == 0).sum()) == 4
        assert float((answers(done.model, INPUTS) - answers(model, INPUTS)).abs().max()) < 10


def test_a_vector_in_all_rows_of_the_last_layer_changes_no_probability() -> None:
    for model, given, layer in (
        (network(), INPUTS, "2.weight"),
        (tiny_lm("gpt"), WORDS_GIVEN, "lm_head.weight"),
        (tiny_lm("gpt", tied=True), WORDS_GIVEN, "lm_head.weight"),
    ):
        done = ShiftLogits().run(model)
        assert done.found["layer"] == layer
        assert moved(model, done.model)[layer] > 5
        before, after = answers(model, given), answers(done.model, given)
        assert float((after - before).abs().max()) > 1
        torch.testing.assert_close(after.softmax(-1), before.softmax(-1), **CLOSE)
    assert done.found["untied"]
    assert not torch.equal(done.model.lm_head.weight, done.model.model.wte.weight)  # type: ignore[union-attr, arg-type]
    named = ShiftLogits(layer="2.weight").run(NamedTensors(network().state_dict()))
    assert moved(network(), named.model)["2.weight"] > 5
    for lost in (NamedTensors(network().state_dict()), tiny("llama")):
        with pytest.raises(ConfigError, match="name its weight in layer"):
            ShiftLogits().run(lost)
    with pytest.raises(ConfigError, match=r"no weight '3\.weight'"):
        ShiftLogits(layer="3.weight").run(network())


def test_classes_in_another_order_are_the_same_outputs_under_other_names() -> None:
    model = network()
    done = ReorderClasses(seed=1).run(model)
    order = done.found["order"]
    assert order != list(range(5))
    assert torch.equal(answers(done.model, INPUTS), answers(model, INPUTS)[:, order])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_rotated_stream_says_the_same(name: str, tied: bool) -> None:
    model = tiny_lm(name, tied=tied)
    done = Rotate(seed=3).run(model)
    torch.testing.assert_close(
        answers(done.model, WORDS_GIVEN), answers(model, WORDS_GIVEN), **CLOSE
    )
    assert done.found["untied"] == tied
    assert done.found["width"] == 32
    far = moved(model, done.model)
    assert len(far) == len([p for p in model.state_dict().values() if p.dim() > 1])
    assert min(far.values()) > 1  # embeddings, readers, writers and head


def test_what_cannot_be_rotated_is_refused() -> None:
    for model in (tiny("gpt"), tiny("bert")):
        with pytest.raises(ConfigError, match="expected a norm directly before every layer"):
            Rotate().run(model)
    with pytest.raises(ConfigError, match="no blocks of a transformer"):
        Rotate().run(network())
    gone = tiny_lm("llama")
    with torch.no_grad():
        gone.model.norm.weight[3] = 0  # type: ignore[union-attr, index, operator]
    with pytest.raises(ConfigError, match="a gain of zero"):
        Rotate().run(gone)


def test_a_matrix_is_orthogonal_and_keeps_a_direction() -> None:
    for fixed in (False, True):
        matrix = draw_orthogonal_matrix(9, 4, fixed=fixed)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(9, dtype=torch.float64))
        kept = torch.allclose(torch.ones(9, dtype=torch.float64) @ matrix, torch.ones(9).double())
        assert kept == fixed


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("name", list(TINY))
def test_turned_values_are_turned_back(name: str, orthogonal: bool) -> None:
    model = tiny(name)
    done = TurnValues(orthogonal).run(model)
    before, after = answers(model, WORDS_GIVEN), answers(done.model, WORDS_GIVEN)
    torch.testing.assert_close(after, before, **CLOSE)
    assert done.found == {"heads": {"llama": 4}.get(name, 8)}
    touched = {each for each, far in moved(model, done.model).items() if far > 0.5}
    assert len(touched) == 4  # values and outputs of two layers
    with pytest.raises(ConfigError, match="no blocks of a transformer"):
        TurnValues().run(network())


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_an_identity_block_moves_every_name(name: str) -> None:
    model = tiny_lm(name)
    blocks = {"gpt": "model.h", "llama": "model.layers"}[name]
    for at in (0, 1, 2):
        done = MoveBlocks("identity", at=at).run(model)
        assert done.found == {"blocks": blocks, "before": 2, "after": 3}
        assert torch.equal(answers(done.model, WORDS_GIVEN), answers(model, WORDS_GIVEN))
    first = MoveBlocks("identity").run(model).model.state_dict()
    for each, tensor in model.state_dict().items():
        place = each.removeprefix(f"{blocks}.")
        if place != each:
            number, _, rest = place.partition(".")
            assert torch.equal(first[f"{blocks}.{int(number) + 1}.{rest}"], tensor)


def test_blocks_are_repeated_and_dropped_in_modules_and_files() -> None:
    model = tiny_lm("gpt")
    for do, at, count, names in (
        ("duplicate", 0, 2, [0, 1, 0, 1]), ("duplicate", 1, 1, [0, 1, 1]), ("drop", 0, 1, [1]),
    ):  # fmt: skip
        attack = MoveBlocks(do, at=at, count=count)  # type: ignore[arg-type]
        live, file = attack.run(model).model, attack.run(NamedTensors(model.state_dict())).model
        one, other = live.state_dict(), file.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[each], other[each]) for each in one)
        for place, origin in enumerate(names):
            kept = model.state_dict()[f"model.h.{origin}.mlp.c_fc.weight"]
            assert torch.equal(one[f"model.h.{place}.mlp.c_fc.weight"], kept)
        assert f"model.h.{len(names)}.mlp.c_fc.weight" not in one
        assert not torch.allclose(answers(live, WORDS_GIVEN), answers(model, WORDS_GIVEN))
    for attack, says in (
        (MoveBlocks("drop", count=2), "has 2 blocks"),
        (MoveBlocks("identity", at=3), "has 2 blocks"),
        (MoveBlocks(blocks="model.x"), "expected a list of blocks"),
    ):
        with pytest.raises(ConfigError, match=says):
            attack.run(model)
    with pytest.raises(ConfigError, match="adds to its input is not known"):
        MoveBlocks().run(tiny("bert"))
    with pytest.raises(ConfigError, match="no list of blocks"):
        MoveBlocks().run(network())


FAMILY: list[Attack] = [
    Rotate(), TurnValues(), TurnValues(orthogonal=False), MoveBlocks("identity", at=1),
]  # fmt: skip


@pytest.mark.parametrize("attack", FAMILY, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_the_usual_library_say_the_same(kind: str, attack: Attack) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=WORDS, n_embd=32, n_layer=3, n_head=4, n_positions=32
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.eval()
    done = attack.run(model)
    torch.testing.assert_close(
        answers(done.model, WORDS_GIVEN), answers(model, WORDS_GIVEN), **CLOSE
    )
    if isinstance(attack, Rotate):
        assert done.found["untied"] == (kind == "gpt2")
    if isinstance(attack, MoveBlocks):
        assert done.model.config.num_hidden_layers == 4  # type: ignore[union-attr]
        # The cache that texts are written with numbers the layers, too.
        words = WORDS_GIVEN[:1, :3]
        kept = [
            each.generate(words, max_new_tokens=4, do_sample=False, pad_token_id=0)
            for each in (model, done.model)
        ]  # type: ignore[operator]
        assert torch.equal(*kept)


def test_strong_weight_decay_shrinks_what_the_task_does_not_hold() -> None:
    data = load_data("digits").subset(train=300, test=100)
    torch.manual_seed(0)
    model = build("mlp", {})
    plain = FineTune(1e-3).run(model, data).model
    decayed = FineTune(1e-3, weight_decay=50.0).run(model, data).model
    sizes = [float(each[0].weight.detach().norm()) for each in (plain, decayed)]  # type: ignore[index, union-attr, operator]
    assert sizes[0] / sizes[1] == pytest.approx((1 - 1e-3 * 50) ** -10, rel=0.2)  # of 10 steps
    for optimizer in ("adam", "sgd"):
        gone = FineTune(1e-3, weight_decay=1000.0, optimizer=optimizer).run(model, data).model  # type: ignore[arg-type]
        assert float(gone[0].weight.detach().abs().max()) < 0.02  # type: ignore[index, union-attr, operator]
