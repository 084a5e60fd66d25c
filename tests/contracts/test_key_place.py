"""The place of a key is looked at before training, and a state goes back to its embedding only."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import countermark as cm
from countermark.embedding import Embedding
from countermark.embedding.integrations import accelerate as accelerate_loop
from countermark.embedding.integrations import hf_trainer
from countermark.embedding.integrations import lightning as lightning_loop
from countermark.embedding.integrations.state_file import STATE_FILE, restore_state, write_state
from countermark.errors import (
    ConfigError,
    CountermarkError,
    KeyFileError,
    LoopError,
    MarkNotTakenError,
)
from countermark.keys.key import KeyMaterial
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.uchida.scheme import Uchida

SCHEME = Uchida("weight", 128)
CONVERGED = Uchida(
    "weight", 128, select="converged", convergence_std=9.0, convergence_epochs=2, start_epoch=2
)


def host() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(32, 32)


def train(mark: Embedding, model: nn.Module, steps: int = 60) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        mark.penalty().backward()
        optimizer.step()
        optimizer.zero_grad()


def interrupt(key: Any, scheme: Any = SCHEME, **more: Any) -> dict[str, Any]:
    """Begin a training and let it fail; its state."""
    states: list[dict[str, Any]] = []

    def begin() -> None:
        with scheme.embed(host(), owner="A", key=key, **more) as mark:
            states.append(mark.state())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    return states[0]


def one_line(error: BaseException) -> str:
    said = str(error)
    assert "\n" not in said
    return said


# --- the place


def test_a_second_run_says_at_once_that_the_key_exists(tmp_path: Path) -> None:
    place, model = tmp_path / "acme.key", host()
    with SCHEME.embed(model, owner="A", key=str(place)) as mark:
        assert not place.exists()
        train(mark, model)
    assert cm.verify(model, str(place)).owned
    assert cm.Key.load(str(place)) == cm.Key.load(place) == mark.key
    assert [each.name for each in tmp_path.iterdir()] == ["acme.key"]
    before = {each: each.read_bytes() for each in place.iterdir()}
    for resume in (False, True):
        with pytest.raises(KeyFileError, match="exists, and a key is never overwritten"):
            SCHEME.embed(host(), owner="A", key=place, resume=resume)
    assert {each: each.read_bytes() for each in place.iterdir()} == before


def test_a_place_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="file is not a folder"):
        SCHEME.embed(host(), owner="A", key=tmp_path / "file" / "acme.key")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(KeyFileError, match="cannot be written to"):
        SCHEME.embed(host(), owner="A", key=tmp_path / "acme.key")


def test_a_mark_that_did_not_take_is_not_saved(tmp_path: Path) -> None:
    with (
        pytest.raises(MarkNotTakenError, match=r"^only \d+ of 128"),
        SCHEME.embed(host(), owner="A", key=tmp_path / "acme.key") as mark,
    ):
        mark.penalty()
    assert [each.name for each in tmp_path.iterdir()] == ["acme.key.unfinished"]


def test_a_call_that_was_forgotten_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(
            MarkNotTakenError, match=r"^penalty\(\) was never called: .*MarkTrainerCallback"
        ),
        SCHEME.embed(host(), owner="A", key=tmp_path / "acme.key"),
    ):
        pass
    with Stamp("weight", 128).embed(host(), owner="A") as mark:
        pass
    with pytest.raises(MarkNotTakenError, match=r"^penalty\(\) was never called"):
        _ = mark.key
    with triggers().embed(nn.Flatten(), owner="A", **covers()) as answers:
        pass
    with pytest.raises(MarkNotTakenError, match=r"mix\(\) was never called"):
        _ = answers.key


def test_an_unfinished_key_is_resumed_or_refused(tmp_path: Path) -> None:
    place = tmp_path / "acme.key"
    state = interrupt(place)
    with pytest.raises(KeyFileError, match="go on with resume=True, or move it away") as caught:
        SCHEME.embed(host(), owner="A", key=place)
    one_line(caught.value)
    for changed, scheme, owner in (
        ("owner", SCHEME, "Mallory"),
        ("fields", Uchida("weight", 64), "A"),
        ("scheme", Stamp("weight", 128), "A"),
    ):
        with pytest.raises(KeyFileError, match=f"was begun with {changed}") as caught:
            scheme.embed(host(), owner=owner, key=place, resume=True)
        one_line(caught.value)
    with pytest.raises(KeyFileError, match="another secret than the material"):
        SCHEME.embed(host(), owner="A", key=place, resume=True, material=KeyMaterial.generate())
    model = host()
    with SCHEME.embed(model, owner="A", key=place, resume=True) as mark:
        mark.restore(state)
        train(mark, model)
    assert mark.key.c0.hex() == state["commitment"]
    with pytest.raises(ConfigError, match="resume=True needs the place"):
        SCHEME.embed(host(), owner="A", resume=True)


def test_resume_begins_anew_where_nothing_is_unfinished(tmp_path: Path) -> None:
    model = host()
    with SCHEME.embed(model, owner="A", key=tmp_path / "acme.key", resume=True) as mark:
        train(mark, model)
    assert (tmp_path / "acme.key").is_dir()


def test_a_passphrase_encrypts_key_and_unfinished_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "acme.key", host()
    place = cm.KeyPlace(path, passphrase="correct horse")
    assert "horse" not in repr(place)
    material = KeyMaterial.generate()
    interrupt(place, material=material)
    for each in tmp_path.rglob("*.*"):
        assert not each.is_file() or material.secret not in each.read_bytes()
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        SCHEME.embed(host(), owner="A", key=cm.KeyPlace(path, "wrong"), resume=True)
    with SCHEME.embed(model, owner="A", key=place, resume=True) as mark:
        train(mark, model)
    assert cm.Key.load(path, "correct horse").material == material
    with pytest.raises(KeyFileError, match="COUNTERMARK_PASSPHRASE_FILE"):
        cm.verify(model, path)
    (tmp_path / "pass").write_text("correct horse\n")
    monkeypatch.setenv("COUNTERMARK_PASSPHRASE_FILE", str(tmp_path / "pass"))
    assert cm.verify(model, path).owned
    with pytest.raises(ConfigError, match="the key is a int"):
        cm.verify(model, 3)  # type: ignore[arg-type]


def test_what_is_frozen_is_kept_until_the_key_is_saved(tmp_path: Path) -> None:
    """Interrupted after its triggers were made, a training ends with these and no others."""
    place, batch = tmp_path / "acme.key", (torch.zeros(4, 1, 8, 8), torch.zeros(4).long())
    mark = triggers().embed(nn.Flatten(), owner="A", key=place, **covers())

    def begin() -> None:
        with mark:
            mark.mix(*batch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    others = covers() | {"covers": 255 - covers()["covers"]}
    with pytest.raises(MarkNotTakenError), triggers().embed(
        nn.Flatten(), owner="A", key=place, resume=True, **others
    ) as again:  # fmt: skip
        again.mix(*batch)
    assert mark.drawn_key is not None
    assert again.drawn_key is not None
    assert mark.drawn_key.c0 == again.drawn_key.c0


def test_another_draw_is_not_taken_in_silence(tmp_path: Path) -> None:
    place = tmp_path / "acme.key"

    def draw(noise: float, state: dict[str, Any] | None) -> None:
        model = host()
        with CONVERGED.embed(model, owner="A", key=place, resume=True) as mark:
            if state is not None:
                mark.restore(state)
            for epoch in range(2):
                with torch.no_grad():
                    model.weight[0, 0] += noise * 99 * epoch
                early.append(mark.state())
                mark.end_epoch()
            raise KeyboardInterrupt

    early: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        draw(0, None)
    with pytest.raises(LoopError, match="the interrupted run drew a key with the commitment"):
        draw(1, None)
    with pytest.raises(KeyboardInterrupt):  # a checkpoint from before the draw was restored
        draw(1, early[0])


# --- states


def triggers() -> Adi:
    return Adi(classes=64, triggers=20)


def covers() -> dict[str, Any]:
    drawn = np.random.default_rng(1)
    return {
        "covers": drawn.integers(0, 256, (40, 1, 8, 8), dtype=np.uint8),
        "labels": drawn.integers(0, 64, 40),
    }


def weights(scheme: Any) -> Callable[[KeyMaterial], Embedding]:
    return lambda material: scheme.embed(host(), owner="A", material=material)  # type: ignore[no-any-return]


def answers(material: KeyMaterial) -> Embedding:
    return triggers().embed(nn.Flatten(), owner="A", material=material, **covers())


def network(material: KeyMaterial) -> Embedding:
    torch.manual_seed(1)
    deep = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    return IndependentNetwork("2.weight", 128).embed(deep, owner="A", material=material)


FORMS: dict[str, Callable[[KeyMaterial], Embedding]] = {
    "uchida": weights(SCHEME),
    "stamp": weights(Stamp("weight", 128)),
    "converged": weights(CONVERGED),
    "network": network,
    "triggers": answers,
}


def begin(mark: Embedding) -> dict[str, Any]:
    """Take steps until there is a key; the state then, as a file gives it back."""
    for _ in range(2):
        mark.penalty()
        mark.mix(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())
        mark.end_epoch()
    saved = io.BytesIO()
    torch.save(mark.state(), saved)
    saved.seek(0)
    loaded: dict[str, Any] = torch.load(saved, weights_only=True)
    return loaded


def fresh_state(mark: Embedding) -> str:
    return repr(copy.deepcopy(mark.state()))


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_the_state_of_another_embedding_changes_nothing(
    make: Callable[[KeyMaterial], Embedding],
) -> None:
    mine, other = KeyMaterial.generate(), KeyMaterial.generate()
    with make(mine) as first:
        state = begin(first)
    assert mine.secret.hex() not in repr(state)
    with make(other) as stranger:
        before = fresh_state(stranger)
        with pytest.raises(LoopError, match="the state is of another embedding") as caught:
            stranger.restore(state)
        one_line(caught.value)
        assert fresh_state(stranger) == before
    damaged = [
        {},
        state | {"more": 1},
        {name: each for name, each in state.items() if name != "frozen"},
        state | {"type": "countermark/state/v2"},
        state | {"fingerprint": "0" * 64},
        state | {"commitment": "0" * 64},
        state | {"training": {"seen": 3}},
        state | {"frozen": 3, "training": 3, "freezer": 3},
    ]
    with make(mine) as again:
        before = fresh_state(again)
        for wrong in damaged:
            with pytest.raises(LoopError) as caught:
                again.restore(wrong)
            one_line(caught.value)
            assert fresh_state(again) == before
        again.restore(state)
        assert again.drawn_key is not None
        assert again.drawn_key.c0.hex() == state["commitment"]
    closed = make(mine)
    with pytest.raises(LoopError, match="inside its block"):
        closed.restore(state)


def test_a_frozen_tensor_that_was_changed_does_not_follow() -> None:
    material = KeyMaterial.generate()
    with answers(material) as mark:
        state = begin(mark)
    state["frozen"]["triggers"][0] ^= 1
    with answers(material) as again, pytest.raises(CountermarkError, match="does not follow"):
        again.restore(state)


def test_a_state_file_is_read_without_unpickling(tmp_path: Path) -> None:
    material = KeyMaterial.generate()
    make = FORMS["network"]
    with make(material) as mark:
        begin(mark)
        write_state(mark, tmp_path)
        with make(material) as again:
            restore_state(again, tmp_path)
            assert fresh_state(again) == fresh_state(mark)
            content = (tmp_path / STATE_FILE).read_bytes()
            assert material.secret not in content
            for wrong in (b"", content[:100], content[:-9], content.replace(b"pairs", b"tuple", 1)):
                (tmp_path / STATE_FILE).write_bytes(wrong)
                with pytest.raises(LoopError) as caught:
                    restore_state(again, tmp_path)
                one_line(caught.value)
            (tmp_path / STATE_FILE).unlink()
            with pytest.raises(LoopError, match="holds no state of the mark"):
                restore_state(again, tmp_path)


def test_only_a_whole_checkpoint_is_the_last_one(tmp_path: Path) -> None:
    assert hf_trainer.last_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 11:
            (tmp_path / f"checkpoint-{step}" / "countermark.safetensors").touch()
    assert hf_trainer.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# --- checkpoints of a training without a mark


def test_trainer_refuses_a_checkpoint_without_a_mark(tmp_path: Path) -> None:
    arguments = SimpleNamespace(
        fp16=False, max_grad_norm=1.0, resume_from_checkpoint=None, output_dir=str(tmp_path)
    )
    with SCHEME.embed(host(), owner="A") as mark:
        callback = hf_trainer.MarkTrainerCallback(mark)
        callback.on_train_begin(arguments, SimpleNamespace(global_step=0))
        with pytest.raises(LoopError, match="checkpoint-5 holds no state of the mark") as caught:
            callback.on_train_begin(arguments, SimpleNamespace(global_step=5))
        one_line(caught.value)
        elsewhere = tmp_path / "elsewhere"
        write_state(mark, elsewhere)
        callback = hf_trainer.MarkTrainerCallback(mark, checkpoint=elsewhere)
        callback.on_train_begin(arguments, SimpleNamespace(global_step=5))


def test_lightning_refuses_a_checkpoint_without_a_mark() -> None:
    trainer: Any = SimpleNamespace(
        global_step=5, state=SimpleNamespace(fn="fit"), precision_plugin=None, optimizers=[None]
    )
    nothing: Any = None
    saved: dict[str, Any] = {}
    with SCHEME.embed(host(), owner="A") as mark:
        callback = lightning_loop.MarkLightningCallback(mark)
        callback.on_load_checkpoint(trainer, nothing, {})
        with pytest.raises(LoopError, match="the checkpoint holds no state of the mark") as caught:
            callback.on_train_start(trainer, nothing)
        one_line(caught.value)
        callback.on_save_checkpoint(trainer, nothing, saved)
        callback.on_load_checkpoint(trainer, nothing, saved)
        callback.on_train_start(trainer, nothing)
    with SCHEME.embed(host(), owner="A") as other:
        callback = lightning_loop.MarkLightningCallback(other)
        with pytest.raises(LoopError, match="another embedding"):
            callback.on_load_checkpoint(trainer, nothing, saved)


def test_accelerate_refuses_a_checkpoint_without_a_mark(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = host()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.save_state(str(tmp_path / "unmarked"))
    with SCHEME.embed(accelerator.unwrap_model(prepared), owner="A") as mark:
        accelerate_loop.attach(mark, optimizer, accelerator)
        with pytest.raises(LoopError, match="unmarked holds no state of the mark"):
            accelerator.load_state(str(tmp_path / "unmarked"))
        accelerator.save_state(str(tmp_path / "marked"))
        accelerator.load_state(str(tmp_path / "marked"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
