"""The null of the linear mark, simulated on trained hosts that never saw one.

28 hosts (their own seeds, data order and number of epochs), a fresh key and a fresh message for
each pair: the number k of matching bits has to follow Bin(T, 1/2), and nobody may be accused.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from countermark.bench.data import load_data
from countermark.bench.models import build
from countermark.bench.train import seeded
from countermark.key import KeyMaterial
from countermark.nulls import FairCoin
from countermark.schemes.uchida import Uchida
from countermark.stats import least_matches
from countermark.weights import Array, ModuleWeights

HOSTS, KEYS, T = 28, 100, 256
SHAPES = {"0.weight": (64, 784), "2.weight": (10, 64)}

FORMS = {
    "sign": Uchida("2.weight", T),
    "random": Uchida("2.weight", T, key_type="random"),
    "direct": Uchida("2.weight", T, key_type="direct"),
    "diff": Uchida("2.weight", T, key_type="diff"),
    "filter-mean": Uchida("0.weight", T, read="filter_mean", key_type="random"),
}


@pytest.fixture(scope="module")
def hosts() -> list[dict[str, Array]]:
    data = load_data("digits")
    images, labels = data.normalised(data.train_images), data.train_labels
    return [trained(seed, images, labels) for seed in range(HOSTS)]


def trained(seed: int, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Array]:
    """An unmarked host: half of the digits, one to four epochs, in its own order."""
    seeded(seed, "unmarked host")
    model = build("mlp", {})
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(1 + seed % 4):
        for rows in torch.randperm(len(labels))[:3000].split(50):
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    accuracy = (model(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.7, "a null of networks that learnt nothing would prove little"
    weights = ModuleWeights(model)
    return {name: weights.read(name) for name in SHAPES}


def matches(hosts: list[dict[str, Array]], scheme: Uchida, keys: int) -> NDArray[np.int64]:
    """k for each pair of a host and a key of its own, with a message of its own."""
    layer = str(scheme.layer)
    found = []
    for at, host in enumerate(hosts):
        for number in range(keys):
            material = KeyMaterial.for_tests(1000 * at + number)
            key = scheme.generate_key({layer: SHAPES[layer]}, owner="zoo", material=material)
            found.append(scheme.extract(host, key).matched)
    return np.array(found)


def chi_square_p(k: NDArray[np.int64]) -> float:
    """p of the observed k against Bin(T, 1/2), in ten classes of about equal probability."""
    edges = scipy.stats.binom.ppf(np.linspace(0, 1, 11)[1:-1], T, 0.5)
    classes = np.searchsorted(edges, k)
    observed = np.bincount(classes, minlength=10)
    below = scipy.stats.binom.cdf(edges, T, 0.5)
    chances = np.diff(np.concatenate([[0.0], below, [1.0]]))
    return float(scipy.stats.chisquare(observed, chances * len(k)).pvalue)


def check(k: NDArray[np.int64]) -> None:
    assert chi_square_p(k) > 1e-3
    least = least_matches(T, -6)
    assert least is not None
    assert k.max() < least, "an innocent would have been accused"


def test_default_form_on_28_hosts_with_100_keys_each(hosts: list[dict[str, Array]]) -> None:
    check(matches(hosts, FORMS["sign"], KEYS))


@pytest.mark.parametrize("form", ["random", "direct", "diff", "filter-mean"])
def test_published_forms(hosts: list[dict[str, Array]], form: str) -> None:
    check(matches(hosts, FORMS[form], 10))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_100_keys_each(hosts: list[dict[str, Array]], form: str) -> None:
    check(matches(hosts, FORMS[form], KEYS))


def test_an_all_ones_message_would_accuse_the_innocent() -> None:
    """Why the message is drawn: a direct key reads signs, and signs need not be balanced."""
    weights = np.abs(np.random.default_rng(0).normal(size=(10, 64))).astype(np.float32)
    scheme = FORMS["direct"]
    key = scheme.generate_key(
        {"2.weight": (10, 64)}, owner="zoo", material=KeyMaterial.for_tests(1)
    )
    evidence = scheme.extract({"2.weight": weights}, key)
    assert evidence.read.all(), "every bit reads one"
    assert FairCoin().log10_p(evidence) > -6, "and the drawn message still does not match"
