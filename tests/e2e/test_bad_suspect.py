"""Suspects, keys and names that cannot be right: exit 2, one line, nothing written or executed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import call, embed, refused

OTHERS: list[tuple[str, str]] = [
    ("verify m.safetensors", "give either --key DIR, or --opened FILE"),
    ("verify --key acme.key", "Missing argument"),
    ("verify absent --key acme.key", "absent cannot be read"),
    ("verify acme.key --key acme.key", "acme.key cannot be read"),
    ("verify empty --key acme.key", "empty is an empty file"),
    ("verify cut.safetensors --key acme.key", "cut.safetensors is damaged"),
    ("verify stub.safetensors --key acme.key", "stub.safetensors is damaged"),
    ("verify nan.safetensors --key acme.key", "2.weight holds 1 values that are not finite"),
    ("verify m.safetensors --key absent", "expected a key folder"),
    ("verify m.safetensors --key m.safetensors", "expected a key folder"),
    ("verify m.safetensors --key acme.key --alpha 0", "--alpha is 0.0"),
    ("verify m.safetensors --key acme.key --alpha 1", "--alpha is 1.0"),
    ("verify m.safetensors --key acme.key --alpha -1", "--alpha is -1.0"),
    ("verify m.safetensors --key acme.key --alpha nan", "--alpha is nan"),
    ("verify m.safetensors --key acme.key --alpha half", "'--alpha'"),
    ("verify m.safetensors --key acme.key --null coin", "uchida has no null 'coin'"),
    ("verify m.safetensors --key acme.key --nul coin", "No such option"),
    ("key show absent", "expected a key folder"),
    ("schemes uchda", "nearest is 'uchida'"),
    ("attack run prun m.safetensors --out p", "nearest is 'prune'"),
    ("attack run prune m.safetensors --out p --set fractoin=1", "nearest is 'fraction'"),
    ("attack run prune m.safetensors --out p --set fraction", "expected NAME=VALUE"),
    ("attack run prune m.safetensors --out p --set fraction=2", "field fraction is 2"),
    ('attack run prune m.safetensors --out p --set layers=["0.wieght"]', "nearest is '0.weight'"),
    ("attack run prune m.safetensors --out m.safetensors", "m.safetensors exists"),
    ("attack run prune m.safetensors", "Missing option '--out'"),
    ("attack run prune absent --out p", "absent cannot be read"),
    ("attack run prune cut.safetensors --out p", "cut.safetensors is damaged"),
    ("demo --out acme.key", "acme.key exists"),
    (
        "verfiy m.safetensors --key acme.key",
        "there is no command 'verfiy': the nearest is 'verify'",
    ),
]


@pytest.mark.parametrize(("line", "says"), OTHERS, ids=[line for line, _ in OTHERS])
def test_the_other_commands_refuse(stocked: Path, line: str, says: str) -> None:
    refused(line.split(" "), says, stocked)


def test_a_group_without_a_command_shows_its_help() -> None:
    for arguments, heading in (
        ([], "Evidence:"),
        (["key"], "Commands:"),
        (["attack"], "Commands:"),
    ):
        said = call(*arguments)
        assert (said.code, said.out) == (2, "")
        assert heading in said.err


def owner_changed(header: dict[str, Any]) -> None:
    header["owner"] = "Mallory"


def field_added(header: dict[str, Any]) -> None:
    header["surprise"] = 1


def bits_changed(header: dict[str, Any]) -> None:
    header["fields"]["bits"] = 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (owner_changed, "the commitment C0 does not follow"),
        (bits_changed, "the commitment C0 does not follow"),
        (field_added, "surprise"),
    ],
)
def test_a_forged_key_is_refused(
    stocked: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    path = stocked / "acme.key" / "key.json"
    header = json.loads(path.read_text(encoding="utf-8"))
    change(header)
    path.write_text(json.dumps(header), encoding="utf-8")
    refused(["verify", "m.safetensors", "--key", "acme.key"], says, stocked)


@pytest.mark.parametrize("name", ["key.safetensors", "key.json"])
@pytest.mark.parametrize("left", [0, 100])
def test_a_truncated_key_is_refused(stocked: Path, name: str, left: int) -> None:
    path = stocked / "acme.key" / name
    path.write_bytes(path.read_bytes()[:left])
    refused(["verify", "m.safetensors", "--key", "acme.key"], name, stocked)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("packed", [True, False], ids=["in a torch file", "a bare pickle"])
@pytest.mark.parametrize(
    "command", ["verify BOMB --key acme.key", "attack run prune BOMB --out p", "START"]
)
def test_nothing_in_a_suspect_is_executed(stocked: Path, packed: bool, command: str) -> None:
    canary = stocked / "canary"
    if packed:
        torch.save({"2.weight": Bomb(canary)}, "bomb.pt")
    else:
        (stocked / "bomb.pt").write_bytes(pickle.dumps({"2.weight": Bomb(canary)}))
    usual = command.replace("BOMB", "bomb.pt").split(" ")
    refused(embed(start="bomb.pt") if command == "START" else usual, "bomb.pt", stocked)
    assert not canary.exists()
