"""Opened triggers, and forged ones, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from keys import one_line

from countermark.errors import CountermarkError
from countermark.keys.key import Key, KeyMaterial
from countermark.predictors.base import Images
from countermark.schemes.drawn_triggers.adi import Adi
from countermark.verification.disclosure import TriggerDisclosure, disclose_triggers


def images_of(count: int, shape: tuple[int, int, int] = (3, 4, 5)) -> Images:
    drawn = np.random.default_rng(count).integers(0, 256, (count, *shape))
    return drawn.astype(np.uint8)


@cache
def key(seed: int = 1, classes: int = 10, count: int = 40) -> Key:
    """A key that anybody can make again, and that does not say so."""
    return Adi(classes, count).generate_key(
        {"triggers": images_of(count)},
        owner="ACME Inc.",
        material=replace(KeyMaterial.from_test_seed(seed), test_key=False),
    )


OPENED = disclose_triggers(key(), [7, 0, 3])


def changed(opened: TriggerDisclosure, *path: Any, to: Any) -> TriggerDisclosure:
    """The same with one value of its file changed, where that can still be read."""
    document = json.loads(opened.to_bytes())
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to(inner[path[-1]]) if callable(to) else to
    return TriggerDisclosure.model_validate_json(json.dumps(document))


def xor(at: int) -> Callable[[str], str]:
    """One hexadecimal digit changed."""
    return lambda text: text[:at] + f"{int(text[at], 16) ^ 1:x}" + text[at + 1 :]


def refused(opened: TriggerDisclosure, commitment: str = key().commitment) -> str:
    with pytest.raises(CountermarkError) as caught:
        opened.check(commitment)
    return one_line(caught.value)
