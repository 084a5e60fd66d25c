"""The null of the linear mark, simulated on trained hosts that never saw one.

28 hosts (their own seeds, data order and number of epochs), a fresh key and a fresh message for
each pair: the number k of matching bits has to follow Bin(T, 1/2), and nobody may be accused.
"""

from __future__ import annotations

import numpy as np
import pytest
from false_claims import Pairs, check, trained
from torch import nn

from countermark.checkpoints import Array, ModuleWeights
from countermark.keys.key import KeyMaterial
from countermark.results.null_hypotheses import FairCoin
from countermark.schemes.hash_filter.scheme import HashFilter
from countermark.schemes.stamp.scheme import Stamp
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.weights import WeightScheme
from countermark.training.data import load_data
from countermark.training.loop import seed_torch
from countermark.training.models import build

HOSTS, KEYS, T = 28, 100, 256
SHAPES = {"0.weight": (64, 784), "2.weight": (10, 64)}

FORMS: dict[str, WeightScheme] = {
    "sign": Uchida("2.weight", T),
    "random": Uchida("2.weight", T, key_type="random"),
    "direct": Uchida("2.weight", T, key_type="direct"),
    "diff": Uchida("2.weight", T, key_type="diff"),
    "filter-mean": Uchida("0.weight", T, read="filter_mean", key_type="random"),
    "hash-filter": HashFilter("0.weight", T, rounds=4),
    "stamp": Stamp(("0.weight", "2.weight"), T),
    "stamp-parts": Stamp(("0.weight", "2.weight"), T, values=500),
}


@pytest.fixture(scope="module")
def hosts() -> list[dict[str, Array]]:
    data, found = load_data("digits"), []
    for seed in range(HOSTS):
        seed_torch(seed, "unmarked host")
        model = build("mlp", {})
        found.append(tensors(trained(model, data, epochs=1 + seed % 4, seed=seed, least=0.7)))
    return found


def tensors(model: nn.Module) -> dict[str, Array]:
    weights = ModuleWeights(model)
    return {name: weights.read(name) for name in SHAPES}


def read(hosts: list[dict[str, Array]], scheme: WeightScheme, keys: int) -> Pairs:
    """Each pair of a host and a key of its own, with a message of its own."""
    tensors, found = scheme.choose_tensors(SHAPES), []
    for at, host in enumerate(hosts):
        for number in range(keys):
            material = KeyMaterial.from_test_seed(1000 * at + number)
            key = scheme.generate_key(tensors, owner="zoo", material=material)
            found.append(scheme.extract(host, key).match_count)
    return Pairs(np.array(found), T, 0.5)


def test_default_form_on_28_hosts_with_100_keys_each(hosts: list[dict[str, Array]]) -> None:
    check(read(hosts, FORMS["sign"], KEYS))


@pytest.mark.parametrize(
    "form", ["random", "direct", "diff", "filter-mean", "hash-filter", "stamp", "stamp-parts"]
)
def test_other_forms(hosts: list[dict[str, Array]], form: str) -> None:
    check(read(hosts, FORMS[form], 10))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_100_keys_each(hosts: list[dict[str, Array]], form: str) -> None:
    check(read(hosts, FORMS[form], KEYS))


def test_an_all_ones_message_would_accuse_the_innocent() -> None:
    """Why the message is drawn: a direct key reads signs, and signs need not be balanced."""
    weights = np.abs(np.random.default_rng(0).normal(size=(10, 64))).astype(np.float32)
    scheme = FORMS["direct"]
    key = scheme.generate_key(
        {"2.weight": (10, 64)}, owner="zoo", material=KeyMaterial.from_test_seed(1)
    )
    evidence = scheme.extract({"2.weight": weights}, key)
    assert evidence.read.all(), "every bit reads one"
    assert FairCoin().compute_log10_p(evidence) > -6, "and the drawn message still does not match"
