"""From a suspect and a key to a verdict: find the tensors, read the bits, judge them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.errors import ConfigError
from countermark.key import Key, KeyMaterial
from countermark.nulls import Evidence, FreshKeys, Null
from countermark.schemes import scheme_of
from countermark.schemes.base import WeightScheme
from countermark.verdict import Terms, Verdict, judge, no_verdict
from countermark.weights import MOST_CANDIDATES, Array, Weights, assignments, open_weights

if TYPE_CHECKING:
    from torch import nn


def verify(
    suspect: str | Path | nn.Module | Weights,
    key: Key,
    *,
    alpha: float = Terms.alpha,
    assume_dated: bool = False,
    null: str | None = None,
    digest: bool = False,
) -> Verdict:
    """Say whether the mark of a key is present in a suspect, and how sure that is.

    Args:
        suspect: a .safetensors or torch file, or a live module.
        key: the owner's key.
        alpha: threshold for the probability of a false accusation, after correction.
        assume_dated: the owner states that the key is older than the suspect.
        null: "fair_coin" (default) or "fresh_keys", as the scheme allows.
        digest: record the digest of the whole suspect file too, which reads all of it.

    Returns: a verdict; "not owned" and "cannot tell" are values of its `outcome`.

    Raises:
        SuspectError: the suspect cannot be read.
        ConfigError: the key's fields and tensors do not fit each other, or an unknown null.
    """
    return examine(suspect, key, Terms(alpha, assume_dated), null=null, digest=digest)


def examine(
    suspect: str | Path | nn.Module | Weights,
    key: Key,
    terms: Terms,
    *,
    null: str | None = None,
    digest: bool = False,
) -> Verdict:
    """`verify` under explicit terms; benchmarks allow test keys by them."""
    scheme = scheme_of(key)
    with open_weights(suspect) as weights:
        about = {
            "scheme": key.scheme,
            "commitment": key.commitment,
            "owner": key.owner,
            "test_key": key.test_key,
            "suspect": {"name": weights.name},
        }
        found = list(itertools.islice(assignments(weights, key.tensors), MOST_CANDIDATES + 1))
        if not 0 < len(found) <= MOST_CANDIDATES:
            reason = _missing(weights, key) if not found else _too_many(weights, key)
            return no_verdict(reason, bits=key.bits, terms=terms, about=about)
        best, tensors, where = _best(weights, scheme, key, found)
        about["suspect"] = {
            "name": weights.name,
            "tensors": where,
            "sha256": dict(weights.digests),
            "file_sha256": weights.file_digest() if digest else None,
        }
    chosen = _null(null, scheme, key, tensors)
    return judge(best, chosen, tests=len(found), terms=terms, about=about)


def read_evidence(suspect: str | Path | nn.Module | Weights, key: Key) -> Evidence:
    """What a key reads from the tensors of its own names, without judging it."""
    with open_weights(suspect) as weights:
        return scheme_of(key).extract({name: weights.read(name) for name in key.tensors}, key)


def _best(
    weights: Weights, scheme: WeightScheme, key: Key, found: list[dict[str, str]]
) -> tuple[Evidence, dict[str, Array], dict[str, str]]:
    """The reading with the most matches, the tensors it used, and where they were."""

    def reading(where: dict[str, str]) -> tuple[Evidence, dict[str, Array], dict[str, str]]:
        tensors = {wanted: weights.read(name) for wanted, name in where.items()}
        return scheme.extract(tensors, key), tensors, where

    return max(map(reading, found), key=lambda each: each[0].matched)


def _null(name: str | None, scheme: WeightScheme, key: Key, tensors: Mapping[str, Array]) -> Null:
    if name is None or name == scheme.null.name:
        return scheme.null
    if name == FreshKeys.name and scheme.linear:
        return FreshKeys(redraw=lambda: _fresh_match(scheme, key, tensors))
    raise ConfigError(
        f"{scheme.name} has no null {name!r}: expected {scheme.null.name}"
        + (f" or {FreshKeys.name}" if scheme.linear else "")
    )


def _fresh_match(scheme: WeightScheme, key: Key, tensors: Mapping[str, Array]) -> int:
    """How many of its own bits a new key of the same form finds in these tensors."""
    fresh = replace(key, material=KeyMaterial.fresh())
    return scheme.extract(tensors, fresh).matched


def _missing(weights: Weights, key: Key) -> str:
    wanted = ", ".join(f"{name} {list(shape)}" for name, shape in key.tensors.items())
    return (
        f"the suspect has no tensors of the names or shapes that this key reads ({wanted}) "
        f"among its {len(weights.tensors)}: another architecture, or another form of the model"
    )


def _too_many(weights: Weights, key: Key) -> str:
    return (
        f"the tensors that this key reads were renamed, and {len(weights.tensors)} tensors of the "
        f"suspect can be arranged in more than {MOST_CANDIDATES} ways as {len(key.tensors)}"
    )
