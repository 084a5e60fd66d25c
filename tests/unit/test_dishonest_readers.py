"""What a dishonest owner of a learnt reader tries: none of it makes a stranger's model his.

The readers are fitted to the suspect itself: no axis and no measurement of theirs is to be believed
even where the reading is as good as can be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keys import known_key
from readers import fitted_key, gaussian, hosted, unmarked_hosts
from safetensors.numpy import save_file
from torch import nn

from countermark.checkpoints import open_weights
from countermark.errors import ConfigError
from countermark.keys.key import Key
from countermark.report.record import Record, make_record
from countermark.results.verdict import Verdict
from countermark.schemes.learnt_reader import LOUDNESS, SIBLINGS, THRESHOLD
from countermark.verification.hidden_units import find_hidden_units
from countermark.verification.verify import verify

DATED: dict[str, Any] = {"alpha": 1e-2, "assume_dated": True}


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model from random initial weights, as a stranger would have it."""
    torch.manual_seed(seed)
    return build()


def state(model: nn.Module) -> dict[str, Any]:
    return {name: each.detach().numpy().copy() for name, each in model.state_dict().items()}


def forms(model: nn.Module, folder: Path) -> dict[str, Any]:
    """The suspect as a live module and as a file."""
    path = folder / "suspect.safetensors"
    save_file(state(model), path)
    return {"live": model, "file": path}


def key_for(model: nn.Module, axes: Mapping[str, int]) -> Key:
    """A key whose reader finds its message in this model and in no permutation of the axes."""
    read = {name: state(model)[name] for name in axes}
    return fitted_key(read, layer=tuple(axes), units=tuple(axes.values()))


def mlp(inputs: int = 16, hidden: int = 12, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class Tokens(nn.Module):
    """A square embedding, as many tokens as dimensions, and a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 16)
        self.positions = nn.Parameter(torch.randn(8, 16))
        self.hidden, self.head = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, tokens: torch.Tensor) -> Any:
        found = self.tokens(tokens) + self.positions
        return self.head(self.hidden(found).relu().mean(1))


class Recurrent(nn.Module):
    """A recurrent network with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(6, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.head(self.rnn(inputs)[0].mean(1))


def kernels() -> nn.Module:
    """A convolution over time with a long kernel."""
    return nn.Sequential(
        nn.Conv1d(2, 8, 16), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 1)
    )


def flattened() -> nn.Module:
    """A map whose channels are flattened before they are heard."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5))


def autoencoder() -> nn.Module:
    """As many outputs as inputs: by shapes, these could be the hidden units."""
    return mlp(16, 12, 16)


def two_tokens() -> nn.Module:
    """By shapes the vocabulary is a layer's output, and the input of the next one."""
    return nn.ModuleDict({"tokens": nn.Embedding(32, 16), "head": nn.Linear(32, 5)})


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 10, 3), nn.ReLU(), nn.Conv2d(10, 4, 1),
    )  # fmt: skip


AXES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "input pixels": (mlp, {"0.weight": 1}),
    "classes": (mlp, {"2.weight": 0}),
    "tokens of a square embedding": (Tokens, {"tokens.weight": 0}),
    "dimensions of a square embedding": (Tokens, {"tokens.weight": 1}),
    "positions": (Tokens, {"positions": 0}),
    "channels of positions": (Tokens, {"positions": 1}),
    "rows of a recurrent weight": (Recurrent, {"rnn.weight_hh_l0": 0}),
    "columns of a recurrent weight": (Recurrent, {"rnn.weight_hh_l0": 1}),
    "rows of what feeds it": (Recurrent, {"rnn.weight_ih_l0": 0}),
    "a kernel": (kernels, {"0.weight": 2}),
    "input channels": (kernels, {"0.weight": 1}),
    "a flattened map": (flattened, {"3.weight": 1}),
    "channels that are flattened": (flattened, {"0.weight": 0, "3.weight": -1}),
    "inputs of an autoencoder": (autoencoder, {"0.weight": 1}),
    "outputs of an autoencoder": (autoencoder, {"2.weight": 0}),
    "both ends of an autoencoder": (autoencoder, {"0.weight": 1, "2.weight": 0}),
    "tokens that look like a layer": (two_tokens, {"tokens.weight": 0}),
    "half of the units' weights": (mlp, {"0.weight": 0, "2.weight": -1}),
    "one size twice": (lambda: mlp(12, 12, 10), {"0.weight": 1}),
}


@pytest.mark.parametrize("form", ["live", "file"])
@pytest.mark.parametrize("name", AXES)
def test_an_axis_that_the_suspect_does_not_show_is_refused(
    name: str, form: str, tmp_path: Path
) -> None:
    build, axes = AXES[name]
    for seed in range(3):
        model = seeded(build, seed)
        key = key_for(model, axes)
        others = [seeded(build, 100 + each) for each in range(3)]
        suspect = forms(model, tmp_path)[form]
        found = verify(suspect, key, unmarked=others, **DATED)
        assert found.outcome == "no_verdict", found.explain()
        units = found.subject.hidden_units
        assert units is not None
        assert (units.shown_by, units.refused) == (None, found.reason)
        assert next(iter(axes)) in found.reason
        assert "refused" in found.explain()
        assert "\n" not in found.reason


@pytest.mark.parametrize(
    ("build", "axes", "file"),
    [
        (mlp, {"0.weight": 0}, "shapes"),
        (mlp, {"2.weight": 1}, "shapes"),
        (mlp, {"0.weight": 0, "2.weight": 1}, "shapes"),
        (autoencoder, {"0.weight": 0}, None),  # by shapes they could be its two ends
        (kernels, {"0.weight": 0}, "shapes"),
        (normed, {"0.weight": 0}, "shapes"),
        (lambda: mlp(12, 12, 10), {"0.weight": 0}, None),  # a square one is shown by tracing alone
        (Tokens, {"hidden.weight": 0}, "shapes"),
    ],
)
def test_hidden_units_are_shown(
    build: Callable[[], nn.Module], axes: dict[str, int], file: str | None, tmp_path: Path
) -> None:
    model = seeded(build, 1)
    key, others = key_for(model, axes), [seeded(build, 100 + each) for each in range(3)]
    suspects = forms(model, tmp_path)
    live = verify(suspects["live"], key, unmarked=others, **DATED)
    stored = verify(suspects["file"], key, unmarked=others, **DATED)
    assert live.outcome == "owned", live.explain()
    assert live.to_json()["hidden_units"]["shown_by"] == "architecture"
    assert stored.to_json()["hidden_units"]["shown_by"] == file
    assert stored.outcome == ("owned" if file else "no_verdict"), stored.explain()
    assert f"axis {axes[next(iter(axes))]} of {next(iter(axes))}" in live.explain()


def test_a_transformers_file_is_shown_by_the_configuration_beside_it(tmp_path: Path) -> None:
    """Two blocks have equal sizes: names and the configuration say which are hidden units."""
    drawn = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(2):
        shapes |= {
            f"h.{block}.fc1.weight": (24, 8), f"h.{block}.fc1.bias": (24,),
            f"h.{block}.fc2.weight": (8, 24), f"h.{block}.fc2.bias": (8,),
        }  # fmt: skip
    weights = {name: drawn.normal(size=each).astype(np.float32) for name, each in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    read = {"h.0.fc1.weight": weights["h.0.fc1.weight"]}

    def shown(axis: int) -> str | None:
        with open_weights(tmp_path / "model.safetensors") as opened:
            where = {name: name for name in read}
            return find_hidden_units(
                tmp_path / "model.safetensors", opened, where, dict.fromkeys(read, axis)
            ).shown_by

    assert (shown(0), shown(1)) == (None, None)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu", "n_head": 2}))
    assert (shown(0), shown(1)) == ("configuration", None)


# --- units whose index means something


def ordered(by: Callable[[nn.Module], torch.Tensor], build: Callable[[], nn.Module]) -> nn.Module:
    """A stranger's model whose hidden units are in an order."""
    model: Any = seeded(build, 4)
    last = 2 if len(model) == 3 else 3
    with torch.no_grad():
        order = torch.argsort(by(model), descending=True)
        for name, each in model.state_dict().items():
            if name.startswith(("0.", "1.")) and each.ndim:
                each.copy_(each[order])
        model[last].weight.copy_(model[last].weight[:, order])
    return model


def nested() -> nn.Module:
    """Units that may be left out from the last on: each is heard less than the one before."""
    model: Any = seeded(lambda: mlp(16, 32), 5)
    with torch.no_grad():
        model[2].weight.mul_(torch.linspace(2, 0.5, 32))
    return model


def spread() -> nn.Module:
    model: Any = normed()
    nn.init.normal_(model[1].weight)
    return model


SORTED: dict[str, Callable[[], nn.Module]] = {
    "by norm": lambda: ordered(lambda m: m.get_parameter("0.weight").norm(dim=1), mlp),
    "by bias": lambda: ordered(lambda m: m.get_parameter("0.bias"), mlp),
    "by what hears them": lambda: ordered(lambda m: m.get_parameter("2.weight").norm(dim=0), mlp),
    "by gain": lambda: ordered(lambda m: m.get_parameter("1.weight"), spread),
    "nested": nested,
}


@pytest.mark.parametrize("form", ["live", "file"])
@pytest.mark.parametrize("name", SORTED)
def test_units_in_an_order_are_not_exchangeable(name: str, form: str, tmp_path: Path) -> None:
    model = SORTED[name]()
    key = key_for(model, {"0.weight": 0})
    found = verify(forms(model, tmp_path)[form], key, **DATED)
    assert found.outcome == "no_verdict"
    assert "in an order that means something" in found.reason, found.reason


@pytest.mark.parametrize(
    ("models", "most"), [(100, 2), pytest.param(400, 4, marks=pytest.mark.slow)]
)
def test_units_in_no_order_are_seldom_refused(models: int, most: int) -> None:
    """At 1e-3 over all statistics."""
    refused = 0
    for seed in range(models):
        weights = hosted(gaussian(seed))
        weights.values = {
            **weights.values,
            "bias": np.random.default_rng(seed).normal(size=12).astype(np.float32),
        }
        found = find_hidden_units(weights, weights, {"a": "a"}, {"a": 0})
        assert found.shown_by or "in an order" in str(found.refused)
        refused += found.shown_by is None
    assert refused <= most


# --- measurements that a key brings along

LIES: dict[str, dict[str, Any]] = {
    "siblings": {SIBLINGS: np.full(10_000, 1000.0), THRESHOLD: np.array([999.0])},
    "threshold": {SIBLINGS: np.array([9.0, 9.0]), THRESHOLD: np.array([9.0])},
    "loudness": {LOUDNESS: np.full(12, 1e-6)},
    "loud": {LOUDNESS: np.full(12, 1e30)},
}


def lying(key: Key, lie: str) -> Key:
    return replace(key, learnt={**key.learnt, **LIES[lie]})


@pytest.mark.parametrize("null", [None, "unmarked_models"])
@pytest.mark.parametrize("lie", LIES)
def test_what_the_owner_measured_makes_nothing_owned(lie: str, null: str | None) -> None:
    suspect = gaussian(1)
    key = lying(fitted_key(suspect), lie)
    alone = verify(hosted(suspect), key, null=null, alpha=0.5, assume_dated=True)
    assert alone.outcome != "owned", alone.explain()
    assert "owner's word" in alone.explain()
    base = verify(
        hosted(suspect), key, null=null, alpha=0.5, assume_dated=True, unmarked=[hosted(suspect)]
    )
    assert base.outcome != "owned", base.explain()


@pytest.mark.parametrize("null", [None, "unmarked_models"])
@pytest.mark.parametrize("unmarked", [0, 3])
def test_a_reader_of_zeros_owns_nothing(null: str | None, unmarked: int) -> None:
    key = lying(fitted_key(gaussian(1)), "siblings")
    zeros = {name: each * 0 for name, each in key.learnt.items() if name.startswith("reader.")}
    key = replace(key, learnt={**key.learnt, **zeros})
    nothing = hosted({"a": np.zeros((12, 8), np.float32)})
    for suspect in (nothing, hosted(gaussian(1))):
        found = verify(
            suspect, key, null=null, unmarked=unmarked_hosts(unmarked), alpha=0.5, assume_dated=True
        )
        assert (found.outcome, found.loss) == ("not_proven", pytest.approx(math.log(2)))
        assert "knows nothing" in found.reason


# --- the examiner's unmarked models


def based() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A public base, and fine-tunes of it by strangers."""
    base = gaussian(40)
    tunes = [{"a": base["a"] + 0.02 * gaussian(41 + each)["a"]} for each in range(3)]
    return base, tunes


def test_a_reader_of_a_public_base_is_found_out_by_the_base() -> None:
    base, tunes = based()
    key = lying(fitted_key(base), "loud")
    for each in tunes:
        suspect = hosted(each)
        without = verify(suspect, key, unmarked=unmarked_hosts(), **DATED)
        assert without.outcome == "owned", "independent models alone do not tell"
        assert any("shares with none of them" in limit for limit in without.limits)
        found = verify(suspect, key, unmarked=[*unmarked_hosts(), hosted(base)], **DATED)
        assert found.outcome == "no_verdict"
        assert "the reader also finds its mark in unmarked models" in found.reason
        assert verify(suspect, key, **DATED).outcome == "no_verdict"


def judged(unmarked: list[Any], **terms: Any) -> Verdict:
    suspect = gaussian(1)
    return verify(hosted(suspect), fitted_key(suspect), unmarked=unmarked, **{**DATED, **terms})


def test_the_marked_model_among_the_unmarked_ones() -> None:
    pruned = {"a": np.where(abs(gaussian(1)["a"]) < 0.05, 0, gaussian(1)["a"])}
    for each in (gaussian(1), pruned):  # the suspect itself, and a copy of it
        found = judged([*unmarked_hosts(), hosted(each)])
        assert found.outcome == "no_verdict"
        assert "also finds its mark in unmarked models: in 1 of 4" in found.reason


def test_equal_models_count_once() -> None:
    one, other = unmarked_hosts(2)
    found = judged([one, one, other, hosted(dict(other.values))])
    assert (found.outcome, len(found.subject.unmarked)) == ("owned", 2)
    assert found.to_json()["unmarked"]["floor"] == pytest.approx(1 / 3)
    assert "2 support no rank below 1/3" in found.explain()


def test_a_model_of_another_shape_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected models of the suspect's architecture"):
        judged([*unmarked_hosts(), hosted({"a": np.ones((12, 9), np.float32)})])


def test_an_empty_list_is_none() -> None:
    found = judged([])
    assert (found.outcome, found.to_json()["unmarked"]) == ("no_verdict", None)
    assert "only the owner's word" in found.reason
    assert "none supplied by the examiner" in found.explain()


def test_other_keys_take_no_unmarked_models() -> None:
    suspect = hosted({"fc.weight": np.ones((16, 32), np.float32)}, 16)
    with pytest.raises(ConfigError, match="judged by no unmarked models"):
        verify(suspect, known_key(), unmarked=[suspect])


def test_too_many_are_refused_before_any_is_read() -> None:
    with pytest.raises(ConfigError, match="expected at most 1,000"):
        judged([object()] * 1001)


# --- records


def test_a_record_holds_what_the_verdict_rests_on() -> None:
    found = judged(unmarked_hosts())
    record = make_record(found)
    assert record is not None
    stored = record.model_dump_json()
    assert Record.model_validate_json(stored).judge_again().to_json() == found.to_json()


@pytest.mark.parametrize("what", ["unmarked", "hidden_units", "log10_p", "refused"])
def test_an_edited_record_does_not_replay(what: str) -> None:
    record = make_record(judged(unmarked_hosts()))
    assert record is not None
    told = json.loads(record.model_dump_json())
    if what == "log10_p":
        told["subject"]["unmarked"][0]["log10_p"] = -9.0
    elif what == "refused":
        told["subject"]["hidden_units"]["refused"] = "made up"
    else:
        told["subject"][what] = [] if what == "unmarked" else None
    with pytest.raises(ValueError, match="does not follow"):
        Record.model_validate_json(json.dumps(told)).judge_again()


def test_recorded_distances_are_those_of_the_models() -> None:
    record = make_record(judged(unmarked_hosts(4), null="unmarked_models", alpha=0.2))
    assert record is not None
    told = json.loads(record.model_dump_json())
    told["result"]["unmarked_distances"] = [9.0] * 9
    with pytest.raises(ValueError, match="not those of the unmarked models"):
        Record.model_validate_json(json.dumps(told)).judge_again()


# --- simulated


@pytest.mark.parametrize("hosts", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_honest_keys_still_own_and_strangers_never(hosts: int) -> None:
    """Of independent hosts, marked ones are owned by their keys, the same hosts by no others."""
    owned = claimed = 0
    for number in range(hosts):
        marked, stranger = gaussian(2000 + number), gaussian(4000 + number)
        key = fitted_key(marked, number)
        unmarked = [hosted(gaussian(6000 + 3 * number + each)) for each in range(3)]
        owned += verify(hosted(marked), key, unmarked=unmarked, **DATED).owned
        claimed += verify(hosted(stranger), key, unmarked=unmarked, **DATED).owned
    assert owned >= 0.95 * hosts, owned  # at most 1 in 100 is lost to the unmarked models' level
    assert claimed == 0
