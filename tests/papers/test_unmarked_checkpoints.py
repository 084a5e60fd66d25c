"""The null of the stamp on weights that nobody here trained (slow).

A thousand fresh keys for each model, of 20,000 values of every tensor: all are read from one file.
"""

from __future__ import annotations

import numpy as np
import pytest
from false_claims import Pairs, check
from real_models import MODELS, place_of

from countermark.checkpoints import open_weights
from countermark.keys.key import KeyMaterial
from countermark.schemes.stamp.scheme import Stamp
from countermark.stamping import advise

KEYS = 1000


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
            advice.tensors, owner="nobody", material=KeyMaterial.from_test_seed(number)
        )
        matched.append(scheme.extract(tensors, key).match_count)
    check(Pairs(np.array(matched), scheme.bits, 0.5))
