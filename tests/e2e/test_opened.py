"""Opened triggers from the command line: open, check, look at, verify a file and a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import call, embed, refused
from PIL import Image

from countermark.keys.key import Key, KeyMaterial
from countermark.predictors.remote import RemoteOptions, Transcript
from countermark.predictors.remote.images import digest_image
from countermark.schemes.drawn_triggers.guo import Guo
from countermark.verification.disclosure import TriggerDisclosure

ALL = ",".join(map(str, range(60)))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, its key, three triggers of it, sixty and all of them; read only."""
    folder = tmp_path_factory.mktemp("openings")
    marked = {"scheme": "adi", "layer": None, "bits": None, "epochs": "8"}
    made = embed(**marked, out=str(folder / "m.safetensors"), key=str(folder / "a.key"))
    assert call(*made).code == 0
    stranger = marked | {"scheme": "none", "owner": None, "key": None, "epochs": "3"}
    assert call(*embed(**stranger, out=str(folder / "other.safetensors"))).code == 0
    for name, which in (("three", "7,0,3"), ("sixty", ALL), ("all", "all")):
        opening = ["key", "open", folder / "a.key", "--triggers", which]
        assert call(*opening, "--out", folder / f"{name}.json").code == 0
    return folder


@pytest.fixture
def inside(opened: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, to work in."""
    monkeypatch.chdir(opened)
    return opened


def test_it_says_what_was_opened_and_warns(opened: Path, here: Path) -> None:
    said = call("key", "open", opened / "a.key", "--triggers", "5,2", "--out", "o.json", "--json")
    assert said.code == 0
    commitment = Key.load(opened / "a.key").commitment
    assert said.json == {
        "opened": "o.json", "triggers": [2, 5], "committed": 100, "commitment": commitment,
    }  # fmt: skip
    (note,) = said.notes
    assert "whoever sees these 2 triggers can train them out" in note
    assert [path.name for path in here.iterdir()] == ["o.json"]


def test_a_check_prints_labels_and_writes_pictures(inside: Path, tmp_path: Path) -> None:
    key = Key.load("a.key")
    labels = key.draw_labels(8, 10)
    pictures = tmp_path / "pictures"
    checking = ["key", "check-opening", "three.json", "--commitment", key.commitment]
    said = call(*checking, "--json", "--out", pictures)
    assert (said.code, said.err) == (0, "")
    assert said.json == {
        "commitment": key.commitment, "owner": "ACME Inc.", "scheme": "adi", "test_key": False,
        "committed": 100, "opened": [{"index": n, "label": int(labels[n])} for n in (0, 3, 7)],
    }  # fmt: skip
    shown = call(*checking).out
    assert f"3 of 100 triggers of adi\ntrigger 0: class {labels[0]}\n" in shown
    assert "is it the one you know?" not in shown
    assert "is it the one you know?" in call("key", "check-opening", "three.json").out
    written = {path.name: np.asarray(Image.open(path)) for path in pictures.iterdir()}
    assert sorted(written) == [f"trigger-{n:05}-class-{labels[n]}.png" for n in (0, 3, 7)]
    for n in (0, 3, 7):
        picture = written[f"trigger-{n:05}-class-{labels[n]}.png"]
        assert np.array_equal(picture, key.frozen["triggers"][n, 0])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_are_lossless_whatever_the_channels(here: Path, channels: int) -> None:
    images = np.random.default_rng(channels).integers(0, 256, (2, channels, 5, 7), dtype=np.uint8)
    made = Guo(10, 2).generate_key(
        {"triggers": images}, owner="A", material=KeyMaterial.from_test_seed(1)
    )
    made.save("t.key")
    assert call("key", "open", "t.key", "--triggers", "all", "--out", "o.json").code == 0
    said = call("key", "check-opening", "o.json", "--out", "pictures")
    assert said.code == 3
    assert "this is a test key" in said.out
    found = [np.asarray(Image.open(path)) for path in sorted(Path("pictures").iterdir())]
    for picture, image in zip(found, images, strict=True):
        stacked = image.transpose(1, 2, 0) if channels == 3 else image.reshape(-1, 7)
        assert np.array_equal(picture, stacked)


def test_an_encrypted_key_is_opened_with_its_passphrase(
    opened: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Key.load(opened / "a.key").save("sealed.key", "correct horse")
    arguments = ["key", "open", "sealed.key", "--triggers", "3", "--out", "o.json"]
    refused(arguments, "sealed.key is encrypted", here)
    Path("pass.txt").write_text("correct horse\n")
    monkeypatch.setenv("COUNTERMARK_PASSPHRASE_FILE", "pass.txt")
    assert call(*arguments).code == 0
    assert TriggerDisclosure.load("o.json").check(Key.load(opened / "a.key").commitment)


def verified(suspect: str, *more: str, code: int) -> Any:
    said = call("verify", suspect, "--json", *more)
    assert said.code == code, said
    return said.json


def test_opened_triggers_judge_a_file(inside: Path) -> None:
    host = ["--model", "mlp"]
    commitment = ["--commitment", Key.load("a.key").commitment]
    by_key = verified("m.safetensors", "--key", "a.key", code=0)
    by_all = verified("m.safetensors", "--opened", "all.json", *commitment, *host, code=0)
    assert by_key["disclosure"] is None
    assert by_all["disclosure"] == {"opened": 100, "committed": 100, "blind_choice": False}
    assert by_all["suspect"] == by_key["suspect"]
    for name in ("matched", "log10_p", "forgery_bits", "commitment", "owner", "scheme"):
        assert by_all[name] == by_key[name]
    sixty = verified("m.safetensors", "--opened", "sixty.json", *host, code=0)
    assert (sixty["bits"], sixty["answered"]) == (100, 60)
    blind = ["--opened", "sixty.json", "--blind-choice", *host]
    assert verified("m.safetensors", *blind, code=0)["bits"] == 60
    assert verified("other.safetensors", *blind, code=1)["outcome"] == "not_proven"
    assert verified("m.safetensors", "--opened", "three.json", *host, code=3)["bits"] == 100
    shown = call("verify", "m.safetensors", *blind).out
    assert "opened        60 of the key's 100 triggers" in shown


def record(path: Path, count: int) -> None:
    """A transcript of a suspect that was asked about the first triggers and answered them well."""
    key = Key.load("a.key")
    labels = key.draw_labels(100, 10).tolist()
    entries = [
        {
            "image": digest_image(image), "request": "00" * 32, "answer": "00" * 32, "status": 200,
            "attempts": 1, "label": label, "why": None,
        }
        for image, label in list(zip(key.frozen["triggers"], labels, strict=True))[:count]
    ]  # fmt: skip
    about = {"url": "https://h/", "protocol": "mlflow", "started": ""}
    options = RemoteOptions("mlflow").to_public_json()
    kind = {"type": "countermark/transcript/v1"}
    document = json.dumps(kind | about | {"options": options, "entries": entries})
    Transcript.model_validate_json(document).save(path)


def test_opened_triggers_judge_a_record(inside: Path, tmp_path: Path) -> None:
    record(tmp_path / "asked.json", 60)
    replayed = [str(tmp_path / "asked.json"), "--recorded"]
    found = verified(*replayed, "--opened", "sixty.json", code=0)
    assert (found["matched"], found["bits"]) == (60, 100)
    assert found["suspect"]["name"] == "https://h/"
    said = call("verify", *replayed, "--opened", "all.json")
    assert (said.code, "no answer for 40 of 100 image(s)" in said.why) == (2, True)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("key open a.key --triggers 0 --out three.json", "three.json exists"),
        ("key open a.key --triggers 100 --out new", "expected some of 0 to 99, each once"),
        ("key open a.key --triggers 1,1 --out new", "each once"),
        ("key open a.key --triggers 1;2 --out new", "--triggers is 1;2: expected numbers"),
        ("key open a.key --triggers  --out new", "--triggers is : expected numbers"),
        ("key open a.key --out new", "Missing option '--triggers'"),
        ("key open a.key --triggers 1", "Missing option '--out'"),
        ("key open absent --triggers 1 --out new", "expected a key folder"),
        ("key check-opening absent", "absent: it cannot be read"),
        ("key check-opening a.key", "a.key: it is not a regular file"),
        ("key check-opening a.key/key.json", "expected a file of type countermark/openings/v1"),
        ("key check-opening three.json --commitment 00", "not to 00: ask the owner"),
        ("key check-opening three.json --out a.key", "a.key exists"),
        ("verify m.safetensors", "give either --key DIR, or --opened FILE"),
        ("verify m.safetensors --key a.key --opened all.json", "give either --key DIR, or"),
        ("verify m.safetensors --key a.key --commitment 00", "--commitment is for --opened"),
        ("verify m.safetensors --key a.key --blind-choice", "--blind-choice is for --opened"),
        ("verify m.safetensors --opened all.json --reader a:b", "--reader is for --key"),
        ("verify m.safetensors --opened all.json", "give --model"),
        ("verify m.safetensors --opened all.json --model vgg16", "does not fit the model"),
        ("verify m.safetensors --opened all.json --model mlp --commitment 00", "not to 00"),
        ("verify m.safetensors --opened a.key --model mlp", "a.key: it is not a regular file"),
        ("verify m.safetensors --opened all.json --ask protocol=oip", "are for a service"),
        ("verify http://127.0.0.1:9 --opened all.json", "Give --ask protocol=oip"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    inside: Path, line: str, says: str
) -> None:
    refused(line.split(" "), says, inside)


def test_a_key_that_reads_weights_has_no_triggers(made: Path, here: Path) -> None:
    arguments = ["key", "open", str(made / "acme.key"), "--triggers", "all", "--out", "new"]
    refused(arguments, "uchida reads weights: expected a key of triggers", here)


def test_a_service_that_is_not_there_gives_no_verdict(inside: Path) -> None:
    asked = ["--ask", "protocol=mlflow", "--ask", "retries=0", "--opened", "three.json"]
    verdict = verified("http://127.0.0.1:9", *asked, code=3)
    assert "any of 3 triggers" in verdict["reason"]
