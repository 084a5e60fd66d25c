"""Readings of a key in models that never saw its mark: false reads, losses, ranks, claims."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, PositiveInt

from countermark._internal.progress import show_progress
from countermark.keys.key import Key
from countermark.results.null_hypotheses import PermutedUnits
from countermark.results.statistics import compute_randomised_sequential_p
from countermark.results.verdict import VerificationOptions
from countermark.schemes import load_weight_scheme
from countermark.training.models import Value, build
from countermark.verification.verify import examine, read_suspect
from countermark_lab.experiments.spec import SpecModel
from countermark_lab.hosts.model_zoo import CACHE, Arrays, HostSpec, sort_fields, train_hosts

DRAWS = 100_000
LEVELS = (1e-2, 1e-4)


class MarkedHost(Protocol):
    """The marked host that suspects resemble, as `experiment.Host` describes one."""

    model: str
    model_arguments: dict[str, Value]
    recipe: dict[str, Any]
    epochs: int
    train: int | None
    unit_pixels: bool


class StartSpec(SpecModel):
    """A checkpoint that others may have, too: a host of `seed` after `epochs` epochs.

    `recipe` changes fields of the default recipe. A field that the marked host changes for itself
    keeps its default here.
    """

    since = frozenset({"recipe"})

    seed: int
    epochs: PositiveInt
    recipe: dict[str, Any] = Field(default={})


class SuspectGroup(SpecModel):
    """A group of unmarked hosts with the architecture of the marked host.

    Attributes:
        kind: "strangers" have initial weights of their own; "twins" start with the initial weights
            of the host. The first twin differs from the host only by the mark (except that it
            learns the labels in fp32, even if the host does not).
        first: seed of the first stranger; twin number n > 0 has the data order of seed `first` + n.
        epochs: the hosts take these numbers in turn.
        train: strangers see this many of the first training images; twins see those of the host.
    """

    since = frozenset({"train"})

    label: str
    data: str
    kind: Literal["strangers", "twins"] = "strangers"
    count: PositiveInt
    first: int
    epochs: tuple[PositiveInt, ...]
    grey28: bool = False
    train: PositiveInt | None = None

    def list_host_specs(
        self, host: MarkedHost, seed: int, start: Path | None
    ) -> Iterator[HostSpec]:
        """Yield the specifications of all hosts, for a marked host of this seed and start."""
        alike = make_unmarked_spec(host, self.data, seed)
        for number in range(self.count):
            lasts = self.epochs[number % len(self.epochs)]
            if self.kind == "strangers":
                yield replace(
                    alike,
                    seed=self.first + number,
                    epochs=lasts,
                    rows=_first_rows(self.train),
                    grey28=self.grey28,
                )
            else:
                yield replace(
                    alike,
                    # The first twin copies epochs and data order of the host itself.
                    epochs=lasts if number else host.epochs,
                    order=self.first + number if number else seed,
                    start=None if start is None else str(start),
                )


def make_unmarked_spec(host: MarkedHost, data: str, seed: int) -> HostSpec:
    """Return the spec of the host without mark, start and teacher, in fp32."""
    return HostSpec(
        data,
        seed,
        epochs=host.epochs,
        rows=_first_rows(host.train),
        unit_pixels=host.unit_pixels,
        model=host.model,
        arguments=sort_fields(host.model_arguments),
        recipe=sort_fields(host.recipe),
    )


def _first_rows(train: int | None) -> tuple[int, int] | None:
    """Return the range of the first `train` training rows; None for all."""
    return None if train is None else (0, train)


def judge_group(
    group: SuspectGroup, hosts: list[HostSpec], key: Key, seed: int,
    supplied: Sequence[torch.nn.Module] = (),
) -> dict[str, Any]:  # fmt: skip
    """Read every host of a group with a key, and judge it at each level.

    Returns: per host the matching bits and, for a learnt reader, its L2 and the randomised p of its
        rank (uniform under the null hypothesis); the number of hosts that give all bits; per level
        the number of ranks that reach it, and the number of claims. A claim is a verdict "owned": a
        dated key whose rank passes the sibling threshold and the supplied unmarked models.
    """
    # Randomising p makes it exactly uniform under the null, although ranks are discrete.
    uniform = np.random.default_rng(seed)
    matched, losses, ps = [], [], []
    reached, claims = dict.fromkeys(map(str, LEVELS), 0), dict.fromkeys(map(str, LEVELS), 0)
    with show_progress(f"{group.label}, hosts", len(hosts)) as advance:
        for spec, arrays in train_hosts(hosts, CACHE):
            model = build_host(spec, arrays)  # its forward pass shows its hidden units
            evidence = read_suspect(model, key)
            matched.append(evidence.match_count)
            if evidence.reader is not None and evidence.cross_entropy is not None:
                losses.append(evidence.cross_entropy)
                p = _compute_rank_p(key, arrays, float(uniform.random()))
                ps.append(p)
                for level in LEVELS:
                    reached[str(level)] += p <= level
            for level in LEVELS:
                # Keys of experiments have no timestamp and come from test seeds; both are allowed
                # here.
                terms = VerificationOptions(level, assume_dated=True, allow_test_key=True)
                claims[str(level)] += examine(model, key, terms, unmarked=supplied).owned
            advance(1)
    return {
        "label": group.label,
        "hosts": len(hosts),
        "bits": evidence.bits,
        "matched": matched,
        "all_bits": sum(each == evidence.bits for each in matched),
        "L2": losses,
        "p": ps,
        "reached": reached,
        "claims": claims,
    }


def build_host(spec: HostSpec, arrays: Arrays) -> torch.nn.Module:
    """Build the host of a spec with the given weights, as a module."""
    model = build(spec.model, dict(spec.arguments))
    model.load_state_dict({name: torch.from_numpy(each) for name, each in arrays.items()})
    return model


def _compute_rank_p(key: Key, arrays: Arrays, uniform: float) -> float:
    """Compute the randomised sequential p of a host among permutations of its hidden units."""
    null = load_weight_scheme(key).nulls({n: arrays[n] for n in key.tensors}, key, DRAWS)
    ranked = null[PermutedUnits.name]
    # The check is for the type checker: the null of this name has no other class.
    if not isinstance(ranked, PermutedUnits):
        raise AssertionError("the null of that name")
    return compute_randomised_sequential_p(*ranked.count_exceedances(), ranked.stop_at, uniform)


def compute_kolmogorov_smirnov(ps: list[float]) -> tuple[float, float]:
    """Compute the Kolmogorov-Smirnov distance of p-values from uniform.

    Returns: the distance, and the distance that 5 % of uniform samples of this size exceed.
    """
    ordered, n = np.sort(ps), len(ps)
    above = np.arange(1, n + 1) / n - ordered
    below = ordered - np.arange(n) / n
    # 1.358 / sqrt(n) is the asymptotic 5 % point of the Kolmogorov distribution.
    return float(max(above.max(), below.max())), 1.358 / math.sqrt(n)
