"""`stamp` and `advise`: what they write, and that whatever stops them leaves nothing behind."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import TIMEOUT, call, digest, environment, listing, refused

from checkpoints import one_file, sharded

INDEX = "model.safetensors.index.json"
STAMP = ["--owner", "ACME Inc.", "--key", "new.key", "--out", "out"]


@pytest.fixture
def folder(here: Path) -> Path:
    """A sharded checkpoint `m`, a file `one.safetensors`, and what is in the way or broken."""
    sharded(here / "m")
    one_file(here / "one.safetensors")
    content = (here / "one.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(content[:-1000])
    torch.save({"w": torch.randn(100, 100)}, here / "pickled.pt")
    (here / "taken").mkdir()
    return here


def test_a_folder_is_stamped_whole_and_its_index_kept(folder: Path) -> None:
    (folder / "m" / "pytorch_model.bin").write_bytes(b"the model without the mark")
    (folder / "m" / ".cache").mkdir()
    (folder / "m" / "old.key").mkdir()
    for name in ("old.key/key.json", "x.resume/deep/material", "release.PEM"):
        (folder / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "m" / name).write_bytes(b"a secret")
    (folder / "m" / "config.json").chmod(0o640)
    before = listing(folder / "m")
    said = call("stamp", "m", *STAMP, "--json")
    assert said.code == 0, said.err
    (note,) = said.notes
    assert "they may hold the model without the mark, or a secret: old.key, pytorch_model" in note
    about = said.json
    assert about["matched"] == about["bits"]
    assert about["left_out"] == ["old.key", "pytorch_model.bin", "release.PEM", "x.resume"]
    assert 0 < about["change"] < 1.3 * about["expected_change"]  # as the draw will have it
    assert listing(folder / "m") == before
    after = listing(folder / "out")
    gone = {name.split("/")[0] for name in set(before) - set(after)}
    assert gone == {".cache", *about["left_out"]}
    assert (folder / "out" / "config.json").stat().st_mode & 0o777 == 0o640
    assert {name for name in after if before[name] == after[name]} == {
        INDEX, "config.json", "1_Pooling", "1_Pooling/config.json"
    }  # fmt: skip
    assert oct((folder / "out").stat().st_mode) == oct((folder / "m").stat().st_mode)
    assert call("verify", "out", "--key", "new.key").code == 0
    assert call("verify", f"out/{INDEX}", "--key", "new.key").code == 0
    assert call("verify", "m", "--key", "new.key").code == 1
    assert not [each for each in folder.iterdir() if each.name.endswith(".tmp")]


def test_advice_is_what_stamp_follows(folder: Path) -> None:
    before = listing(folder)
    advised = call("advise", "one.safetensors", "--bits", "128", "--json").json
    assert listing(folder) == before
    made = call("stamp", "one.safetensors", *STAMP, "--bits", "128", "--json").json
    assert {name: made[name] for name in advised} == advised
    assert "forecast" in call("advise", "one.safetensors").out
    assert "That is much for so few weights" in call("advise", "one.safetensors").out


def test_advice_and_stamp_say_that_only_embeddings_are_left(folder: Path) -> None:
    from safetensors.torch import save_file

    state = {"embed.weight": torch.randn(900, 128), "a.weight": torch.randn(128, 128)}
    save_file(state, "floats.safetensors")
    state["a.weight"] = state["a.weight"].to(torch.float8_e4m3fn)
    save_file(state, "codes.safetensors")
    sentence = "Only embeddings or output heads can carry the mark here (embed.weight)"
    assert sentence not in call("advise", "floats.safetensors").out
    for done in (call("advise", "codes.safetensors"), call("stamp", "codes.safetensors", *STAMP)):
        assert done.code == 0
        assert f"{sentence}, because 1 weight is stored as codes (quantised): a.weight" in done.out


def test_a_passphrase_and_no_reference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "secret").write_text("correct horse")
    monkeypatch.setenv("COUNTERMARK_PASSPHRASE_FILE", str(folder / "secret"))
    assert call("stamp", "one.safetensors", *STAMP, "--encrypt", "--no-reference").code == 0
    assert (folder / "new.key" / "key.safetensors").stat().st_size < 1000
    assert call("verify", "out", "--key", "new.key").code == 0
    monkeypatch.delenv("COUNTERMARK_PASSPHRASE_FILE")
    assert "is encrypted" in call("verify", "out", "--key", "new.key").why


def test_the_reference_undoes_reordered_neurons(folder: Path) -> None:
    """A chain; the checkpoint from before the mark is the reference."""
    from safetensors.torch import load_file, save_file

    drawn = torch.Generator().manual_seed(1)
    sizes = [(300, 200), (250, 300), (10, 250)]
    state = {}
    for at, shape in enumerate(sizes):
        state[f"{at}.weight"] = torch.randn(shape, generator=drawn) / shape[1] ** 0.5
        state[f"{at}.bias"] = torch.randn(shape[0], generator=drawn)
    save_file(state, "chain.safetensors")
    options = ["--layer", "1.weight", "--set", "margin=4"]
    assert call("stamp", "chain.safetensors", *STAMP, *options).code == 0
    stolen = load_file("out")
    order = torch.randperm(250, generator=drawn)
    stolen["1.weight"], stolen["1.bias"] = stolen["1.weight"][order], stolen["1.bias"][order]
    stolen["2.weight"] = stolen["2.weight"][:, order].contiguous()
    save_file(stolen, "stolen.safetensors")
    judged = ["verify", "stolen.safetensors", "--key", "new.key", "--assume-dated"]
    assert call(*judged).code == 1
    assert call(*judged, "--reference", "chain.safetensors").code == 0
    by_copy = call(*judged, "--reference", "out", "--json")
    assert by_copy.code == 0, "a copy may be aligned to the marked model"
    assert by_copy.json["null"] == "aligned_coin"
    assert by_copy.json["suspect"]["reference"]["restored"] == ["1.weight"]
    assert by_copy.json["suspect"]["reference"]["bears_mark"]


def test_accuracy_is_measured_where_data_are_given(made: Path, here: Path) -> None:
    host = ["--model", "mlp", "--data", "digits"]
    source = str(made / "unmarked.safetensors")
    refused(["stamp", source, *STAMP, "--model", "mlp"], "measured by --model", here)
    refused(["stamp", source, *STAMP, *host, "--model-arg", "hidden=8"], "does not fit", here)
    said = call("stamp", source, *STAMP, *host, "--set", "margin=2", "--json")
    assert said.code == 0, said.err
    kept = said.json["outputs"]
    assert kept["accuracy_before"] > 0.85
    assert abs(kept["accuracy_after"] - kept["accuracy_before"]) < 0.03


def language_model(folder: Path) -> Path:
    """A folder that transformers can load: BERT of a few thousand weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "mark", "in", "the", "paper"]
    (folder / "words.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    (folder / "texts").write_text("a mark in the paper\n\nthe paper\na mark\n")
    return folder / "bert"


@pytest.mark.slow  # transformers takes seconds to load
def test_embeddings_are_compared_where_texts_are_given(folder: Path) -> None:
    source = language_model(folder)
    refused(["stamp", "m", *STAMP, "--prompts", "texts"], "transformers can load", folder)
    refused(["stamp", str(source), *STAMP, "--prompts", "absent"], "absent cannot be read", folder)
    options = ["--prompts", "texts", "--set", "margin=2", "--json"]
    said = call("stamp", source, *STAMP, *options)
    assert said.code == 0, said.err
    kept = said.json["outputs"]
    assert kept["texts"] == 3
    assert 0.9 < kept["least_cosine"] < 1
    assert 0 < kept["largest_change_of_similarity"] < 0.3


def test_one_suspect_against_a_folder_of_keys(folder: Path) -> None:
    for name in ("a", "b"):
        places = ["--key", f"keys/{name}.key", "--out", f"{name}.safetensors"]
        made = ["stamp", "one.safetensors", "--owner", f"owner {name}", *places, "--no-reference"]
        assert call(*made).code == 0
    found = call("identify", "b.safetensors", "--keys", "keys")
    assert found.code == 0
    assert "2 keys tried, 1 found" in found.out
    assert "keys/b.key: OWNED" in found.out
    assert "owner b" in found.out
    said = call("identify", "one.safetensors", "--keys", "keys", "--json")
    assert (said.code, said.json["found"], said.json["tried"]) == (1, {}, 2)
    (folder / "keys" / "b.key" / "key.safetensors").write_bytes(b"damaged")
    unsure = call("identify", "one.safetensors", "--keys", "keys")
    assert unsure.code == 3
    assert "not tried: 1, damaged" in unsure.out
    assert call("identify", "a.safetensors", "--keys", "keys").code == 0
    refused(["identify", "absent", "--keys", "keys"], "absent cannot be read", folder)
    refused(["identify", "a.safetensors", "--keys", "m"], "m holds 0 keys", folder)
    refused(["identify", "a.safetensors", "--keys", "keys", "--alpha", "2"], "--alpha is", folder)


# --- what cannot be right

REFUSED: list[tuple[list[str], str]] = [
    (["cut.safetensors", *STAMP], "cut.safetensors is damaged"),
    (["absent", *STAMP], "absent cannot be read"),
    (["pickled.pt", *STAMP], "pickled.pt is no safetensors checkpoint"),
    (["taken", *STAMP], "taken holds no checkpoint"),
    (["m", *STAMP, "--out", "taken"], "taken exists"),
    (["m", *STAMP, "--out", "m/out"], "m/out lies in m"),
    (["m", *STAMP, "--key", "m/new.key"], "m/new.key lies in m, which is to be published"),
    (["m", *STAMP, "--key", "one.safetensors/key"], "one.safetensors is no folder"),
    (["m", *STAMP, "--bits", "64", "--set", "bits=32"], "--bits and --set bits: give one"),
    (["m", *STAMP, "--owner", "M\udcfcller"], "is no text in the encoding of this shell"),
    (["m", *STAMP, "--key", "taken"], "taken exists, and a key is never overwritten"),
    (["m", *STAMP, "--key", "out/a.key"], "a key never lies there"),
    (["m", *STAMP, "--owner", ""], "a mark needs an owner"),
    (["m", *STAMP, "--encrypt"], "--encrypt needs a passphrase"),
    (["m", *STAMP, "--layer", "layers.0.upp"], "nearest is 'layers.0.up'"),
    (["m", *STAMP, "--bits", "0"], "bits is 0"),
    (["m", *STAMP, "--bits", "200000"], "200000 bits do not fit"),
    (["m", *STAMP, "--set", "margin=-1"], "field margin"),
    (["m", *STAMP, "--set", "values=0"], "field values"),
    (["m", *STAMP, "--set", "colour=red"], "stamp has no field 'colour'"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_stamp_refuses(folder: Path, arguments: list[str], says: str) -> None:
    refused(["stamp", *arguments], says, folder)


def test_a_missing_and_a_truncated_shard(folder: Path) -> None:
    second = folder / "m" / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-7])
    refused(["stamp", "m", *STAMP], f"{second.name} is damaged", folder)
    second.unlink()
    refused(["stamp", "m", *STAMP], f"{second.name} cannot be read", folder)


def test_weights_that_are_not_finite(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file("one.safetensors")
    state["layers.0.up"][3, 7] = float("inf")
    save_file(state, "inf.safetensors")
    refused(["stamp", "inf.safetensors", *STAMP], "not finite", folder)


# --- what happens meanwhile


@pytest.mark.parametrize("source", ["m", "one.safetensors"])
@pytest.mark.parametrize("place", ["copy", "pwrite", "fsync", "save_key", "rename"])
def test_a_full_disk_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, place: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(start: Path, target: Path) -> None:
        Path(target).write_bytes(Path(start).read_bytes()[:100])
        full()

    where: dict[str, tuple[str, Any]] = {
        "copy": ("countermark.stamping.copying._copy", half),
        "pwrite": ("countermark.stamping.copying.os.pwrite", full),
        "fsync": ("countermark._internal.files.os.fsync", full),
        "save_key": ("countermark.keys.storage.files.write_folder", full),
        "rename": ("pathlib.Path.rename" if source == "m" else "pathlib.Path.replace", full),
    }
    monkeypatch.setattr(*where[place])
    refused(["stamp", source, *STAMP], "No space left on device", folder)


def test_a_file_system_that_takes_no_more_bytes(folder: Path) -> None:
    """The real thing: the kernel refuses to let any file grow beyond 100 kB."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from countermark.cli import main; main()"
    )
    before = listing(folder)
    done = subprocess.run(
        [sys.executable, "-c", code, "stamp", "one.safetensors", *STAMP],
        check=False, env=environment(), capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "too large" in done.stderr.lower()
    assert listing(folder) == before


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder nobody may write to")
@pytest.mark.parametrize("source", ["m", "one.safetensors"])
def test_a_folder_that_is_read_only(folder: Path, source: str) -> None:
    out = ["--out", "/sys/kernel/stamped"]
    said = refused(["stamp", source, *STAMP, *out], "/sys/kernel/.stamped", folder)
    assert said.err.count("\n") == 1
    refused(["stamp", source, *STAMP, "--key", "/sys/kernel/new.key"], "/sys/kernel", folder)


MOMENTS = ("copied", "written", "saved")
KILLED = """
import os, signal, sys
import countermark.stamping.copying as copying, countermark.stamping.making as making
import countermark.keys.key
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
moment, how = sys.argv.pop(1), sys.argv.pop(1)
def dying(whole):
    def done(*given, **named):
        whole(*given, **named)
        os.kill(os.getpid(), getattr(signal, how))
    return done
if moment == "copied":
    copying.shutil.copyfile = dying(copying.shutil.copyfile)
if moment == "written":
    making._require_bits = dying(making._require_bits)
if moment == "saved":
    countermark.keys.key.Key.save = dying(countermark.keys.key.Key.save)
from countermark.cli import main
main()
"""


def moments() -> list[Any]:
    """Every moment for a folder and for a file; most of them only with the slow tests."""
    usual = {("m", "copied", "SIGKILL"), ("one.safetensors", "saved", "SIGKILL"),
             ("one.safetensors", "written", "SIGINT")}  # fmt: skip
    every = itertools.product(("m", "one.safetensors"), MOMENTS, ("SIGKILL", "SIGINT"))
    return [pytest.param(*each, marks=() if each in usual else pytest.mark.slow) for each in every]


@pytest.mark.parametrize(("source", "moment", "how"), moments())
def test_killed_at_any_moment(folder: Path, source: str, moment: str, how: str) -> None:
    before = listing(folder)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, moment, how, "stamp", source, *STAMP],
        check=False, env=environment(), capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    left = {name: each for name, each in listing(folder).items() if name not in before}
    assert {name: digest(folder / name) for name in before if before[name] != "a folder"} == {
        name: each for name, each in before.items() if each != "a folder"
    }, "the input is as it was"
    assert "out" not in left
    if how == "SIGINT":
        assert (done.returncode, done.stderr) == (2, "countermark: interrupted\n")
        assert all(name.split("/")[0] == "new.key" for name in left)
    else:
        assert done.returncode == -signal.SIGKILL
        tops = {name.split("/")[0] for name in left} - {"new.key"}
        assert all(top.startswith(".out.") and top.endswith(".tmp") for top in tops)
    if moment != "saved":
        assert "new.key" not in left
    shutil.rmtree("new.key", ignore_errors=True)
    assert call("stamp", source, *STAMP).code == 0, "the same command then ends well"


def test_an_index_as_source_says_what_to_give(folder: Path) -> None:
    shutil.copytree("m", "n")
    index = json.loads(Path(f"n/{INDEX}").read_text())
    assert index["metadata"] == {"total_size": 1}
    refused(["stamp", f"n/{INDEX}", *STAMP], "give the folder", folder)
