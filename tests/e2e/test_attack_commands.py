"""Every attack from the command line, on one marked MLP; and the way back by a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_calls import call, digest

from countermark.attacks import ATTACKS

MARK = {"layer": "2.weight", "bits": 128}
OTHERS = ["unmarked.safetensors", "unmarked.safetensors"]
FIELDS: dict[str, dict[str, Any]] = {
    "average": {"others": OTHERS},
    "fine_tune": {"lr": 0.001, "rows": 200},
    "fine_tune_sweep": {"lr": 0.001, "rows": 200},
    "fine_prune": {"rows": 200},
    "retrain": {"rows": 200, "epochs": 1},
    "lora": {"rows": 200},
    "imitate": {"rows": 200, "epochs": 1},
    "overwrite": {"mark": MARK, "rows": 200},
    "overwrite_closed_form": {"mark": MARK},
    "prune_unused": {"rows": 200},
    "forge_reader": {"layer": "2.weight", "bits": 64},
    "forge_signs": {"layer": "2.weight"},
    "search_key": {"mark": MARK, "tries": 5},
    "forge_triggers": {"triggers": 10},
    "invert": {"mark": MARK},
    "shift_logits": {"layer": "2.weight"},
    "reorder_classes": {"layer": "2.weight"},
    "detect_statistic": {"layer": "2.weight", "others": OTHERS},
    "detect_sorted": {"layer": "2.weight", "marked": OTHERS, "unmarked": OTHERS},
}
# An MLP of ReLU has neither signs to flip, nor norms to fold, nor blocks; an export takes long.
IMPOSSIBLE = {"flip_signs", "fold", "rotate", "turn_values", "move_blocks"}
LONG = {"isomorph"}


def options(name: str) -> list[str]:
    """What an attack has to be given, from what the list of attacks says of it."""
    about = call("attack", "list", "--json").json[name]
    found = ["--model", "mlp"] if about["needs_model"] or about["needs_data"] else []
    found += ["--data", "digits"] if about["needs_data"] else []
    for field, value in FIELDS.get(name, {}).items():
        found += ["--set", f"{field}={json.dumps(value)}"]
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in ATTACKS]
)
def test_every_attack_runs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(made)
    victim, out = made / "marked.safetensors", tmp_path / "out.safetensors"
    before = digest(victim)
    said = call("attack", "run", name, victim, "--out", out, *options(name), "--json")
    assert digest(victim) == before
    if name in IMPOSSIBLE:
        assert said.code == 2
        assert name in said.why
        return
    assert said.code == 0, said.err
    assert out.exists()
    assert said.json["attack"] == name
    assert said.json["fields"].keys() == ATTACKS[name].list_default_fields().keys()
    assert said.json.keys() >= {"cost", "found", "model"}
    assert ("accuracy_after" in said.json) == ATTACKS[name].needs_data
    needs_other = ATTACKS[name].needs_data or ATTACKS[name].needs_model
    again = call("attack", "run", name, victim, "--out", tmp_path / "b", *options(name)[:0])
    assert again.code == (2 if needs_other or FIELDS.get(name) else 0)


def test_a_disguise_is_undone_by_a_reference(made: Path, here: Path) -> None:
    marked, key = made / "marked.safetensors", made / "acme.key"
    for attack, given, out in (
        ("dummies", marked, "a.safetensors"),
        ("permute", Path("a.safetensors"), "b.safetensors"),
    ):
        model = ["--model", "mlp"] if given == marked else ["--model", "mlp", "--model-arg",
                                                            "hidden=80"]  # fmt: skip
        assert call("attack", "run", attack, given, "--out", out, *model).code == 0
    assert call("verify", "b.safetensors", "--key", key).code == 3
    found = call("verify", "b.safetensors", "--key", key, "--reference", marked, "--assume-dated",
                 "--json")  # fmt: skip
    assert found.code == 0
    assert found.json["suspect"]["reference"]["sha256"] == digest(marked)
    assert call("verify", "b.safetensors", "--key", key, "--reference", marked).code == 3
    judged = ["report", "b.safetensors", "--key", key, "--reference", marked]
    written = call(*judged, "--assume-dated", "--out", "r.html", "--bundle", "bundle")
    assert written.code == 0, written
    page = Path("r.html").read_text()
    assert "bears the mark itself" in page
    assert digest(marked) in page
    assert "may be lost before the mark is no longer found" in page  # judged by a count
    assert call("report", "--replay", "bundle").code == 3
    again = [*judged, "--replay", "bundle"]
    assert "it is the same" in call(*again).out
    wrong = call("verify", marked, "--key", key, "--reference", "b.safetensors")
    assert wrong.code == 2
    assert "does not fit the model" in wrong.why
    absent = call("verify", marked, "--key", key, "--reference", "absent.safetensors")
    assert absent.code == 2
    assert "cannot be read" in absent.why
