"""A reference that the key's commitment holds needs nobody's word: undated, exact, and only it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from countermark.alignment import Reference, SuspectWithReference, commit_reference
from countermark.attacks.invariants import Permute, Rescale
from countermark.checkpoints import compute_model_digest, open_weights, save_weights
from countermark.keys.key import REFERENCE, Key, KeyMaterial
from countermark.results.verdict import VerificationOptions
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.uchida.scheme import Uchida
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.verify import examine, verify

WIDE = (40, 96, 80)


def host(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDE[0], WIDE[1]), nn.ReLU(), nn.Linear(WIDE[1], WIDE[2]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDE[2], 10)).eval()


@pytest.fixture(scope="module")
def stamped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Key]:
    """The checkpoint from before the mark, the marked one, and the key of all hidden weights."""
    folder = tmp_path_factory.mktemp("stamped")
    save_weights(host(1).state_dict(), folder / "before.safetensors")
    places = StampPaths(folder / "marked.safetensors", folder / "a.key")
    fields = {"bits": 128, "margin": 3.0, "layer": ["0.weight", "2.weight", "4.weight"]}
    material = replace(KeyMaterial.from_test_seed(1), test_key=False)
    stamp(folder / "before.safetensors", places, owner="ACME", fields=fields, material=material)
    return folder / "before.safetensors", places.out, Key.load(places.key)


def as_module(path: Path) -> nn.Module:
    model = host(0)
    from countermark.checkpoints import load_state

    model.load_state_dict(load_state(path))
    return model


def disguise(model: nn.Module) -> nn.Module:
    return Permute(seed=3).run(Rescale(seed=3).run(model).model).model


def test_a_stamp_commits_to_the_checkpoint_before_it(stamped: tuple[Path, Path, Key]) -> None:
    before, _, key = stamped
    with open_weights(before) as weights:
        digest = compute_model_digest(weights)
    assert key.frozen[REFERENCE].tobytes().hex()[:64] == digest.root
    assert len(key.frozen[REFERENCE]) == 104
    other = replace(key, frozen={**key.frozen, REFERENCE: 255 - key.frozen[REFERENCE]})
    assert other.commitment != key.commitment


def test_a_disguised_copy_is_owned_without_a_date(stamped: tuple[Path, Path, Key]) -> None:
    before, out, key = stamped
    suspect = disguise(as_module(out))
    assert verify(suspect, key).outcome == "not_proven"
    found = verify(SuspectWithReference(suspect, before), key)
    assert found.owned, found.explain()
    assert (found.matched, found.null) == (128, "fair_coin")
    assert found.forgery_bits > 120
    assert found.subject.reference is not None
    assert found.subject.reference.committed is True
    assert found.to_json()["suspect"]["reference"]["committed"] is True
    assert found.reason == "the mark of this key is present"
    assert any("rests on nobody's word" in each for each in found.limits)


def test_another_reference_is_as_strict_as_before(
    stamped: tuple[Path, Path, Key], tmp_path: Path
) -> None:
    """One value changed, or the marked model: then the owner's word is needed, or it is refused."""
    before, out, key = stamped
    suspect = disguise(as_module(out))
    state = as_module(before).state_dict()
    state["0.bias"][0] += 1e-3
    save_weights(state, tmp_path / "changed.safetensors")
    for reference in (tmp_path / "changed.safetensors", out):
        found = verify(SuspectWithReference(suspect, reference), key)
        assert not found.owned
        assert found.subject.reference is not None
        assert not found.subject.reference.committed


def test_other_neurons_are_another_reference(stamped: tuple[Path, Path, Key]) -> None:
    """Whoever names the neurons after the message was drawn could look for those that fit."""
    before, out, key = stamped
    suspect = disguise(as_module(out))
    units = Reference.from_module(as_module(before)).units
    assert units is not None
    chosen = Reference(before, units[:1])
    found = verify(SuspectWithReference(suspect, chosen), key)
    assert not found.owned
    assert found.subject.reference is not None
    assert not found.subject.reference.committed


def test_embedding_commits_to_the_model_as_it_was_given() -> None:
    model = host(2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    material = replace(KeyMaterial.from_test_seed(2), test_key=False)
    scheme = Uchida("2.weight", 128, strength=1.0)
    with scheme.embed(model, owner="ACME", material=material) as mark:
        for _ in range(120):
            optimizer.zero_grad()
            mark.penalty().backward()
            optimizer.step()
    found = verify(SuspectWithReference(disguise(model), before), mark.key)
    assert found.owned, found.explain()
    assert found.forgery_bits > 100
    assert verify(SuspectWithReference(disguise(model), host(3)), mark.key).outcome != "owned"


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "stranger": host,
    "disguised start": lambda _: disguise(host(1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:even a perfect reading")
def test_strangers_aligned_to_it_are_read_like_coins(kind: str) -> None:
    """Matches of 300 keys on suspects that never saw a mark, against Bin(64, 1/2)."""
    from scipy import stats

    start = host(1)
    with open_weights(start) as weights:
        committed = {REFERENCE: commit_reference(weights, Reference.from_module(start).units)}
    scheme = Stamp(("0.weight", "2.weight"), 64)
    shapes = {name: tuple(start.state_dict()[name].shape) for name in scheme.layer}
    suspects = [KINDS[kind](seed) for seed in range(10, 13)]
    matched = []
    for number in range(300):
        material = KeyMaterial.from_test_seed(number)
        key = scheme.generate_key(shapes, owner="x", material=material, frozen=committed)
        suspect = SuspectWithReference(suspects[number % 3], start)
        found = examine(suspect, key, VerificationOptions(allow_test_key=True, assume_dated=True))
        assert not found.owned
        matched.append(found.matched)
    edges = [0, 29, 31, 33, 35, 65]
    expected = np.diff([stats.binom(64, 0.5).cdf(edge - 1) for edge in edges])
    # The better of two readings is judged: compare with the larger of two coins' matches.
    larger = np.diff([stats.binom(64, 0.5).cdf(edge - 1) ** 2 for edge in edges])
    counts = np.histogram(matched, edges)[0]
    assert stats.chisquare(counts, 300 * larger).pvalue > 1e-4, counts
    assert counts[0] < 300 * expected[0]
