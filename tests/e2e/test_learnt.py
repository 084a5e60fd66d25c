"""A learnt reader on the command line: its siblings, its verdicts, and its interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_calls import Said, call, embed, listing, refused
from killing import Driver
from safetensors.numpy import load_file

pytestmark = pytest.mark.xdist_group("learnt")  # its models are made once


def learnt(**changed: Any) -> list[str]:
    """The arguments of an `embed` with a learnt reader that takes three seconds."""
    usual = {"scheme": "independent_network", "bits": "128", "epochs": "2", "siblings": "3"}
    return embed(**{**usual, **changed})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `m.safetensors`, its `a.key`, and `other.safetensors`; read only."""
    folder = tmp_path_factory.mktemp("learnt")
    marked = learnt(
        out=str(folder / "m.safetensors"), key=str(folder / "a.key"), epochs="4", siblings="4",
        json="",
    )  # fmt: skip
    other = embed(scheme="none", out=str(folder / "other.safetensors"), key=None, seed="2")
    base = embed(scheme="none", out=str(folder / "base.safetensors"), key=None, seed="3")
    said = call(*marked)
    assert (said.code, said.notes) == (0, []), said
    (folder / "said.json").write_text(said.out)
    assert call(*other).code == 0
    assert call(*base).code == 0
    return folder


def unmarked(models: Path) -> list[str]:
    """The unmarked models that the examiner supplies."""
    return [word for n in ("base", "other") for word in ("--unmarked", f"{models / n}.safetensors")]


def judged(models: Path, name: str, *more: str, code: int) -> Any:
    """The verdict on a model, which must end with this code."""
    suspect, key = models / f"{name}.safetensors", models / "a.key"
    said = call("verify", suspect, "--key", key, "--json", *more)
    assert said.code == code, said
    return said.json


# --- what embedding says


def test_embedding_tells_what_the_siblings_cost(models: Path) -> None:
    said = json.loads((models / "said.json").read_text())
    assert (said["scheme"], said["bits"], said["matched"]) == ("independent_network", 128, 128)
    assert (said["siblings"], said["sibling_epochs"], said["epochs"]) == (4, 4 + 2 + 4 + 2, 4)
    assert said["sibling_seconds"] > 0
    assert said["accuracy"] > 0.9


def test_the_commitment_is_c1(models: Path) -> None:
    said = json.loads((models / "said.json").read_text())
    shown = call("key", "show", models / "a.key", "--json").json
    assert said["commitment"] == shown["C1"] != shown["C0"]
    verdict = judged(models, "other", "--alpha", "1e-2", code=1)
    assert verdict["commitment"] == shown["C1"]
    assert shown["fields"]["units"] == [1]
    tensors = load_file(models / "a.key" / "key.safetensors")
    assert {name: list(each.shape) for name, each in tensors.items()} == {
        "secret": [32],
        "learnt.reader.gate": [640],
        "learnt.reader.first": [256, 640],
        "learnt.reader.last": [128, 256],
        "learnt.siblings": [2],
        "learnt.sibling_threshold": [1],
        "learnt.loudness": [64],
    }


def test_the_key_shows_no_reader(models: Path) -> None:
    shown = call("key", "show", models / "a.key")
    assert (shown.code, "learnt" in shown.out, "C1: " in shown.out) == (0, False, True)


def test_linear_schemes_train_no_siblings(here: Path) -> None:
    said = call(*embed(siblings="8", json=""))
    assert (said.json["siblings"], said.json["sibling_epochs"]) == (0, 0)


# --- verdicts


def test_an_undated_key_proves_nothing(models: Path) -> None:
    verdict = judged(models, "m", "--alpha", "1e-3", *unmarked(models), code=3)
    assert (verdict["outcome"], verdict["matched"]) == ("no_verdict", 128)
    assert "a dated claim is needed (--assume-dated" in verdict["reason"]
    assert (verdict["forgery_bits"], verdict["null"]) == (0, "permuted_units")


def test_a_dated_key_finds_its_mark(models: Path) -> None:
    dated = ["--alpha", "1e-3", "--assume-dated"]
    assert "(--unmarked)" in judged(models, "m", *dated, code=3)["reason"]
    verdict = judged(models, "m", *dated, *unmarked(models), code=0)
    assert verdict["hidden_units"]["axes"] == {"2.weight": 1}
    assert (verdict["unmarked"]["rank"], verdict["unmarked"]["floor"]) == (1, pytest.approx(1 / 3))
    assert verdict["log10_p"] == verdict["floor"] == pytest.approx(-3, abs=1e-3)
    assert verdict["loss"] < verdict["reader"]["threshold"]
    assert (verdict["reader"]["siblings"], verdict["reader"]["permuted"]) == (2, 256)
    assert verdict["reader"]["published"] is None


def test_the_verdict_in_words(models: Path) -> None:
    suspect, key = models / "m.safetensors", models / "a.key"
    dated = ["--alpha", "1e-3", "--assume-dated", *unmarked(models)]
    said = call("verify", suspect, "--key", key, *dated)
    assert (said.code, said.err) == (0, "")
    lines = {line.split()[0]: line for line in said.out.splitlines()}
    for name in ("OWNED:", "L2", "units", "siblings", "unmarked", "false", "null", "limit"):
        assert name in lines
    assert "set on 2 held-out unmarked siblings; one passes with p <= 0.33" in lines["siblings"]
    assert "of 256 hidden-unit permutations" in lines["false"]


def test_an_unmarked_model_is_not_proven(models: Path) -> None:
    verdict = judged(models, "other", "--alpha", "1e-3", "--assume-dated", code=1)
    assert verdict["outcome"] == "not_proven"
    assert verdict["loss"] > verdict["reader"]["threshold"]


def test_a_rank_among_the_siblings(models: Path) -> None:
    among = ["--null", "unmarked_models", "--assume-dated"]
    assert "the owner's word" in judged(models, "m", *among, "--alpha", "0.5", code=3)["reason"]
    verdict = judged(models, "m", *among, "--alpha", "0.5", *unmarked(models), code=0)
    assert 10 ** verdict["log10_p"] == pytest.approx(1 / 3)
    assert judged(models, "other", *among, "--alpha", "0.5", code=1)["outcome"] == "not_proven"
    verdict = judged(models, "m", *among, code=3)
    assert "cannot prove anything here" in verdict["reason"]


def test_another_null_of_other_schemes_is_refused(models: Path, here: Path) -> None:
    arguments = ["verify", str(models / "m.safetensors"), "--key", str(models / "a.key")]
    says = "expected permuted_units or unmarked_models"
    refused([*arguments, "--null", "fresh_keys"], says, here)


def test_without_siblings_a_note_and_no_verdict(here: Path) -> None:
    made = call(*learnt(siblings="0", json=""))
    assert (made.code, made.json["siblings"], made.json["sibling_epochs"]) == (0, 0, 0)
    (note,) = made.notes
    assert "give 2 or more, or verify will answer no_verdict" in note
    dated = ["--assume-dated", "--alpha", "1e-2"]
    said = call("verify", "new.safetensors", "--key", "new.key", *dated)
    assert said.code == 3
    assert "on 0 held-out unmarked siblings, and a threshold needs 2" in said.out
    said = call("verify", "new.safetensors", "--key", "new.key", "--null", "unmarked_models")
    assert (said.code, "expected permuted_units\n" in said.err) == (2, True)


# --- a reader of one's own

FACTORY = """
from torch import nn

def build(inputs, bits):
    open("was-run", "w").close()
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, bits))
"""


def test_a_reader_of_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "my_own_reader.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(here)
    code = "my_own_reader:build"
    made = call(*learnt(set=[f"reader={code}", "strength=0.5", "reader_lr=0.005"]))
    assert made.code == 0, made
    (here / "was-run").unlink()

    def verify(*more: str) -> Said:
        dated = ["--assume-dated", "--alpha", "1e-2", "--unmarked", "other.safetensors", *more]
        return call("verify", "new.safetensors", "--key", "new.key", *dated)

    assert call(*embed(scheme="none", out="other.safetensors", key=None, seed="2")).code == 0
    for untrusted in ([], ["--reader", "my_own_reader:other"]):
        said = verify(*untrusted)
        assert (said.code, said.out) == (2, "")
        assert f"this key reads with code of its own, {code}" in said.why
    assert not (here / "was-run").exists()
    assert verify("--reader", code).code == 0
    assert (here / "was-run").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["reader=nowhere_to_be_found:build"], "cannot be made"),
        (["reader=mlpp"], "expected 'mlp' or module:factory"),
        (["mode=manual"], "field mode"),
        (["units=[3]"], "units is [3]"),
        (["units=[0, 1]"], "units is [0, 1]"),
        (["hidden=0"], "field hidden"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_trained(
    here: Path, settings: list[str], says: str
) -> None:
    refused(learnt(set=settings), says, here)


def test_a_mark_that_does_not_take_leaves_nothing(here: Path) -> None:
    refused(learnt(epochs="1", siblings="0", set=["reader_lr=1e-9"]), "train longer", here)


# --- interruptions

RESUMED = learnt(test_key="7")
SAVE_NOW = "after(train._Loop, 'one_step', {}, lambda: setattr(train, '_CHECKPOINT_SECONDS', -1.0))"
MOMENTS = {  # the siblings take 935 steps and 5 epochs, the host 374 and 2; finished siblings there
    "in the middle of a sibling's epoch": (
        SAVE_NOW.format(50) + "; after(train.Checkpoint, 'save', 3)", 0,
    ),
    "while the last sibling trains": ("after(train.Checkpoint, 'save', 4)", 2),
    "in the middle of the host's last epoch": (
        SAVE_NOW.format(1200) + "; after(train.Checkpoint, 'save', 9)", 3,
    ),
    "after the key is written": ("after(Key, 'save', 1)", 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*RESUMED).code == 0
    return listing(folder)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(
    here: Path, driver: Driver, undisturbed: dict[str, str], moment: str
) -> None:
    """Model, key and reader are what they would have been, byte for byte."""
    code, finished = MOMENTS[moment]
    driver.killed(code, RESUMED, here)
    resume = here / "new.safetensors.resume"
    assert len(list(resume.glob("sibling-*.safetensors"))) == finished
    assert call(*RESUMED).code == 0
    assert listing(here) == undisturbed


def test_a_fresh_secret_survives_the_siblings(here: Path, driver: Driver) -> None:
    arguments = learnt()
    driver.killed("after(train.Checkpoint, 'save', 3)", arguments, here)
    content = (here / "new.safetensors.resume" / "material").read_bytes()
    assert call(*arguments).code == 0
    assert load_file("new.key/key.safetensors")["secret"].tobytes() == content[:32]
    assert [path.name for path in here.iterdir() if "resume" in path.name] == []


# --- the published set-up, on all of MNIST


MNIST = Path(__file__).parents[3] / "shared" / "data" / "ylecun" / "mnist"
VARIANTS = {
    "auto": ([], {0}),
    "manu": (["--set", "mode=manu"], {0}),
    # What an unmarked twin reads as well is not claimed, whoever marked it.
    "auto, published": (["--set", "as_published=true"], {3}),
    "manu, published": (["--set", "mode=manu", "--set", "as_published=true"], {0, 3}),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_on_mnist(here: Path, variant: str) -> None:
    settings, codes = VARIANTS[variant]
    common = ["--model", "mlp", "--data", MNIST, "--epochs", "8"]
    assert call(
        "embed", "--scheme", "independent_network", *common, "--layer", "2.weight", "--bits", "512",
        "--owner", "ACME Inc.", "--seed", "7", "--siblings", "4", "--out", "m.safetensors",
        "--key", "a.key", *settings,
    ).code == 0  # fmt: skip
    stranger = ["embed", "--scheme", "none", *common, "--seed", "8", "--out", "other.safetensors"]
    assert call(*stranger).code == 0
    dated = ["--assume-dated", "--unmarked", "other.safetensors"]
    assert call("verify", "m.safetensors", "--key", "a.key", *dated).code in codes
    assert call("verify", "m.safetensors", "--key", "a.key").code == 3
    said = call("verify", "other.safetensors", "--key", "a.key", "--assume-dated", "--json")
    assert (said.code, said.json["outcome"]) == (1, "not_proven")
