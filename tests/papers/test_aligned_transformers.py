"""The null of marks in transformers after alignment: exact with a reference from before the mark.

Strangers are put into the order of a checkpoint by all of its tensors, those that the key reads
included. Where these are older than the message, k of fresh keys is binomial; where they bear the
mark, the same test shows it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from false_claims import Pairs, check

from countermark.alignment import Reference, realign_suspect
from countermark.alignment.symmetries import Architecture, find_block_groups
from countermark.checkpoints import Array, PatchedWeights, open_weights, save_weights
from countermark.keys.key import KeyMaterial
from countermark.schemes.stamp.scheme import Stamp
from countermark.stamping.solving import shift_values, solve_shifts
from tiny_transformers import HEADS, HIDDEN, WIDTH, tiny

BITS, KEYS, STRANGERS = 96, 400, 4
LAYERS = {
    f"encoder.layer.{layer}.{name}.weight": shape
    for layer in (0, 1)
    for name, shape in (
        ("attention.self.query", (WIDTH, WIDTH)), ("attention.self.value", (WIDTH, WIDTH)),
        ("intermediate.dense", (HIDDEN, WIDTH)), ("output.dense", (WIDTH, HIDDEN)),
    )
}  # fmt: skip
SCHEME = Stamp(tuple(LAYERS), BITS, margin=3.0)


def reference() -> Reference:
    model = tiny("bert")
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    return Reference(model, find_block_groups(shapes, Architecture(HEADS), residual=True))


def in_order(stranger: int, to: Reference) -> dict[str, Array]:
    """The tensors of an unmarked model in the order that all tensors of the reference say."""
    with open_weights(tiny("bert", 100 + stranger)) as suspect:
        return realign_suspect(suspect, to, LAYERS, unmarked=LAYERS).tensors


def test_fresh_keys_read_a_coin_from_strangers_in_order() -> None:
    strangers = [in_order(number, reference()) for number in range(STRANGERS)]
    matched = []
    for number in range(KEYS):
        key = SCHEME.generate_key(
            LAYERS, owner="nobody", material=KeyMaterial.from_test_seed(number)
        )
        matched.append(SCHEME.extract(strangers[number % STRANGERS], key).match_count)
    check(Pairs(np.array(matched), BITS, 0.5))


@pytest.mark.parametrize("known", [True, False])
def test_an_order_by_marked_tensors_is_no_coin(known: bool, tmp_path: Path) -> None:
    """Each key has a marked checkpoint of its own, to which one stranger is aligned by it."""
    plain, matched = reference(), []
    path = tmp_path / "m.safetensors"
    save_weights(tiny("bert").state_dict(), path)
    for number in range(40):
        key = SCHEME.generate_key(
            LAYERS, owner="nobody", material=KeyMaterial.from_test_seed(number)
        )
        with open_weights(path) as weights:
            shifts = solve_shifts(weights, SCHEME, key, key.message)
            marked = {
                piece.name: (0, piece.after.astype(np.float32))
                for piece in shift_values(weights, SCHEME, key, shifts)
            }
        host = path if known else PatchedWeights(open_weights(path), marked)
        to = Reference(host, plain.units)
        matched.append(SCHEME.extract(in_order(0, to), key).match_count)
    mean = float(np.mean(matched)) / BITS
    assert abs(mean - 0.5) < 0.03 if known else mean > 0.56, mean
