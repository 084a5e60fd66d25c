"""Reading needs neither torch nor scipy: a judge's machine has numpy and no more."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import typer
from cli_calls import Said, call, python

import countermark
from countermark.cli import main
from countermark.cli.app import app
from countermark.keys.key import KeyMaterial
from countermark.schemes.drawn_triggers.adi import Adi

BLOCKED = """
import sys
sys.modules["torch"] = sys.modules["scipy"] = None
from countermark.cli import main
main()
"""
PUBLIC = [
    "CountermarkError", "DeepStego", "DeepWatermarking", "Embedding", "FineTune",
    "HashFilter", "IndependentNetwork", "Key", "KeyPlace", "Overwrite", "Prune", "PruneUnused",
    "Reading", "Retrain", "Stamp", "Uchida", "Verdict", "verify",
]  # fmt: skip


def blocked(*arguments: str) -> Said:
    """A command where torch and scipy cannot be imported."""
    return python(BLOCKED, *arguments, folder=Path.cwd())


@pytest.mark.parametrize(
    "line",
    [
        "verify marked.safetensors --key acme.key",
        "verify marked.safetensors --key acme.key --json --file-digest",
        "verify unmarked.safetensors --key acme.key --json",
        "verify absent.safetensors --key acme.key",
        "key show acme.key",
        "key show acme.key --json",
        "schemes",
        "schemes uchida --json",
    ],
)
def test_a_command_answers_as_it_does_with_torch(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(made)
    assert blocked(*line.split()) == call(*line.split())


def test_a_reference_of_a_chain_needs_no_torch_but_scipy(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    line = "verify unmarked.safetensors --key acme.key --reference marked.safetensors --json"
    without_torch = BLOCKED.replace(
        'sys.modules["torch"] = sys.modules["scipy"]', 'sys.modules["torch"]'
    )
    assert "scipy" not in without_torch
    assert python(without_torch, *line.split(), folder=made) == call(*line.split())
    said = blocked(*line.split())
    assert said.code == 2
    assert said.err.splitlines()[-1].endswith("pip install 'countermark[align]'")


def commands(group: object, name: str = "") -> list[str]:
    """The names of a command, its groups and all commands in them."""
    inner = getattr(group, "commands", {})
    return [name, *(each for word in inner for each in commands(inner[word], f"{name} {word}"))]


def test_every_help_is_shown_without_torch(here: Path) -> None:
    names = commands(typer.main.get_command(app))
    assert " attack run" in names
    every = "from countermark.cli import run; import sys; sys.modules['torch'] = None\n"
    every += "for line in sys.argv[1:]: assert run([*line.split(), '--help']) == 0"
    said = python(every, *names, folder=here)
    assert (said.code, said.err) == (0, "")
    assert said.out == "".join(call(*name.split(), "--help").out for name in names)


def test_a_torch_file_is_read_without_torch(made: Path, here: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save({"net": load_file(made / "marked.safetensors")}, "suspect.pt")
    said = blocked("verify", "suspect.pt", "--key", str(made / "acme.key"))
    assert said == call("verify", "suspect.pt", "--key", made / "acme.key")
    assert said.code == 0


def test_a_transcript_of_a_remote_suspect_is_read_without_its_extra(here: Path) -> None:
    reading = """
import sys
sys.modules.update(dict.fromkeys(["torch", "scipy", "httpx2", "PIL"]))
from countermark.errors import CountermarkError
from countermark.predictors.remote import RemoteOptions, Transcript, connect
made = Transcript(type="countermark/transcript/v1", url="https://h/", protocol="mlflow",
                  options=RemoteOptions("mlflow").to_public_json(), started="", entries=())
made.save("t.json")
print(len(Transcript.load("t.json").entries), Transcript.load("t.json") == made)
try:
    connect("https://h/", RemoteOptions("mlflow"))
except CountermarkError as error:
    print(error)
"""
    said = python(reading, folder=here)
    needs = "asking a remote suspect needs an extra: pip install 'countermark[remote]'"
    assert said == Said(0, f"0 True\n{needs}\n", "")


def test_opened_triggers_are_written_checked_and_judged_without_torch(here: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (100, 3, 4, 5), dtype=np.uint8)
    material = KeyMaterial(bytes(range(32)), bytes(16))
    made = Adi(10).generate_key({"triggers": images}, owner="ACME Inc.", material=material)
    made.save("t.key")
    asked = """
import numpy as np
from countermark.keys.key import Key
from countermark.predictors.remote import RemoteOptions, Transcript
from countermark.predictors.remote.images import digest_image
from countermark.predictors.remote.transcript import TranscriptEntry
key = Key.load("t.key")
digest = "00" * 32
entries = tuple(
    TranscriptEntry(image=digest_image(image), request=digest, answer=digest, status=200, attempts=1,
          label=int(label), why=None)
    for image, label in zip(key.frozen["triggers"], key.draw_labels(100, 10))
)
Transcript(type="countermark/transcript/v1", url="https://h/", protocol="mlflow", started="",
           options=RemoteOptions("mlflow").to_public_json(), entries=entries).save("asked.json")
"""
    assert python(asked, folder=here) == Said(0, "", "")
    for line in (
        "key open t.key --triggers all --out opened.json",
        f"key check-opening opened.json --commitment {made.commitment} --out pictures",
        "verify asked.json --recorded --opened opened.json --json",
        "verify asked.json --recorded --opened opened.json --blind-choice",
    ):
        said = blocked(*line.split())
        assert said.code == 0, said
        for written in ("opened.json", "pictures"):
            if written in line.split()[-1]:
                Path(written).rename(f"before-{written}")
        assert call(*line.split()) == said


def test_importing_countermark_loads_nothing_heavy(here: Path) -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'pydantic', 'safetensors', 'cryptography', 'typer'}"
    said = python(
        f"import sys, countermark; print(sorted({heavy} & set(sys.modules)))", folder=here
    )
    assert said == Said(0, "[]\n", "")


def test_the_command_line_begins_without_what_only_its_commands_need(here: Path) -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'pydantic', 'cryptography', 'reedsolo', 'rfc8785'}"
    said = python(
        f"import sys, countermark.cli; print(sorted({heavy} & set(sys.modules)))", folder=here
    )
    assert said == Said(0, "[]\n", "")


def test_the_public_names_are_these() -> None:
    assert countermark.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(countermark, name).__name__ == name
    assert dir(countermark) == PUBLIC
    with pytest.raises(AttributeError, match="has no attribute 'Uchidda'"):
        _ = countermark.Uchidda


def test_the_installed_program_is_this_one() -> None:
    (program,) = entry_points(group="console_scripts", name="countermark")
    assert program.load() is main
