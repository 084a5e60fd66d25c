"""`check`: what survives on a marked model is what survives the same attacks on its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from checkpoints import one_file
from contracts.facts import fresh_host
from countermark.attacks.base import NamedTensors
from countermark.attacks.output_layer import ShiftLogits
from countermark.checkpoints import save_weights
from countermark.errors import ConfigError
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.training.robustness_check import (
    NO_LAST_LAYER,
    NOT_TRAINED,
    SHIFTED,
    TRIES,
    UNTOUCHED,
    check_robustness,
)
from countermark.verification.verify import read_suspect, verify

# How many bits an attack leaves depends on the secret, and no bound is known that says much.
SECRET = KeyMaterial(bytes(range(32)), bytes(16))


def marked(folder: Path, material: KeyMaterial = SECRET, **fields: object) -> tuple[Path, Key]:
    source = one_file(folder / "in.safetensors")
    places = StampPaths(folder / "out.safetensors", folder / "a.key")
    stamp(source, places, owner="ACME", fields=fields, material=material)
    return places.out, Key.load(places.key)


def test_it_finds_what_is_found_in_an_attacked_file(tmp_path: Path) -> None:
    out, key = marked(tmp_path, layer=["layers.0.up", "layers.1.down"])
    done = check_robustness(out, key)
    assert [each.what for each in done.tries] == [UNTOUCHED, *TRIES]
    assert NO_LAST_LAYER in done.not_tried
    for each in done.tries[1:]:
        attacked = TRIES[each.what].run(NamedTensors(load_file(out))).model
        evidence = read_suspect(attacked, key)
        if "shaken" in each.what or "noise" in each.what:  # by other numbers
            assert abs(evidence.match_count - (each.matched or 0)) <= 40
        else:
            assert (evidence.match_count, verify(attacked, key).outcome) == (
                each.matched,
                each.outcome,
            )
    assert NOT_TRAINED in done.not_tried
    assert done.exit_code == (0 if all(each.outcome == "owned" for each in done.tries) else 1)


def test_a_part_of_a_tensor_is_attacked_as_the_rows_around_it(tmp_path: Path) -> None:
    out, key = marked(tmp_path, values=3000)
    done = check_robustness(out, key)
    assert done.tries[0].matched == key.bits
    by_name = {each.what: each for each in done.tries}
    for what in ("rounded to 8 bits", "rounded to 4 bits"):  # one scale for each row: the same
        attacked = TRIES[what].run(NamedTensors(load_file(out))).model
        assert read_suspect(attacked, key).match_count == by_name[what].matched


def test_what_removes_a_mark_is_said(tmp_path: Path) -> None:
    out, key = marked(tmp_path, margin=0.5)
    done = check_robustness(out, key)
    by_name = {each.what: each.outcome for each in done.tries}
    assert by_name[UNTOUCHED] == by_name["rounded to 8 bits"] == "owned"
    assert by_name["weights shaken by all of their spread"] != "owned"
    assert done.exit_code == 1


def test_nothing_is_tried_where_nothing_is_proven(tmp_path: Path) -> None:
    out, key = marked(tmp_path)
    absent = check_robustness(tmp_path / "in.safetensors", key)
    assert (absent.exit_code, len(absent.tries)) == (1, 1)
    assert "not found" in absent.reason
    (tmp_path / "test").mkdir()
    out, key = marked(tmp_path / "test", KeyMaterial.from_test_seed(1))
    unproven = check_robustness(out, key)
    assert (unproven.exit_code, len(unproven.tries)) == (3, 1)
    assert "test key" in unproven.reason


def test_a_model_is_trained_on_where_there_are_data(tmp_path: Path) -> None:
    save_weights(fresh_host().state_dict(), tmp_path / "in.safetensors")
    places = StampPaths(tmp_path / "out.safetensors", tmp_path / "a.key")
    stamp(tmp_path / "in.safetensors", places, owner="ACME", material=SECRET)
    done = check_robustness(places.out, Key.load(places.key), model="mlp", data="digits")
    assert done.tries[-1].what == "trained on for one epoch"
    assert done.tries[-1].accuracy is not None
    assert done.tries[-1].accuracy > 0.8
    assert NOT_TRAINED not in done.not_tried


def test_a_shift_of_all_scores_is_tried_where_the_key_reads_the_last_layer(tmp_path: Path) -> None:
    fields = {"layer": ["0.weight", "2.weight"], "bits": 128}
    save_weights(fresh_host().state_dict(), tmp_path / "in.safetensors")
    places = StampPaths(tmp_path / "out.safetensors", tmp_path / "a.key")
    stamp(tmp_path / "in.safetensors", places, owner="ACME", fields=fields, material=SECRET)
    done = check_robustness(places.out, Key.load(places.key))
    assert NO_LAST_LAYER not in done.not_tried
    (tried,) = [each for each in done.tries if each.what == SHIFTED]
    attacked = ShiftLogits(layer="2.weight").run(NamedTensors(load_file(places.out))).model
    assert read_suspect(attacked, Key.load(places.key)).match_count == tried.matched


def test_a_learnt_reader_is_refused() -> None:
    scheme = IndependentNetwork("w", 128, units=(0,))
    material = KeyMaterial(bytes(32), bytes(16))
    key = scheme.generate_key({"w": (30, 20)}, owner="A", material=material)
    start = {"w": np.zeros((30, 20), np.float32)}
    key = replace(
        key, learnt=scheme.load_training_class()(scheme, key, [start]).export_post_commit_tensors()
    )
    with pytest.raises(ConfigError, match="expected a key of uchida or stamp"):
        check_robustness(Path("never read"), key)
