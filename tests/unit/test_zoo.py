"""Hosts trained many at a time: equal to those of `fit`, cached, resumable, and quicker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from torch import nn

from countermark.checkpoints import save_weights
from countermark.errors import ConfigError, DataError, SuspectError
from countermark.training import loop as train
from countermark.training.data import Dataset, load_data
from countermark.training.loop import Course, accuracy, fit, seed_torch
from countermark.training.models import Recipe, build
from countermark_lab.hosts import model_zoo as zoo
from countermark_lab.hosts.model_zoo import (
    Arrays,
    HostSpec,
    extend_zoo,
    host_path,
    load_host_data,
    sort_fields,
    train_hosts,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
CIFAR10 = SHARED / "uoft-cs" / "cifar10"
BY_50, QUICK = {"recipe": (("batch_size", 50),)}, {"recipe": (("lr", 1e-2),)}
LENET: dict[str, Any] = {"model": "lenet", "arguments": (("width", 0.5),), "rows": (0, 200)}
SHAPES = {"0.weight": (64, 784), "0.bias": (64,), "2.weight": (10, 64), "2.bias": (10,)}


def spec(seed: int, **fields: Any) -> HostSpec:
    """A host of 320 digits and one epoch, where nothing else is said."""
    given: dict[str, Any] = {"data": "digits", "epochs": 1, "rows": (0, 320)}
    return HostSpec(seed=seed, **given | fields)


def trained(specs: Sequence[HostSpec], cache: Path, at_a_time: int = 32) -> list[Arrays]:
    return [host for _, host in train_hosts(specs, cache, at_a_time=at_a_time)]


def fitted(host: HostSpec) -> nn.Module:
    """The host as `fit` trains it, alone."""
    seed_torch(host.seed, "init")
    model = build(host.model, dict(host.arguments))
    course = Course(host.epochs, host.data_order, device="cpu")
    fit(model, load_host_data(host), host.full_recipe, course)
    return model


def distance(one: Arrays, other: Arrays) -> float:
    """The largest difference of two weights in the same place."""
    return max(float(np.abs(one[name] - other[name]).max()) for name in SHAPES)


def arrays(model: nn.Module) -> Arrays:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir()}


def fake_colour(side: int = 32, classes: int = 10) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (80, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.arange(80) % classes
    return Dataset("fake", images[:64], labels[:64], images[64:], labels[64:], classes)


def test_hosts_equal_those_of_fit(tmp_path: Path) -> None:
    """Own seeds, orders and slices, and 1,000 rows, which leave an incomplete batch of 8."""
    specs = [spec(0, rows=(0, 1000)), spec(1, rows=(0, 1000), order=7), spec(2, rows=(500, 1500))]
    for host, weights in train_hosts(specs, tmp_path):
        model, data = fitted(host), load_host_data(host)
        assert {name: array.shape for name, array in weights.items()} == SHAPES
        assert all(array.dtype == np.float32 for array in weights.values())
        assert distance(weights, arrays(model)) <= 1e-4
        assert abs(zoo.measure_test_accuracy(host, weights, data) - accuracy(model, data)) <= 0.002
        assert zoo.measure_test_accuracy(host, weights, data) > 0.7


def test_epochs_batch_size_and_learning_rate_are_those_of_fit(tmp_path: Path) -> None:
    """Nothing of this can be stacked with the others; one call trains all of it, in order."""
    specs = [spec(0), spec(0, epochs=3), spec(0, **BY_50), spec(0, **QUICK), spec(0)]
    found = list(train_hosts(specs, tmp_path))
    assert [host for host, _ in found] == specs
    assert len(files(tmp_path)) == 4, "the first and the last are one host"
    for host, weights in found:
        assert distance(weights, arrays(fitted(host))) <= 1e-4


def test_the_same_specs_give_the_same_bytes(tmp_path: Path) -> None:
    specs = [spec(seed) for seed in range(3)]
    trained(specs, tmp_path / "one")
    torch.manual_seed(99)
    drawn = torch.rand(1)
    torch.manual_seed(99)
    trained(specs, tmp_path / "two")
    assert torch.equal(torch.rand(1), drawn), "the caller's random numbers were disturbed"
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_host_does_not_depend_on_who_is_trained_beside_it(tmp_path: Path) -> None:
    specs = [spec(seed) for seed in range(5)]
    together, alone = tmp_path / "five", tmp_path / "one"
    far = map(distance, trained(specs, together), trained(specs, alone, at_a_time=1))
    assert max(far) <= 1e-5
    if torch.get_num_threads() == 1 and torch.backends.mkl.is_available():
        assert files(together) == files(alone), "other libraries may round a product otherwise"


def test_initial_weights_and_data_order_have_seeds_of_their_own(tmp_path: Path) -> None:
    start, order = spec(1, epochs=0), spec(1, epochs=0, order=2)
    other = spec(2, epochs=0, order=2)
    first, same, unlike = trained([start, order, other], tmp_path)
    assert distance(first, same) == 0, "the order has no part in the initial weights"
    assert distance(same, unlike) > 0.01
    one, two = trained([spec(1), spec(1, order=2)], tmp_path)
    assert distance(one, two) > 1e-4


def test_what_is_cached_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [spec(0), spec(1)]
    before = trained(specs, tmp_path)
    monkeypatch.setattr(zoo, "Stack", None)
    monkeypatch.setattr(zoo, "load_data", None)
    assert max(map(distance, before, trained(specs, tmp_path))) == 0


def test_interrupted_training_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [spec(seed) for seed in range(4)]
    trained(specs, tmp_path / "whole", at_a_time=2)
    cache, save = tmp_path / "cache", safetensors.torch.save_file

    def dying(state: dict[str, torch.Tensor], path: Path) -> None:
        if len([each for each in cache.iterdir() if each.suffix == ".safetensors"]) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", dying)
        with pytest.raises(KeyboardInterrupt):
            train_hosts(specs, cache, at_a_time=2)
    first = files(cache)
    assert set(first) == {host_path(host, cache).name for host in specs[:2]}
    monkeypatch.setattr(zoo, "Stack", spy := Spy(zoo.Stack))
    trained(specs, cache, at_a_time=2)
    assert spy.orders == [2, 3]
    assert files(cache) == files(tmp_path / "whole")


class Spy:
    """Stands for `Stack` and notes the data orders of the hosts."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.orders = real, list[int]()

    def __call__(self, states: Any, parts: Any, orders: Sequence[int], how: Recipe) -> Any:
        self.orders += orders
        return self.real(states, parts, orders, how)


def test_a_damaged_file_of_the_cache_is_refused(tmp_path: Path) -> None:
    trained([spec(0)], tmp_path)
    host_path(spec(0), tmp_path).write_bytes(b"half")
    with pytest.raises(SuspectError):
        trained([spec(0)], tmp_path)


def test_fine_tunes_are_near_their_base(tmp_path: Path) -> None:
    base, stranger = spec(0, epochs=2), spec(1, epochs=2)
    root, far = trained([base, stranger], tmp_path)
    start = str(host_path(base, tmp_path))
    slowly = (("lr", 1e-4),)
    tunes = [spec(seed, rows=(320, 640), start=start, recipe=slowly) for seed in (5, 6)]
    one, two = trained(tunes, tmp_path)
    assert 0 < distance(one, two) < 0.01
    assert 1e-4 < distance(one, root) < 0.1 * distance(far, root)


def test_the_start_enters_the_digest_by_content(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        seed_torch(seed)
        save_weights(build("mlp", {}).state_dict(), path)
    one, same, other = (spec(0, start=str(path)).digest for path in paths)
    assert one == same != other
    with pytest.raises(SuspectError, match=r"gone\.safetensors cannot be read"):
        train_hosts([spec(0, start=str(tmp_path / "gone.safetensors"))], tmp_path)


def test_a_start_of_another_shape_is_refused(tmp_path: Path) -> None:
    start = tmp_path / "wide.safetensors"
    save_weights(build("mlp", {"hidden": 65}).state_dict(), start)
    with pytest.raises(ConfigError, match="does not fit"):
        train_hosts([spec(0, start=str(start))], tmp_path)


def test_digests_tell_hosts_apart_and_stay_as_they_are() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"data": "other"}, {"seed": 1}, {"order": 1}, {"epochs": 2}, {"rows": None},
        {"grey28": True}, QUICK, BY_50, {"unit_pixels": True}, {"model": "lenet"},
        {"model": "lenet", **QUICK}, {"arguments": (("hidden", 32),)},
    ]  # fmt: skip
    digests = [replace(spec(0), **change).digest for change in changes]
    assert len(set(digests)) == len(changes)
    assert spec(0, order=0).digest == spec(0).digest
    assert spec(0, recipe=(("lr", 1e-3), ("optimizer", "adam"))).digest == spec(0).digest


@pytest.mark.parametrize(
    ("host", "digest"),
    [
        (spec(0), "c0351e3a1971c2f0"),
        (HostSpec("digits", 1000, epochs=3), "41c43660ed1fc678"),
        (HostSpec("digits", 7, epochs=4, order=9, rows=(100, 420)), "9bf8caa36a3ab9fc"),
        (
            HostSpec("digits", 3, epochs=2, grey28=True, recipe=(("batch_size", 50), ("lr", 1e-4))),
            "77ebca421880f340",
        ),
        (HostSpec("../shared/data/ylecun/mnist", 1000, epochs=3), "d3a11a5037165833"),
        (
            HostSpec("../shared/data/uoft-cs/cifar10", 2001, epochs=5, grey28=True),
            "4c9a5558b4c5f820",
        ),
    ],
)
def test_digests_of_mlps_are_what_they_were(host: HostSpec, digest: str) -> None:
    """Computed when a host was an MLP and nothing else: another digest orphans every cache."""
    assert host.digest == digest


def test_grey28_is_the_luma_of_the_middle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = fake_colour()
    monkeypatch.setattr(zoo, "load_data", lambda _: fake)
    host = spec(0, data="fake", rows=None, grey28=True)
    data = load_host_data(host)
    assert data.train_images.shape == (64, 1, 28, 28)
    assert data.test_images.shape == (16, 1, 28, 28)
    for grey, colour in zip(data.train_images, fake.train_images, strict=True):
        picture = PIL.Image.fromarray(colour.permute(1, 2, 0).numpy()).convert("L")
        assert np.array_equal(grey[0].numpy(), np.asarray(picture)[2:30, 2:30])
    (weights,) = trained([host], tmp_path)
    assert distance(weights, arrays(fitted(host))) <= 1e-4


def test_grey28_leaves_grey_pictures_as_they_are() -> None:
    digits = load_data("digits")
    assert torch.equal(load_host_data(spec(0, grey28=True)).test_images, digits.test_images)


@pytest.mark.parametrize(
    ("fake", "fields", "message"),
    [
        (fake_colour(), {}, r"expected .*\[1, 28, 28\], got 10 and \[3, 32, 32\]"),
        (fake_colour(side=20), {"grey28": True}, "28 x 28 or more, got 20 x 20"),
        (fake_colour(classes=11), {"grey28": True}, "at most 10 classes .* got 11"),
        (fake_colour(), {"grey28": True, "rows": (0, 65)}, "rows within 0 to 64, got 0 to 65"),
        (fake_colour(), {"grey28": True, "rows": (5, 5)}, "rows within 0 to 64, got 5 to 5"),
        (fake_colour(), {"grey28": True, "rows": (0, 31)}, "at least one batch of 32 .* got 31"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    fake: Dataset,
    fields: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zoo, "load_data", lambda _: fake)
    with pytest.raises(DataError, match=message):
        train_hosts([spec(0, **{"rows": None} | fields)], tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": -1}, "a host needs epochs >= 0, got -1"),
        ({"model": "lennet"}, "unknown model 'lennet': the nearest is 'lenet'"),
        ({"recipe": (("batchsize", 9),)}, "no field 'batchsize': the nearest is 'batch_size'"),
        ({"recipe": (("batch_size", 0),)}, "recipe of mlp: batch_size is 0: .* greater than 0"),
        ({"recipe": (("lr", float("nan")),)}, "recipe of mlp: lr is nan: .* finite number"),
        ({"recipe": (("lr", "quick"),)}, "recipe of mlp: lr is 'quick': .* valid number"),
        ({"recipe": (("optimizer", "adm"),)}, "optimizer is 'adm': .* 'adam' or 'sgd'"),
    ],
)
def test_a_host_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(0, **fields)


def test_any_other_model_is_the_one_that_fit_trains(tmp_path: Path) -> None:
    hosts = [spec(0, **LENET), spec(1), spec(2, model="mlp", arguments=(("hidden", 32),)),
             spec(3, **LENET, unit_pixels=True, recipe=sort_fields({"milestones": [0.5]}))]  # fmt: skip
    for host, weights in train_hosts(hosts, tmp_path):
        expected = arrays(fitted(host))
        assert weights.keys() == expected.keys()
        close = 1e-4 if host.is_stackable else 0
        assert max(float(np.abs(weights[n] - expected[n]).max()) for n in weights) <= close
        data = load_host_data(host)
        assert zoo.measure_test_accuracy(host, weights, data) == pytest.approx(
            accuracy(fitted(host), data), abs=0.002
        )
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * 4


def test_any_other_model_is_trained_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = spec(4, **LENET, epochs=3)
    (whole,) = trained([host], tmp_path / "whole")
    steps, one_step = list[int](), train._Loop.one_step

    def dying(loop: train._Loop) -> None:
        steps.append(loop.epoch)
        if len(steps) == 8:  # three steps an epoch
            raise KeyboardInterrupt
        one_step(loop)

    monkeypatch.setattr(train._Loop, "one_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train_hosts([host], tmp_path)
    assert host_path(host, tmp_path).with_suffix(".pt").exists()
    again = trained([host, host], tmp_path)
    assert steps == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2], "the last epoch was taken up anew"
    trained([host], tmp_path)
    assert len(steps) == 11
    for found in again:
        assert all(np.array_equal(found[name], whole[name]) for name in whole)


def test_fine_tunes_of_any_model_begin_where_their_start_ended(tmp_path: Path) -> None:
    base = spec(0, **LENET)
    (root,) = trained([base], tmp_path)
    start = str(host_path(base, tmp_path))
    (still, moved) = trained([spec(9, **LENET, start=start, epochs=n) for n in (0, 1)], tmp_path)
    assert all(np.array_equal(still[name], root[name]) for name in root)
    assert not np.array_equal(moved["fc3.weight"], root["fc3.weight"])


def test_a_model_that_does_not_take_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lenet does not take images of shape \(1, 28, 28\)"):
        train_hosts([spec(0, model="lenet", arguments=(("channels", 3),))], tmp_path)


def test_a_cache_is_extended_by_what_it_lacks(tmp_path: Path) -> None:
    first = extend_zoo(spec(10), 2, cache=tmp_path)
    assert (first.there, first.trained) == (0, 2)
    more = extend_zoo(spec(10), 3, cache=tmp_path)
    assert (more.there, more.trained) == (2, 1)
    assert more.accuracies[:2] == first.accuracies
    assert all(0.3 < each < 1 for each in more.accuracies)
    assert {host_path(spec(seed), tmp_path) for seed in (10, 11, 12)} == set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="count is 0"):
        extend_zoo(spec(10), 0, cache=tmp_path)


def test_siblings_share_a_base_and_no_data_order(tmp_path: Path) -> None:
    base = spec(5, epochs=4)
    done = extend_zoo(spec(10), 2, cache=tmp_path, base=base)
    assert (done.there, done.trained) == (0, 2)
    start = str(host_path(base, tmp_path))
    root, one, two, stranger = trained(
        [base, spec(10, start=start), spec(11, start=start), spec(10)], tmp_path / "."
    )
    assert 0 < distance(one, two) < distance(one, stranger)
    assert distance(one, root) < distance(one, stranger)
    assert len(files(tmp_path)) == 4, "the siblings were those that `extend` had trained"


def test_what_cannot_be_extended_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data directory"):
        extend_zoo(spec(0, data="nowhere"), 2, cache=tmp_path / "hosts")
    with pytest.raises(ConfigError, match="it takes"):
        extend_zoo(spec(0, model="lenet", arguments=(("depth", 3),)), 2, cache=tmp_path / "hosts")
    assert not list(tmp_path.iterdir())


def test_none_at_a_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at_a_time must be at least 1, got 0"):
        train_hosts([spec(0)], tmp_path, at_a_time=0)


def test_many_at_a_time_take_less_than_one_by_one(tmp_path: Path) -> None:
    """Nearly three times less (docs/performance.md); only a part of that is asked for here."""
    specs = [spec(seed, rows=(0, 1000)) for seed in range(32)]
    fitted(specs[0])  # what is paid once is not compared
    began = time.process_time()
    for host in specs[:4]:
        fitted(host)
    alone = (time.process_time() - began) / 4
    began = time.process_time()
    trained(specs, tmp_path)
    together = (time.process_time() - began) / 32
    assert alone / together >= 1.2


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"needs CIFAR-10 in {CIFAR10}")
def test_cifar10_in_grey_trains_the_same_mlp(tmp_path: Path) -> None:
    rows = [(0, 20000), (10000, 30000)]
    specs = [spec(at, data=str(CIFAR10), grey28=True, rows=each) for at, each in enumerate(rows)]
    hosts = trained(specs, tmp_path)
    data = load_host_data(specs[0])
    assert data.train_images.shape == (20000, 1, 28, 28)
    assert min(map(zoo.measure_test_accuracy, specs, hosts, [data] * 2)) > 0.25
