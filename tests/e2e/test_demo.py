"""`countermark demo`: the whole product in a folder, and what it must show."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
from cli_calls import call, listing

from countermark.training import demo

OUTCOMES = {
    "uchida": ("owned", "not_proven", "owned"),
    "network": ("owned", "not_proven", "owned"),
    "published": ("no_verdict", "not_proven", "no_verdict"),
}


@pytest.mark.parametrize(
    "epochs",
    [
        pytest.param(5, id="trained for a third"),  # shows the same, in half of the time
        pytest.param(None, id="as users run it", marks=pytest.mark.slow),
    ],
)
def test_the_demo_shows_both_schemes_and_what_the_published_one_is_worth(
    here: Path, monkeypatch: pytest.MonkeyPatch, epochs: int | None
) -> None:
    if epochs is not None:
        monkeypatch.setattr(demo, "_EPOCHS", epochs)
    said = call("demo", "--out", "shown")
    assert (said.code, said.err) == (0, "")
    shown, lines = here / "shown", said.out.splitlines()
    assert max(map(len, lines)) <= 80
    for mark, outcomes in OUTCOMES.items():
        rows = [line for line in lines if mark in line and "/256" in line]
        suspects = (mark, "stranger", f"{mark}-pruned")
        for row, suspect, outcome in zip(rows, suspects, outcomes, strict=True):
            assert outcome.replace("_", " ") in row
            verdict = json.loads((shown / f"{mark}-on-{suspect}.verdict.json").read_text())
            assert (verdict["outcome"], verdict["bits"]) == (outcome, 256)
            options = [] if mark == "uchida" else ["--assume-dated", "--alpha", "1e-4"]
            for path in shown.glob("unmarked-*") if options else ():
                options += ["--unmarked", str(path)]
            again = call(
                "verify", shown / f"{suspect}.safetensors", "--key", shown / f"{mark}.key",
                "--json", *options,
            )  # fmt: skip
            assert again.code == {"owned": 0, "not_proven": 1, "no_verdict": 3}[outcome]
            assert again.json["matched"] == verdict["matched"]
    false_reads = {
        line.split()[0]: int(line.split("false:")[1])
        for line in lines
        if "false:" in line and "others" in line
    }
    assert set(false_reads) == set(OUTCOMES)
    assert false_reads["uchida"] == 0
    assert false_reads["published"] >= 5

    picture = (shown / "demo.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert 600 < width < 4000
    assert 300 < height < 2000
    assert 5_000 < len(picture) < 500_000
    assert not [path for path in shown.iterdir() if path.suffix in {".resume", ".tmp"}]

    before = listing(here)
    again = call("demo", "--out", "shown")
    assert (again.code, again.out) == (2, "")
    assert "shown exists" in again.why
    assert listing(here) == before


def test_a_missing_extra_is_told_before_the_training(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = call("demo", "--out", "shown")
    assert (said.code, said.out) == (2, "")
    assert "countermark[report]" in said.why
    assert listing(here) == {}
