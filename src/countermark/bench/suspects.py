"""How a key fares on models that never saw its mark: false reads, losses, ranks, claims."""

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
from countermark.bench.models import Value, build
from countermark.bench.strict import Strict
from countermark.bench.zoo import CACHE, Arrays, HostSpec, pairs, train_hosts
from countermark.keys.key import Key
from countermark.results.null_hypotheses import PermutedUnits
from countermark.results.statistics import compute_randomised_sequential_p
from countermark.results.verdict import VerificationOptions
from countermark.schemes import load_weight_scheme
from countermark.verification.verify import examine, read_suspect

DRAWS = 100_000
LEVELS = (1e-2, 1e-4)


class Host(Protocol):
    """The marked host that suspects are to be like; `experiment.Host` is one."""

    model: str
    model_arguments: dict[str, Value]
    recipe: dict[str, Any]
    epochs: int
    train: int | None
    unit_pixels: bool


class Base(Strict):
    """A checkpoint that others may have, too: a host of `seed` after `epochs`.

    `recipe` changes fields of its recipe; those that the marked host changes are not changed here.
    """

    since = frozenset({"recipe"})

    seed: int
    epochs: PositiveInt
    recipe: dict[str, Any] = Field(default={})


class Suspects(Strict):
    """A group of unmarked hosts, models of the marked host's kind.

    Attributes:
        kind: "strangers" have initial weights of their own; "twins" start where the host started,
            the first one differing from it in nothing but the mark (it learns the labels in fp32,
            though, whatever the host does).
        first: seed of the first stranger, or of the first twin's data order but one.
        epochs: taken in turn.
        train: strangers see the first so many training images; twins see those of the host.
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

    def specs(self, host: Host, seed: int, start: Path | None) -> Iterator[HostSpec]:
        """The hosts, for a marked host of this seed and start."""
        alike = unmarked(host, self.data, seed)
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
                    epochs=lasts if number else host.epochs,
                    order=self.first + number if number else seed,
                    start=None if start is None else str(start),
                )


def unmarked(host: Host, data: str, seed: int) -> HostSpec:
    """The host as it would have been without a mark, a start and a teacher, in fp32."""
    return HostSpec(
        data,
        seed,
        epochs=host.epochs,
        rows=_first_rows(host.train),
        unit_pixels=host.unit_pixels,
        model=host.model,
        arguments=pairs(host.model_arguments),
        recipe=pairs(host.recipe),
    )


def _first_rows(train: int | None) -> tuple[int, int] | None:
    return None if train is None else (0, train)


def judged(
    group: Suspects, hosts: list[HostSpec], key: Key, seed: int,
    supplied: Sequence[torch.nn.Module] = (),
) -> dict[str, Any]:  # fmt: skip
    """Read every host of a group.

    Returns: per host the matching bits and, for a learnt reader, its L2 and the randomised p of its
        rank (uniform where the null holds); how many hosts give all bits; how many ranks reach each
        level, and how many claims there are, a claim being a rank that the sibling threshold and
        the supplied unmarked models let pass, dated.
    """
    uniform = np.random.default_rng(seed)
    matched, losses, ps = [], [], []
    reached, claims = dict.fromkeys(map(str, LEVELS), 0), dict.fromkeys(map(str, LEVELS), 0)
    with show_progress(f"{group.label}, hosts", len(hosts)) as advance:
        for spec, arrays in train_hosts(hosts, CACHE):
            model = live(spec, arrays)  # whose forward shows what its hidden units are
            evidence = read_suspect(model, key)
            matched.append(evidence.match_count)
            if evidence.reader is not None and evidence.cross_entropy is not None:
                losses.append(evidence.cross_entropy)
                p = _rank(key, arrays, float(uniform.random()))
                ps.append(p)
                for level in LEVELS:
                    reached[str(level)] += p <= level
            for level in LEVELS:
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


def live(spec: HostSpec, arrays: Arrays) -> torch.nn.Module:
    """A host that can be asked."""
    model = build(spec.model, dict(spec.arguments))
    model.load_state_dict({name: torch.from_numpy(each) for name, each in arrays.items()})
    return model


def _rank(key: Key, arrays: Arrays, uniform: float) -> float:
    null = load_weight_scheme(key).nulls({n: arrays[n] for n in key.tensors}, key, DRAWS)
    ranked = null[PermutedUnits.name]
    if not isinstance(ranked, PermutedUnits):
        raise AssertionError("the null of that name")
    return compute_randomised_sequential_p(*ranked.count_exceedances(), ranked.stop_at, uniform)


def kolmogorov_smirnov(ps: list[float]) -> tuple[float, float]:
    """The distance of p-values from uniform, and what 5 % of uniform samples exceed."""
    ordered, n = np.sort(ps), len(ps)
    above = np.arange(1, n + 1) / n - ordered
    below = ordered - np.arange(n) / n
    return float(max(above.max(), below.max())), 1.358 / math.sqrt(n)
