"""Tasks, photographs, surrogates, breaks, and cells of experiments on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import barriers
from countermark.errors import ConfigError, DataError
from countermark.images.image_files import encode_png
from countermark.schemes.deep_watermarking.surrogates import (
    CopyingOptions,
    make_surrogate,
    run_network,
    train_surrogate,
)
from countermark.training import image_squares as pictures
from countermark.training.image_squares import photographs
from countermark.training.image_tasks import spoil_images
from countermark.training.loop import Checkpoint
from countermark_lab.experiments import run as runner
from countermark_lab.experiments.experiment import get_result_path
from countermark_lab.experiments.experiment_types import expand_any_cells, load_any_experiment
from countermark_lab.figures import draw_png, find_figure
from countermark_lab.image_models import cell as imaging
from countermark_lab.image_models.breaks import SPOILS, subtract_shared_pattern
from countermark_lab.tables.pages import render_named_table


@pytest.mark.parametrize("task", ["derain", "denoise", "super_resolution"])
def test_a_task_spoils_alike_for_one_seed(task: Any) -> None:
    images = barriers.squares().owner[:4]
    one, again, other = (spoil_images(images, task, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert one.shape == images.shape
    assert not torch.equal(one, images)
    assert torch.equal(one, other) == (task == "super_resolution")  # which draws nothing


def test_owner_thief_and_test_share_no_picture(tmp_path: Path) -> None:
    scenes = {f"{n}": pictures.draw_scene(n, 64) for n in range(40)}
    parts = [pictures._select_part(scenes, part) for part in ("owner", "thief", "test")]
    kept = [{each.tobytes() for each in part} for part in parts]
    assert [len(each) for each in kept] == [18, 18, 4]
    assert len(set.union(*kept)) == 40
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(encode_png(pictures.draw_scene(number, 80, 3)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = photographs(str(tmp_path), (5, 4, 3), side=32, channels=3)
    assert [len(found.owner), len(found.thief), len(found.test)] == [5, 4, 3]
    assert found.owner.shape[1:] == (3, 32, 32)
    with pytest.raises(DataError, match="expected 10"):
        photographs(str(tmp_path), (5, 4, 3), side=64)


@pytest.mark.parametrize("architecture", ["cnet", "res9", "res16", "unet"])
def test_surrogates_make_images_of_images(architecture: Any) -> None:
    for channels, size in ((1, (32, 32)), (3, (36, 44))):
        network = make_surrogate(architecture, channels, 4)
        assert network(torch.rand(1, channels, *size)).shape == (1, channels, *size)


def features(images: Tensor) -> Tensor:
    return images[..., 1:] - images[..., :-1]


@pytest.mark.parametrize("loss", ["l1", "l2", "perceptual"])
def test_a_surrogate_goes_on_where_it_was(loss: Any, tmp_path: Path) -> None:
    given = spoil_images(barriers.squares().thief, "denoise", 1)
    wanted = barriers.squares().thief
    how = CopyingOptions("cnet", loss, True, steps=4, batch=4, width=4, features=features)

    class Stopped(Checkpoint):
        def due(self) -> bool:
            return True

        def save(self, state: dict[str, Any]) -> None:
            super().save(state)
            if state["step"] == 2:
                raise KeyboardInterrupt

    whole = train_surrogate(given, wanted, how)
    with pytest.raises(KeyboardInterrupt):
        train_surrogate(given, wanted, how, Stopped(tmp_path / "s.pt"))
    again = train_surrogate(given, wanted, how, Checkpoint(tmp_path / "s.pt"))
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_surrogate_learns() -> None:
    given = barriers.squares().thief
    wanted = (given.float() + 20).clamp(0, 255).to(torch.uint8)  # a little lighter
    network = train_surrogate(given, wanted, CopyingOptions("cnet", steps=60, batch=8, width=8))
    before = imaging.compare_images(given, wanted)["psnr"]
    assert imaging.compare_images(run_network(network, given), wanted)["psnr"] > before + 3


@pytest.mark.parametrize("name", SPOILS)
def test_breaks_keep_the_size_and_change_what_is_learnt(name: str) -> None:
    torch.manual_seed(0)
    given, wanted = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    one, other = SPOILS[name](given, wanted)
    assert one.shape == other.shape == given.shape
    assert not torch.allclose(other, wanted)
    assert torch.equal(one, given) == (name != "warp")
    same, alike = SPOILS["warp"](given, given)
    assert torch.equal(same, alike)  # both images of a pair are moved alike


def test_a_constant_picture_is_averaged_out() -> None:
    images = barriers.squares().owner
    picture = 6 * torch.sign(torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0)))
    marked = (images.float() + picture).clamp(0, 255).to(torch.uint8)
    left = (subtract_shared_pattern(marked).float() - images.float()).mean(0)
    added = (marked.float() - images.float()).mean(0)
    assert float((left * picture).mean()) < 0.4 * float((added * picture).mean())


SMALL = """
name = "small"
title = "Small"
track = "a test"
seeds = [1]
siblings = 1
[images]
data = "drawn"
task = "denoise"
owner = 24
thief = 24
test = 8
side = 32
[copies]
steps = 2
batch = 4
[[forms]]
label = "default"
fields = { bits = 16, steps = 2, batch = 4, sizes = "tiny", teachers = ["cnet"], teacher_steps = 2 }
[[forms]]
label = "published"

[forms.fields]
bits = 16
steps = 2
batch = 4
sizes = "tiny"
as_published = true
teachers = ["unet"]
teacher_steps = 2

[[surrogates]]
label = "CNet"
architecture = "cnet"
[[surrogates]]
label = "replaced"
architecture = "cnet"
spoil = "replace"
[[surrogates]]
label = "absorbed"
absorbed = true
strength = 0.7
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


def test_cells_are_computed_once_and_shown(small: Path) -> None:
    experiment, results = load_any_experiment(small), Path("results")
    ended = list(runner.run(experiment, results))
    assert len(ended) == 8
    for each in ended:
        assert each.result is not None, each.failure
        figures = each.result["cell"]["figures"]
        assert {"bits", "wrong", "nc", "nc_blank", "psnr"} <= figures.keys()
        assert ("twin" in figures) == (":" in each.cell.label)
        assert figures["outcome"] != "owned"  # two steps teach nothing
    shown = [each.result["cell"]["figures"]["pictures"] for each in ended if each.result]
    forms = {"default": shown[0], "published": shown[4]}
    draw_png(find_figure("zhang2021/barriers"), forms, Path("barriers.png"))
    draw_png(find_figure("zhang2021/copies"), {"default: CNet": shown[1]}, Path("copies.png"))
    assert Path("barriers.png").stat().st_size > 10_000
    kept = sorted(each.name for each in Path(".cache/images").iterdir())
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*.json")}
    list(runner.run(experiment, results))
    assert {p: p.stat().st_mtime_ns for p in results.rglob("*.json")} == before
    assert sorted(each.name for each in Path(".cache/images").iterdir()) == kept
    assert not [name for name in kept if name.endswith(".pt")]
    table, text = render_named_table("small.toml", results)
    assert len(table["rows"]) == 8
    assert "| published: absorbed |" in text


def test_a_wrong_cell_is_refused_before_anything_is_computed(small: Path) -> None:
    small.write_text(SMALL.replace("bits = 16", "bits = 15", 1))
    with pytest.raises(ConfigError, match="15 bits make no square"):
        list(runner.run(load_any_experiment(small), Path("results")))
    small.write_text(SMALL.replace('"drawn"', '"missing"'))
    with pytest.raises(DataError, match="no data directory"):
        list(runner.run(load_any_experiment(small), Path("results")))
    small.write_text(SMALL.replace("siblings", "sibling"))
    with pytest.raises(ConfigError, match="sibling: Extra inputs"):
        load_any_experiment(small)


def test_cells_of_one_form_share_their_barrier(small: Path) -> None:
    found = list(expand_any_cells(load_any_experiment(small)))
    assert len({get_result_path(each, Path()) for each in found}) == 8
    keys = [imaging.load_barrier_key(each, imaging._load_cell_data(each), []) for each in found[:2]]  # type: ignore[arg-type]
    assert keys[0] == keys[1]
