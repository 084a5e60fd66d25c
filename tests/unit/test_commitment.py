"""C0 binds every field of a key: one changed field redraws about half of all bits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from keys import SHAPE, known_key
from numpy.typing import NDArray
from scipy import stats

from countermark.keys.key import Key, compute_c0, digest_tensor, digest_tensors
from countermark.keys.streams import KeyStream

CHANGES: Mapping[str, Any] = {
    "scheme": {"scheme": "uchidb"},
    "owner": {"owner": "ACME Inc"},
    "tensor name": {"tensors": {"fc.weighs": SHAPE}},
    "tensor shape": {"tensors": {"fc.weight": (32, 16)}},
    "tensor added": {"tensors": {"fc.weight": SHAPE, "b": (1,)}},
    "frozen": {"frozen": {"mask.fc.weight": np.ones(512, dtype=np.uint8)}},
    "frozen name": {"frozen": {"mask.fc.weighs": np.ones(512, dtype=np.uint8)}},
    "frozen dtype": {"frozen": {"mask.fc.weight": np.ones(512, dtype=np.int8)}},
    "frozen shape": {"frozen": {"mask.fc.weight": np.ones((2, 256), dtype=np.uint8)}},
} | {
    f"field {name}": {"fields": {**known_key().fields, name: value}}
    for name, value in {
        "layer": "fc.bias",
        "over_capacity": True,
        "key_type": "random",
        "read": "filter_mean",
        "select": "converged",
        "regularizer": "bce",
        "strength": 0.011,
        "margin": 1.5,
        "convergence_std": 0.011,
        "convergence_epochs": 6,
        "start_epoch": 7,
        "unknown": None,
    }.items()
}


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1, *content[1:]])


def changed_keys() -> dict[str, Key]:
    key = known_key()
    m = key.material
    changed = {name: replace(key, **change) for name, change in CHANGES.items()}
    return changed | {
        "nonce": replace(key, material=replace(m, nonce=flipped(m.nonce))),
        "secret": replace(key, material=replace(m, secret=flipped(m.secret))),
        "test flag": replace(key, material=replace(m, test_key=False)),
    }


def test_every_field_of_the_scheme_is_changed_once() -> None:
    assert {f"field {name}" for name in known_key().fields} - set(CHANGES) == {"field bits"}


@pytest.mark.parametrize("what", sorted(changed_keys()))
def test_one_changed_field_redraws_half_of_all_bits(what: str) -> None:
    before, after = known_key(), changed_keys()[what]
    assert before.commitment != after.commitment
    inside_band(before.message, after.message)
    rows = (key.make_stream("rows", "fc.weight").take_bits(100_000) for key in (before, after))
    inside_band(*rows)


def test_another_length_redraws_the_message() -> None:
    before = known_key()
    after = replace(before, fields={**before.fields, "bits": 255})
    inside_band(before.message[:255], after.message)


def test_order_of_tensors_counts_and_order_of_frozen_ones_does_not() -> None:
    key = replace(known_key(), tensors={"a": (1,), "b": (1,)})
    turned = replace(key, tensors={"b": (1,), "a": (1,)})
    inside_band(key.message, turned.message)
    one, two = np.zeros(3), np.ones(3)
    frozen = replace(key, frozen={"x": one, "y": two})
    assert frozen.commitment == replace(key, frozen={"y": two, "x": one}).commitment
    assert frozen.commitment != replace(key, frozen={"x": two, "y": one}).commitment


def test_the_digest_of_openings_stands_first_whatever_the_others_are_called() -> None:
    """Of several tensors that might pass for it, the place tells which one counts."""
    root, frozen = np.zeros(32, dtype=np.uint8), {"a": np.zeros(3), "z": np.ones(3)}
    assert digest_tensors(frozen) == [digest_tensor(name, frozen[name]) for name in "az"]
    assert digest_tensors({**frozen, "openings": root}) == [
        digest_tensor("openings", root), *digest_tensors(frozen)
    ]  # fmt: skip


def test_c0_follows_from_digests_alone() -> None:
    key = replace(known_key(), frozen={"b": np.ones(3), "a": np.zeros(3)})
    secret = hashlib.sha256(key.material.secret).digest()
    about = {"secret": secret, "owner": key.owner, "nonce": key.material.nonce}
    assert compute_c0(key.commitment_context, digest_tensors(key.frozen), **about) == key.c0
    assert compute_c0(key.commitment_context, digest_tensors(key.frozen)[::-1], **about) != key.c0


def test_streams_differ_by_purpose_and_tensor() -> None:
    streams = [
        KeyStream(bytes(32), bytes(32), purpose, tensor).take_bits(10_000)
        for purpose, tensor in [("rows", ""), ("rows", "a"), ("rowsa", ""), ("message", "")]
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            inside_band(one, other)


def inside_band(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> None:
    """As many bits differ as of independent ones, inside a 99.9999 % binomial band."""
    low, high = stats.binom.interval(0.999999, len(one), 0.5)
    assert low <= np.count_nonzero(one != other) <= high
