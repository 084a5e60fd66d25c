"""`recipient`: a key, copies and a trace from the command line, and what cannot be right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_calls import call, listing, refused

from checkpoints import one_file, sharded

NEW = ["recipient", "new", "one.safetensors", "--owner", "ACME Inc.", "--key", "new.key"]
# Of a code for one in a thousand, the likeliest copy's chance is some 1e-13; 1e-24 needs no date.
SMALL = ["--count", "8", "--coalition", "1", "--epsilon", "0.001"]


@pytest.fixture
def folder(here: Path) -> Path:
    one_file(here / "one.safetensors")
    assert call(*NEW[:-1], "r.key", *SMALL, "--runs", "2").code == 0
    return here


def test_a_copy_is_traced(folder: Path) -> None:
    made = call(*NEW, *SMALL, "--runs", "5", "--json").json
    assert made["length"] == call("key", "show", "new.key", "--json").json["fields"]["bits"]
    assert set(made["simulated"]) == {"average", "interleave", "majority"}
    assert all(each["runs"] == 5 for each in made["simulated"].values())
    assert all(each["accused"] == 0 for each in made["simulated"].values())
    assert made["simulated"]["average"]["most_accused"] == pytest.approx(0.5218, abs=1e-3)
    before = listing(folder)
    stamped = ["recipient", "stamp", "one.safetensors", "--key", "new.key", "--number", "6"]
    assert call(*stamped, "--out", "six.safetensors").code == 0
    assert set(listing(folder)) - set(before) == {"six.safetensors"}
    trace = ["recipient", "trace", "six.safetensors", "--key", "new.key"]
    undated = call(*trace)
    assert undated.code == 3, "so short a code names nobody undated"
    assert "a dated claim is needed" in undated.out
    assert "limit whoever has the key and the checkpoint can make any" in undated.out
    traced = call(*trace, "--assume-dated", "--json")
    assert traced.code == 0
    assert traced.json["assume_dated"] is True
    assert len(traced.json["limits"]) == 3
    assert [number for number, _ in traced.json["named"]] == [6]
    other = call("recipient", "trace", "six.safetensors", "--key", "r.key")
    assert other.code == 3, "another owner's key"
    assert "cannot tell" in other.out
    assert call("verify", "six.safetensors", "--key", "new.key").code == 2


def test_a_folder_is_stamped_for_a_recipient(folder: Path) -> None:
    sharded(folder / "m")
    assert call("recipient", "new", "m", *NEW[3:], *SMALL, "--runs", "1").code == 0
    for number in ("0", "7"):
        made = ["recipient", "stamp", "m", "--key", "new.key", "--number", number, "--out", number]
        assert call(*made).code == 0
        said = call("recipient", "trace", number, "--key", "new.key")
        assert f"recipient {number}:" in said.out
    shutil.rmtree("0")


STAMP = ["recipient", "stamp", "one.safetensors", "--key", "r.key", "--out", "out"]
REFUSED: list[tuple[list[str], str]] = [
    ([*NEW, "--count", "1"], "1 recipients"),
    ([*NEW, "--count", "3", "--coalition", "4"], "no coalition of more than all"),
    ([*NEW, *SMALL, "--epsilon", "0"], "expected a probability"),
    ([*NEW, *SMALL, "--set", "colour=red"], "no field 'colour'"),
    ([*NEW[:-1], "r.key", *SMALL], "r.key exists"),
    ([*NEW[:4], "", *NEW[5:], *SMALL], "a mark needs an owner"),
    ([*STAMP, "--number", "8"], "expected 0 to 7"),
    ([*STAMP[:-1], "one.safetensors", "--number", "1"], "one.safetensors exists"),
    (["recipient", "trace", "absent", "--key", "r.key"], "absent cannot be read"),
    (["recipient", "trace", "one.safetensors", "--key", "absent"], "cannot be read"),
    (["recipient", "trace", "one.safetensors", "--key", "r.key", "--epsilon", "2"], "--epsilon is"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_recipient_refuses(folder: Path, arguments: list[str], says: str) -> None:
    refused(arguments, says, folder)
