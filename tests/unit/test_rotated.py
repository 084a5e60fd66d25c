"""A rotated residual stream is turned back by the committed reference, and by nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from countermark.alignment import SuspectWithReference, commit_reference
from countermark.attacks.invariants import Permute
from countermark.attacks.rotate import Rotate
from countermark.checkpoints import load_state, open_weights, save_weights
from countermark.keys.key import REFERENCE, Key, KeyMaterial
from countermark.results.verdict import VerificationOptions
from countermark.schemes.stamp.scheme import Stamp
from countermark.stamping import stamp
from countermark.stamping.making import StampPaths
from countermark.verification.verify import examine, verify
from tiny_transformers import HEADS, tiny_lm

CONFIGURATION = {
    "gpt": {"n_head": HEADS},
    "llama": {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2},
}


def as_model(name: str, weights: Path) -> torch.nn.Module:
    model = tiny_lm(name)
    model.load_state_dict(load_state(weights))
    return model


def stranger(name: str, seed: int) -> torch.nn.Module:
    """A model of the same form with other weights."""
    model, drawn = tiny_lm(name), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel(), generator=drawn)]
                            .reshape(parameter.shape))  # fmt: skip
    return model


@pytest.fixture(scope="module", params=CONFIGURATION)
def stamped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, Key]:
    """A name, the checkpoint from before the mark, the marked one, and the key."""
    name = request.param
    folder = tmp_path_factory.mktemp(name) / "before"
    folder.mkdir()
    state = tiny_lm(name).state_dict()
    save_weights(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGURATION[name]))
    places = StampPaths(folder.parent / "marked", folder.parent / "a.key")
    layers = [
        n for n, each in state.items() if each.dim() == 2 and not n.startswith(("emb", "wte"))
    ]
    fields = {"bits": 256, "margin": 3.0, "layer": [n for n in layers if "head" not in n]}
    material = replace(KeyMaterial.from_test_seed(4), test_key=False)
    stamp(folder, places, owner="ACME", fields=fields, material=material)
    return name, folder, places.out, Key.load(places.key)


def test_a_rotated_copy_is_owned_without_a_date(stamped: tuple[str, Path, Path, Key]) -> None:
    name, before, out, key = stamped
    rotated = Rotate(seed=1).run(as_model(name, out)).model
    assert not verify(rotated, key).owned
    found = verify(SuspectWithReference(rotated, before), key)
    assert found.owned, found.explain()
    assert found.matched == 256
    also_reordered = Permute(seed=2).run(rotated).model
    found = verify(SuspectWithReference(also_reordered, before), key)
    assert found.owned, found.explain()
    assert found.matched is not None
    assert found.matched >= 250


@pytest.mark.filterwarnings("ignore:even a perfect reading")
def test_rotated_strangers_are_read_like_coins(stamped: tuple[str, Path, Path, Key]) -> None:
    """Matches of 200 keys on rotated models without the mark, the start itself among them."""
    from scipy import stats

    name, before, _, key = stamped
    with open_weights(before) as weights:
        committed = {REFERENCE: commit_reference(weights)}
    scheme = Stamp(tuple(key.tensors), 64)
    start = as_model(name, before / "model.safetensors")
    models = (start, stranger(name, 7), stranger(name, 8))
    suspects = [Rotate(seed=each).run(model).model for each, model in enumerate(models)]
    matched = []
    for number in range(200):
        fresh = scheme.generate_key(
            key.tensors, owner="x", material=KeyMaterial.from_test_seed(number), frozen=committed
        )
        suspect = SuspectWithReference(suspects[number % 3], before)
        found = examine(suspect, fresh, VerificationOptions(allow_test_key=True, assume_dated=True))
        assert not found.owned
        matched.append(found.matched)
    edges = [0, 30, 32, 34, 65]
    # The better of two readings is judged: compare with the larger of two coins' matches.
    larger = np.diff([stats.binom(64, 0.5).cdf(edge - 1) ** 2 for edge in edges])
    counts = np.histogram(matched, edges)[0]
    assert stats.chisquare(counts, 200 * larger).pvalue > 1e-4, counts
