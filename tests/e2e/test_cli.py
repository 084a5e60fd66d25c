"""The command line as its user meets it: what each command answers, prints and writes."""

from __future__ import annotations

import base64
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import Said, call, call_lab, digest, embed, listing, refused
from safetensors.numpy import load_file

from countermark.attacks import ATTACKS
from countermark.schemes import SCHEMES
from countermark.schemes.uchida.scheme import Uchida
from countermark_lab.commands import train_null_zoo
from countermark_lab.hosts import model_zoo as zoo
from countermark_lab.hosts.model_zoo import HostSpec, host_path
from countermark_lab.speed import speed

FIELDS = {
    "outcome", "scheme", "bits", "matched", "ber", "ber_interval", "log10_p", "null", "floor",
    "tests", "alpha", "forgery_bits", "limits",
}  # fmt: skip
FACTORY = """
from torch import nn

def build(classes, hidden=48):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )
"""


def owned(suspect: str | Path, key: str | Path, *more: str) -> Said:
    """The verdict on a suspect, which must be that the mark is present."""
    said = call("verify", suspect, "--key", key, "--json", *more)
    assert said.code == 0, said
    assert said.json["outcome"] == "owned"
    return said


# --- verify


def test_the_marked_model_is_owned(made: Path) -> None:
    verdict = owned(made / "marked.safetensors", made / "acme.key").json
    assert verdict.keys() >= FIELDS
    assert (verdict["scheme"], verdict["bits"], verdict["tests"]) == ("uchida", 256, 1)
    assert verdict["matched"] > 240
    assert verdict["ber"] == pytest.approx(1 - verdict["matched"] / 256)
    assert verdict["ber_interval"][0] <= verdict["ber"] <= verdict["ber_interval"][1]
    assert verdict["floor"] <= verdict["log10_p"] < -50
    assert (verdict["null"], verdict["alpha"]) == ("fair_coin", 1e-6)
    assert verdict["forgery_bits"] > 80
    assert len(verdict["limits"]) >= 2
    assert verdict["suspect"]["file_sha256"] is None


def test_the_unmarked_model_is_not_proven(made: Path) -> None:
    said = call("verify", made / "unmarked.safetensors", "--key", made / "acme.key", "--json")
    assert said.code == 1
    assert said.json["outcome"] == "not_proven"
    assert said.json["matched"] < 167  # the least that convicts, of 256


def test_a_verdict_is_told_in_words_too(made: Path) -> None:
    said = call("verify", made / "marked.safetensors", "--key", made / "acme.key")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("OWNED: the mark of this key is present\n")
    said = call("verify", made / "unmarked.safetensors", "--key", made / "acme.key")
    assert said.code == 1
    assert said.out.startswith("NOT PROVEN: ")
    assert "not proven is not innocent" in said.out


def test_verifying_writes_nothing(made: Path, here: Path) -> None:
    before = listing(made)
    owned(made / "marked.safetensors", made / "acme.key")
    assert listing(made) == before
    assert listing(here) == {}


def test_the_whole_file_is_digested_on_request(made: Path) -> None:
    suspect = made / "marked.safetensors"
    said = owned(suspect, made / "acme.key", "--file-digest")
    assert said.json["suspect"]["file_sha256"] == digest(suspect)


def test_a_torch_file_is_read_like_a_safetensors_file(made: Path, here: Path) -> None:
    tensors = load_file(made / "marked.safetensors")
    torch.save({name: torch.from_numpy(each) for name, each in tensors.items()}, "m.pt")
    first, second = (
        owned(suspect, made / "acme.key").json for suspect in (made / "marked.safetensors", "m.pt")
    )
    assert first["matched"] == second["matched"]


def test_a_model_of_another_form_gives_no_verdict(made: Path, here: Path) -> None:
    torch.save({"2.weight": torch.ones(10, 63)}, "other.pt")
    said = call("verify", "other.pt", "--key", made / "acme.key", "--json")
    assert said.code == 3
    assert said.json["outcome"] == "no_verdict"
    assert "2.weight [10, 64]" in said.json["reason"]


def test_a_short_key_needs_a_date(here: Path) -> None:
    said = call(*embed(bits="64", epochs="2"))
    assert said.code == 0
    (note,) = said.notes
    assert "without a dated claim" in note
    said = call("verify", "new.safetensors", "--key", "new.key", "--json")
    assert said.code == 3
    assert said.json["outcome"] == "no_verdict"
    assert said.json["log10_p"] < -10
    assert said.json["forgery_bits"] < 80
    assert "a dated claim is needed" in said.json["reason"]
    dated = owned("new.safetensors", "new.key", "--assume-dated").json
    assert dated["assume_dated"] is True
    assert any("the owner's own statement" in limit for limit in dated["limits"])
    # Among 1999 fresh keys, too; that null alone cannot reach the usual alpha.
    fresh = ["--assume-dated", "--null", "fresh_keys"]
    ranked = owned("new.safetensors", "new.key", *fresh, "--alpha", "0.01").json
    assert ranked["null"] == "fresh_keys"
    assert ranked["log10_p"] == pytest.approx(np.log10(1 / 2000))
    said = call("verify", "new.safetensors", "--key", "new.key", *fresh, "--json")
    assert said.code == 3
    assert "cannot prove anything here" in said.json["reason"]


# --- embed


def test_embed_says_what_it_made(here: Path) -> None:
    done = call(*embed(json="")).json
    assert (done["model"], done["key"], done["scheme"]) == ("new.safetensors", "new.key", "uchida")
    assert (done["bits"], done["epochs"], done["seed"], done["device"]) == (256, 1, 0, "cpu")
    assert 0.8 < done["accuracy"] <= 1
    assert done["test_key"] is False
    assert sorted(path.name for path in here.iterdir()) == ["new.key", "new.safetensors"]
    assert (here / "new.key").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (here / "new.key").iterdir()} == {0o600}
    assert owned("new.safetensors", "new.key").json["commitment"] == done["commitment"]


@pytest.mark.parametrize("option", ["start", "teacher"])
def test_a_mark_enters_by_fine_tuning_and_by_distilling(
    made: Path, here: Path, option: str
) -> None:
    done = call(*embed(**{option: str(made / "unmarked.safetensors")}, json="")).json
    assert done["accuracy"] > 0.8
    owned("new.safetensors", "new.key")


def test_fields_are_set_and_kept_in_the_key(here: Path) -> None:
    fields = ["key_type=random", "regularizer=bce", "strength=0.05", "margin=2"]
    assert call(*embed(set=list(fields))).code == 0
    kept = call("key", "show", "new.key", "--json").json["fields"]
    assert (kept["key_type"], kept["regularizer"], kept["select"]) == ("random", "bce", "all")
    assert (kept["strength"], kept["margin"]) == (0.05, 2.0)
    owned("new.safetensors", "new.key")


@pytest.mark.parametrize(
    ("layers", "read"),
    [(["2.weight", "0.weight"], ["2.weight", "0.weight"]), (["all"], ["0.weight", "2.weight"])],
)
def test_a_mark_lies_in_several_layers(here: Path, layers: list[str], read: list[str]) -> None:
    assert call(*embed(layer=list(layers), bits="128")).code == 0
    verdict = owned("new.safetensors", "new.key").json
    assert sorted(verdict["suspect"]["tensors"]) == sorted(read)


def test_a_model_comes_from_a_factory_of_ones_own(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "my_factory_of_models.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.syspath_prepend(here)
    model = "my_factory_of_models:build"
    arguments = embed(model=model, model_arg="classes=10", layer="3.weight", set="strength=0.1")
    assert call(*arguments).code == 0
    owned("new.safetensors", "new.key")
    header = call("key", "show", "new.key", "--json").json
    assert (header["model"], header["model_arguments"]) == (model, {"classes": 10})


def test_an_encrypted_key_opens_with_its_passphrase_only(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "right").write_text("correct horse\n", encoding="utf-8")
    (here / "wrong").write_text("battery staple\n", encoding="utf-8")
    (here / "empty").write_text("\n", encoding="utf-8")
    monkeypatch.setenv("COUNTERMARK_PASSPHRASE_FILE", "right")
    assert call(*embed(encrypt="")).code == 0
    owned("new.safetensors", "new.key")
    assert list(load_file("new.key/key.safetensors")) == ["ciphertext"]
    for file, says in {
        "wrong": "wrong passphrase",
        "empty": "is empty",
        "absent": "No such file",
        "": "is encrypted",
    }.items():
        monkeypatch.setenv("COUNTERMARK_PASSPHRASE_FILE", file)
        said = call("verify", "new.safetensors", "--key", "new.key")
        assert (said.code, said.out) == (2, "")
        assert says in said.why
    assert call("key", "show", "new.key").code == 0  # what is public needs no passphrase


# --- key show, schemes, attack


def test_showing_a_key_shows_no_secret(made: Path) -> None:
    secret = load_file(made / "acme.key" / "key.safetensors")["secret"].tobytes()
    for more in ([], ["--json"]):
        said = call("key", "show", made / "acme.key", *more)
        assert (said.code, said.err) == (0, "")
        assert "ACME Inc." in said.out
        for encoded in (secret.hex(), base64.b64encode(secret).decode(), str(list(secret))[1:-1]):
            assert encoded not in said.out
            assert encoded[:8] not in said.out
    header = call("key", "show", made / "acme.key", "--json").json
    assert header["type"] == "countermark/key/v1"
    assert header["tensors"] == {"2.weight": [10, 64]}
    assert (header["fields"]["bits"], header["test_key"], header["encryption"]) == (
        256,
        False,
        None,
    )


def test_schemes_are_listed_and_described() -> None:
    said = call("schemes")
    assert said.code == 0
    assert all(name in said.out for name in SCHEMES)
    assert call("schemes", "--json").json.keys() == SCHEMES.keys()
    about = call("schemes", "uchida", "--json").json
    assert about["fields"]["bits"] == 256
    assert about["fields"]["layer"] == "(required)"
    text = call("schemes", "uchida").out
    assert all(field in text for field in about["fields"])


def test_attacks_are_listed() -> None:
    rows = call("attack", "list", "--json").json
    assert rows.keys() == ATTACKS.keys()
    assert rows["prune"].keys() == {
        "does", "source", "needs_data", "needs_model", "fields",
    }  # fmt: skip
    assert "prune: " in call("attack", "list").out


def test_pruning_a_copy_leaves_the_mark_and_the_victim(made: Path, here: Path) -> None:
    victim = made / "marked.safetensors"
    before = digest(victim)
    arguments = ["--out", "pruned.safetensors", "--set", "fraction=0.5", "--json"]
    said = call("attack", "run", "prune", victim, *arguments)
    assert said.code == 0
    assert said.json["fields"]["fraction"] == 0.5
    assert said.json["cost"].keys() == {"seconds", "epochs", "data_share"}
    assert digest(victim) == before
    pruned, whole = load_file("pruned.safetensors"), load_file(victim)
    assert pruned.keys() == whole.keys()
    assert np.count_nonzero(pruned["2.weight"]) == 320
    assert np.array_equal(pruned["2.bias"], whole["2.bias"])
    owned("pruned.safetensors", made / "acme.key")


def test_an_attack_takes_tensor_names_that_no_module_has(here: Path) -> None:
    names = ["type.weight", "a", "a.b", "x..y", "training"]
    torch.save({name: torch.ones(2, 2) for name in names}, "odd.pt")
    assert call("attack", "run", "prune", "odd.pt", "--out", "odd.safetensors").code == 0
    pruned = load_file("odd.safetensors")
    assert sorted(pruned) == sorted(names)
    assert all(np.count_nonzero(each) == 2 for each in pruned.values())


def test_a_name_in_a_key_cannot_forge_a_line(tmp_path: Path) -> None:
    owner = "ACME\nOWNED: the mark of this key is present"
    Uchida("2.weight", 256).generate_key({"2.weight": (10, 64)}, owner=owner).save(tmp_path / "k")
    said = call("key", "show", tmp_path / "k")
    assert said.code == 0
    assert not [line for line in said.out.splitlines() if line.startswith("OWNED")]


# --- null-zoo


def null_zoo(**changed: str) -> list[str]:
    """The arguments of a `null-zoo` of two small hosts, with some changed or added."""
    usual = {"data": "digits", "count": "2", "epochs": "1", "train": "320"}
    words = ((f"--{name.replace('_', '-')}", value) for name, value in (usual | changed).items())
    return ["null-zoo", *(word for pair in words for word in pair if word)]


def test_a_zoo_grows_by_what_it_lacks(here: Path) -> None:
    said = call_lab(*null_zoo(count="1"))
    assert said.code == 0
    assert ".cache/hosts: 0 hosts were there, 1 trained in" in said.out
    done = call_lab(*null_zoo(json="")).json
    assert (done["cache"], done["there"], done["trained"]) == (".cache/hosts", 1, 1)
    assert done["seconds"] > 0
    accuracy = done["accuracy"]
    assert 20 < accuracy["least"] <= accuracy["mean"] <= accuracy["most"] < 100
    again = call_lab(*null_zoo(json="")).json
    assert (again["there"], again["trained"], again["accuracy"]) == (2, 0, accuracy)
    spec = HostSpec("digits", 1001, epochs=1, rows=(0, 320))
    assert host_path(spec, zoo.CACHE).exists()


def test_a_zoo_of_siblings_and_one_of_another_model(here: Path) -> None:
    alone = call_lab(*null_zoo(cache="hosts", json="")).json
    siblings = call_lab(*null_zoo(cache="hosts", base="7", base_epochs="4", json="")).json
    assert (siblings["there"], siblings["trained"]) == (0, 2)
    assert siblings["accuracy"]["least"] > alone["accuracy"]["most"]
    assert call_lab(*null_zoo(cache="hosts", base="7", base_epochs="4", json="")).json["there"] == 2
    lenets = null_zoo(cache="hosts", model="lenet", model_arg="width=0.5", json="")
    assert call_lab(*lenets).json["trained"] == 2
    assert len(list((here / "hosts").iterdir())) == 2 + 3 + 2


def test_the_defaults_of_the_zoo_are_the_librarys() -> None:
    """The command line does not load torch to print its help, so they stand there again."""
    defaults = inspect.signature(train_null_zoo).parameters
    assert (defaults["at_a_time"].default, defaults["cache"].default) == (
        zoo.AT_A_TIME, zoo.CACHE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data": "nowhere"}, "no data directory 'nowhere'"),
        ({"model": "lennet"}, "unknown model 'lennet': the nearest is 'lenet'"),
        ({"model": "unet"}, "cannot learn classes"),
        ({"model": "lenet", "model_arg": "depth=3"}, "it takes classes, width, channels"),
        ({"model": "lenet", "model_arg": "channels=3"}, "does not take images of shape"),
        ({"model_arg": "hidden"}, "--model-arg 'hidden': expected NAME=VALUE"),
        ({"train": "0"}, "expected rows within 0 to 6000, got 0 to 0"),
        ({"count": "0"}, "count is 0"),
        ({"epochs": "-1"}, "epochs >= 0, got -1"),
        ({"measure": ""}, "either --data NAME|DIR or --measure"),
    ],
)
def test_a_zoo_that_cannot_be_is_refused(here: Path, changed: dict[str, str], says: str) -> None:
    refused(null_zoo(**changed), says, here, caller=call_lab)


def test_the_best_batch_is_measured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [speed.SpeedUp(1, 1.5, 1.4, 1.6, 3), speed.SpeedUp(16, 3.0, 2.9, 3.1, 3)]
    monkeypatch.setattr(speed, "speed_ups", lambda: measured)
    said = call_lab("null-zoo", "--measure", "--json")
    assert (said.code, said.json) == (0, {"ratios": {"1": 1.5, "16": 3.0}, "best": 16})
    assert "best: 16 at a time" in call_lab("null-zoo", "--measure").out
    refused(["null-zoo"], "either --data NAME|DIR or --measure", here, caller=call_lab)
