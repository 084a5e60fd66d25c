"""`countermark demo`: the whole product in a folder, and what it must show."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
from cli_calls import call, listing

SUSPECTS = (
    ("marked", "owner's model", "owned"),
    ("unmarked", "stranger's model", "not_proven"),
    ("pruned", "copy, 50 % pruned", "owned"),
)


def test_the_demo_shows_a_mark_found_missed_and_found_again(here: Path) -> None:
    said = call("demo", "--out", "shown")
    assert (said.code, said.err) == (0, "")
    rows = [line for line in said.out.splitlines() if "/256" in line]
    shown = here / "shown"
    for row, (name, suspect, outcome) in zip(rows, SUSPECTS, strict=True):
        assert suspect in row
        assert outcome.replace("_", " ") in row
        verdict = json.loads((shown / f"{name}.verdict.json").read_text(encoding="utf-8"))
        assert (verdict["outcome"], verdict["bits"]) == (outcome, 256)
        again = call("verify", shown / f"{name}.safetensors", "--key", shown / "acme.key", "--json")
        assert again.code == (0 if outcome == "owned" else 1)
        assert again.json["matched"] == verdict["matched"]

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
