"""What holds of every scheme whose mark lives in outputs. A new scheme adds its form to `FORMS`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import barriers
from countermark.errors import ConfigError, LoopError, MarkNotTakenError
from countermark.keys.key import Key, KeyMaterial
from countermark.results.statistics import compute_log10_binomial_tail
from countermark.schemes import load_scheme
from countermark.schemes.outputs import OutputScheme
from countermark.verification.verify import verify

OUTPUT_SCHEMES_UNDER_CONTRACT = ("deep_watermarking",)


@pytest.fixture(scope="module")
def key() -> Key:
    return barriers.key()


def scheme(key: Key) -> OutputScheme:
    found = load_scheme(key)
    assert isinstance(found, OutputScheme)
    return found


def test_the_mark_is_in_marked_images_and_in_no_others(key: Key) -> None:
    marked = scheme(key).mark_outputs(barriers.images(), key)
    chosen = verify(list(marked), key)
    assert chosen.outcome == "no_verdict"
    assert "of many pictures some can be chosen" in chosen.reason
    verdict = verify(list(marked), key, blind_choice=True)
    assert verdict.outcome == "owned", verdict.explain()
    assert verdict.null == "fair_coin"
    verdict = verify(list(barriers.images()), key)
    assert verdict.outcome == "not_proven", verdict.explain()


def test_other_secrets_find_nothing(key: Key) -> None:
    marked = scheme(key).mark_outputs(barriers.images(), key)
    read = scheme(key).extract(list(marked), key).read
    for seed in range(50):
        material = replace(KeyMaterial.from_test_seed(seed), test_key=False)
        other = scheme(key).generate_key(key.frozen, owner=key.owner, material=material)
        agree = int((other.message == read).sum())
        assert compute_log10_binomial_tail(agree, len(read)) > -5


def test_everything_frozen_is_bound_by_the_commitment(key: Key) -> None:
    for name, each in key.frozen.items():
        other = each.copy()
        other.reshape(-1)[0] += 1
        changed = replace(key, frozen={**key.frozen, name: other})
        assert 0.25 < (changed.message == key.message).mean() < 0.75


def test_a_key_survives_its_folder(key: Key, tmp_path: Path) -> None:
    key.save(tmp_path / "acme.key", "correct horse")
    loaded = Key.load(tmp_path / "acme.key", "correct horse")
    marked = list(scheme(key).mark_outputs(barriers.images()[:4], key))
    assert verify(marked, loaded) == verify(marked, key)


def test_an_absorbed_mark_is_as_loud_as_asked(key: Key) -> None:
    """The loss is least at the barrier's image, or as much nearer to the target."""
    targets = torch.from_numpy(barriers.images()[:4]).float() / 255
    with barriers.embedding() as mark:
        mark.restore(barriers.made().state())
        barrier = mark.wrap()(targets)
        for strength in (0.5, 1.0):
            made = torch.lerp(targets, barrier, strength).requires_grad_()
            loss = mark.absorb(made, targets, strength)
            missed = scheme(key).load_networks(key).compute_mark_loss(made)
            torch.testing.assert_close(loss, missed)
            assert mark.absorb(torch.lerp(targets, barrier, 0.2), targets, strength) > loss
        with pytest.raises(ConfigError, match="strength is 0: expected more than 0"):
            mark.absorb(targets, targets, 0)


def test_what_serves_holds_nothing_of_the_key(key: Key) -> None:
    network = nn.Conv2d(1, 1, 1)
    served = scheme(key).wrap(network, key)
    assert set(served.state_dict()) == {f"model.{name}" for name in network.state_dict()}
    with torch.no_grad():
        made = served(torch.rand(2, 1, 32, 32))
    assert made.shape == (2, 1, 32, 32)
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


def test_a_barrier_marks_what_its_network_makes(key: Key) -> None:
    images = torch.from_numpy(barriers.images())
    with torch.no_grad():
        served = scheme(key).wrap(nn.Identity(), key)(images.float() / 255)
    found = (255 * served).round().to(torch.uint8).numpy()
    marked = scheme(key).mark_outputs(barriers.images(), key)
    assert np.abs(found.astype(int) - marked).max() <= 1  # a batch of another size
    assert not np.array_equal(marked, barriers.images())


def test_damaged_networks_are_one_line(key: Key) -> None:
    name = next(iter(key.frozen))
    for wrong in (
        {n: e for n, e in key.frozen.items() if n != name},
        {**key.frozen, name: np.full_like(key.frozen[name], np.nan)},
        {**key.frozen, name: key.frozen[name].astype(np.float64)},
        {**key.frozen, "networks.more": np.zeros(1, dtype=np.float32)},
    ):
        with pytest.raises(ConfigError, match="the key's networks are damaged"):
            load_scheme(replace(key, frozen=wrong))


def test_a_checkpoint_goes_on_with_what_was_trained(key: Key) -> None:
    state = barriers.made().state()
    with barriers.embedding() as again:
        again.restore(state)
        again.wrap()
        assert again.drawn_key == key


def test_the_state_of_another_barrier_changes_nothing() -> None:
    state = barriers.made().state()
    name = next(iter(state["frozen"]))
    with barriers.embedding(KeyMaterial(bytes(32), bytes(16))) as other:
        with pytest.raises(LoopError, match="the state is of another embedding"):
            other.restore(state)
        assert other.drawn_key is None
    with barriers.embedding() as again:
        for wrong in (
            state | {"frozen": {**state["frozen"], name: state["frozen"][name] + 1}},
            state | {"commitment": "0" * 64},
            state | {"frozen": 3},
            {each: state[each] for each in state if each != "learnt"},
        ):
            with pytest.raises(LoopError):
                again.restore(wrong)
            assert again.drawn_key is None


def test_a_barrier_outlives_an_interruption_without_a_checkpoint(tmp_path: Path) -> None:
    place, images = tmp_path / "images.key", barriers.squares().owner

    def begin() -> None:
        with barriers.scheme().embed(
            nn.Identity(), owner="ACME Inc.", outputs=images, key=place, material=barriers.SECRET
        ) as mark:
            mark.restore(barriers.made().state())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    with barriers.scheme().embed(
        nn.Identity(), owner="ACME Inc.", outputs=images, key=place, resume=True
    ) as mark:
        mark.wrap()  # nothing is trained again
    assert Key.load(place) == mark.key == barriers.key()


def test_a_mark_that_was_never_wrapped_has_no_key() -> None:
    with barriers.embedding() as mark:
        assert mark.read() is None
        with pytest.raises(LoopError, match=r"serve mark\.wrap"):
            mark.attach(torch.optim.SGD([torch.zeros(1)], 0.1))
    with pytest.raises(MarkNotTakenError, match="was never called: call served"):
        _ = mark.key
    with pytest.raises(LoopError, match="inside its block"):
        mark.wrap()


def test_a_mark_that_did_not_take_is_no_key() -> None:
    with barriers.embedding(steps=1) as mark:
        mark.wrap()
    with pytest.raises(MarkNotTakenError, match="of 100 bits are read from marked images"):
        _ = mark.key
