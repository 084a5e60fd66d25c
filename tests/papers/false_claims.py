"""Fresh keys against suspects that never saw their marks: how often they match, who is claimed.

Each pair of a key and a suspect has a key of its own. Given what a suspect answers, labels and
messages of different secrets are independent; hence so are the pairs, whatever the suspects share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from countermark.keys.key import Key, KeyMaterial
from countermark.predictors.base import Predictor
from countermark.results.statistics import (
    compute_log10_binomial_tail,
    compute_randomised_p,
    find_least_matches,
)
from countermark.results.verdict import VerificationOptions
from countermark.schemes.triggers import TRIGGERS, TriggerScheme
from countermark.training.build_embedding import make_scheme
from countermark.training.data import Dataset
from countermark.verification.verify import examine

Keys = Callable[[int], Key]
"""Makes the key of that number."""

Frozen = Mapping[str, NDArray[Any]]
"""What a key holds before its labels are drawn."""

FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "adi": ("adi", {}),
    "zhang content": ("zhang", {"kind": "content"}),
    "zhang noise": ("zhang", {"kind": "noise"}),
    "zhang unrelated": ("zhang", {"kind": "unrelated"}),
    "guo": ("guo", {}),
    "deepstego": ("deepstego", {"stego_steps": 10, "foreign": 0, "pool": 8}),
}
_COVERS = 1000


@dataclass(frozen=True)
class Pairs:
    """k, how many of n matched, for independent pairs whose null is k ~ Bin(n, p)."""

    k: NDArray[np.int64]
    n: int
    p: float

    def claims(self, alpha: float) -> int:
        """How many pairs have a tail of at most alpha."""
        least = find_least_matches(self.n, math.log10(alpha), self.p)
        assert least is not None
        return int((self.k >= least).sum())

    def chi_square_p(self) -> float:
        """p of the observed k, in about ten classes that are as equally probable as k allows."""
        quantiles = np.linspace(0, 1, 11)[1:-1]
        edges = np.unique(scipy.stats.binom.ppf(quantiles, self.n, self.p))
        below = scipy.stats.binom.cdf(edges, self.n, self.p)
        chances = np.diff(np.concatenate([[0.0], below, [1.0]]))
        observed = np.bincount(np.searchsorted(edges, self.k), minlength=len(chances))
        return float(scipy.stats.chisquare(observed, chances * len(self.k)).pvalue)

    def uniforms(self, drawn: np.random.Generator) -> list[float]:
        """Each pair's p-value, randomised over the atoms: uniform, whatever n and p are."""
        spread = drawn.random(len(self.k))
        return [
            compute_randomised_p(int(k), self.n, u, self.p)
            for k, u in zip(self.k, spread, strict=True)
        ]


def check(*groups: Pairs) -> None:
    """The claims of all groups are within 99 % of what each alpha allows, k is as it should be."""
    pairs = sum(len(each.k) for each in groups)
    for alpha in (1e-2, 1e-6):
        claimed = sum(each.claims(alpha) for each in groups)
        assert claimed <= scipy.stats.binom(pairs, alpha).ppf(0.99), (alpha, claimed, pairs)
    for each in groups:
        assert each.chi_square_p() > 1e-4
    drawn = np.random.default_rng(0)
    uniforms = [p for each in groups for p in each.uniforms(drawn)]
    assert scipy.stats.kstest(uniforms, "uniform").pvalue > 1e-3


def trained(model: nn.Module, data: Dataset, *, epochs: int, seed: int, least: float) -> nn.Module:
    """An unmarked model: half of the images in its own order, better than `least` on a thousand."""
    images, labels = data.normalised(data.train_images), data.train_labels
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order)[: len(labels) // 2].split(50):
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        accuracy = (model(images[:1000]).argmax(1) == labels[:1000]).float().mean()
    assert accuracy > least, "a null of networks that learnt nothing would prove little"
    return model


# --- marks in answers


def form(name: str, data: Dataset) -> TriggerScheme:
    scheme, fields = FORMS[name]
    made = make_scheme(scheme, fields, data, batches=1)
    assert isinstance(made, TriggerScheme)
    return made


def keys_of(scheme: TriggerScheme, data: Dataset) -> Keys:
    """Keys as an embedding makes them, each with a secret, triggers and labels of its own."""
    covers, labels = data.train_images[:_COVERS], data.train_labels[:_COVERS]
    row = data.normalised(covers[:1])

    def key(number: int) -> Key:
        material = KeyMaterial.from_test_seed(number)
        with scheme.embed(
            nn.Identity(), owner="zoo", covers=covers, labels=labels, material=material
        ) as mark:
            mark.mix(row, labels[:1])
            assert mark.drawn_key is not None
            return mark.drawn_key

    return key


def stego_frozen(scheme: TriggerScheme, data: Dataset, made: int) -> Frozen:
    """One stego network with its logo and tile, and so many triggers that it made."""
    return keys_of(replace(scheme, triggers=made), data)(0).frozen


def stego_keys(scheme: TriggerScheme, shared: Frozen) -> Keys:
    """Keys that share what takes long to make, a stego network with its logo and tile.

    Each key has a secret and a nonce of its own; which of the network's triggers it holds and all
    its labels follow from them.
    """

    def key(number: int) -> Key:
        material = KeyMaterial.from_test_seed(number)
        made = len(shared[TRIGGERS])
        chosen = material.make_stream("covers").draw_permutation(made)[: scheme.triggers]
        frozen = {**shared, TRIGGERS: shared[TRIGGERS][chosen]}
        return scheme.generate_key(frozen, owner="zoo", material=material)

    return key


def asked(keys: Keys, suspects: Sequence[Predictor], pairs: int, first: int = 0) -> Pairs:
    """Let a fresh key of each number from `first` on judge one of the suspects, in turn."""
    terms = VerificationOptions(1e-2, assume_dated=True, allow_test_key=True)
    found = []
    for number in range(first, first + pairs):
        key = keys(number)
        verdict = examine(suspects[number % len(suspects)], key, terms)
        n, p = verdict.bits, 1 / int(key.fields["classes"])
        tail = compute_log10_binomial_tail(verdict.matched or 0, n, p)
        assert verdict.log10_p == tail
        assert verdict.outcome == ("owned" if tail <= -2 else "not_proven")
        found.append(verdict.matched)
    return Pairs(np.array(found), n, p)
