"""`embed` killed at any moment and started again ends where it would have ended undisturbed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import call, embed, listing
from killing import Driver
from safetensors.numpy import load_file

MOMENTS = {
    "the resume folder is there": "embed.fit = kill",
    "in the middle of an epoch": (
        "train._CHECKPOINT_SECONDS = -1.0; after(train.Checkpoint, 'save', 20)"
    ),
    "after an epoch": "after(train.Checkpoint, 'save', 1)",
    "before the model is written": "embed.save_weights = kill",
    "after the model is written": "after(embed, 'save_weights', 1)",
    "after the key is written": "after(Key, 'save', 1)",
    "before tidying up": "embed.remove_resume_folder = kill",
}
USUAL = embed(test_key="7", epochs="2")
CONVERGED = embed(
    test_key="7",
    epochs="6",
    bits="128",
    set=["select=converged", "start_epoch=5", "convergence_std=0.01"],
)


pytestmark = pytest.mark.xdist_group("resume")  # its undisturbed runs are made once


Ends = Callable[[list[str]], dict[str, str]]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    """What an `embed` that nobody disturbs leaves in its folder; each one is run once."""
    known: dict[str, dict[str, str]] = {}

    def ends(arguments: list[str]) -> dict[str, str]:
        name = json.dumps(arguments)
        if name not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                assert call(*arguments).code == 0
            known[name] = listing(folder)
        return known[name]

    return ends


def material(folder: Path) -> tuple[bytes, str]:
    """Secret and nonce that an interrupted run keeps."""
    content = (folder / "new.safetensors.resume" / "material").read_bytes()
    return content[:32], content[32:].hex()


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_killed_and_started_again(
    here: Path, driver: Driver, undisturbed: Ends, moment: str
) -> None:
    driver.killed(moment, USUAL, here)
    assert (here / "new.safetensors.resume").is_dir()
    said = call(*USUAL)
    assert said.code == 0, said
    assert listing(here) == undisturbed(USUAL)


def test_the_frozen_mask_and_its_history_survive(
    here: Path, driver: Driver, undisturbed: Ends
) -> None:
    for _ in range(2):  # before the weights are selected, and after
        driver.killed("after(train.Checkpoint, 'save', 3)", CONVERGED, here)
    assert call(*CONVERGED).code == 0
    assert listing(here) == undisturbed(CONVERGED)
    mask = load_file("new.key/key.safetensors")["frozen.mask.2.weight"]
    assert 64 <= mask.sum() < mask.size


def test_a_run_killed_while_it_tidied_up_was_over(
    here: Path, driver: Driver, undisturbed: Ends
) -> None:
    """The secret is gone first; what is left is known as the remains of a finished run."""
    driver.killed("before_unlinking('order.json')", USUAL, here)
    assert [path.name for path in (here / "new.safetensors.resume").iterdir()] == ["order.json"]
    said = call(*USUAL)
    assert said.code == 2
    assert "new.safetensors exists" in said.why
    assert listing(here) == undisturbed(USUAL)


def test_an_interrupted_run_keeps_its_secret_to_its_owner(here: Path, driver: Driver) -> None:
    arguments = embed(epochs="2")
    resume = here / "new.safetensors.resume"
    process = driver.start("after(train.Checkpoint, 'save', 1, sleep)", arguments, here)
    assert driver.said() == "asleep"
    assert resume.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in resume.iterdir()}
    assert modes.keys() == {"order.json", "material", "checkpoint.pt"}
    assert modes["material"] == modes["order.json"] == 0o600
    os.kill(process, signal.SIGINT)
    assert int(driver.said()) == 2
    assert [path.name for path in here.iterdir()] == [resume.name]

    secret, nonce = material(here)
    before = listing(here)
    for changed, name in (
        ({"epochs": "3"}, "epochs"),
        ({"owner": "Mallory"}, "owner"),
        ({"bits": "128"}, "fields"),
        ({"test_key": "7"}, "test_key"),
    ):
        said = call(*embed(**{"epochs": "2", **changed}))
        assert said.code == 2
        assert f"with other arguments ({name})" in said.why
    assert listing(here) == before

    assert call(*arguments).code == 0
    assert not resume.exists()
    assert call("key", "show", "new.key", "--json").json["nonce"] == nonce
    assert load_file("new.key/key.safetensors")["secret"].tobytes() == secret
    assert call("verify", "new.safetensors", "--key", "new.key").code == 0


def test_a_key_that_came_in_the_way_does_not_cost_the_training(here: Path, driver: Driver) -> None:
    driver.killed("after(train.Checkpoint, 'save', 2)", embed(epochs="2"), here)
    (here / "new.key").mkdir()
    assert call(*embed(epochs="2")).code == 2
    (here / "new.key").rmdir()
    (here / "new.safetensors").write_bytes(b"somebody else's")
    assert "new.safetensors exists" in call(*embed(epochs="2")).why
    assert (here / "new.safetensors").read_bytes() == b"somebody else's"
    (here / "new.safetensors").unlink()
    _, nonce = material(here)
    assert call(*embed(epochs="2")).code == 0
    assert call("key", "show", "new.key", "--json").json["nonce"] == nonce


def test_an_unmarked_run_goes_on_as_well(here: Path, driver: Driver, undisturbed: Ends) -> None:
    unmarked = embed(scheme="none", key=None, owner=None, layer=None, bits=None, epochs="2")
    driver.killed("after(train.Checkpoint, 'save', 1)", unmarked, here)
    assert call(*unmarked).code == 0
    assert listing(here) == undisturbed(unmarked)


def test_a_test_key_is_never_owned(here: Path) -> None:
    assert call(*embed(test_key="7", json="")).json["test_key"] is True
    said = call("verify", "new.safetensors", "--key", "new.key", "--assume-dated", "--json")
    assert said.code == 3
    assert said.json["outcome"] == "no_verdict"
    assert "this is a test key" in said.json["reason"]
    assert said.json["matched"] > 200
    assert "test-key" not in call("embed", "--help").out
