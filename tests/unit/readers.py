"""Learnt readers for the tests of this folder: drawn, fitted without training, or of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from keys import InMemory
from numpy.typing import NDArray
from torch import nn

from countermark.checkpoints import Array
from countermark.keys.key import Key, KeyMaterial
from countermark.schemes.independent_network.scheme import IndependentNetwork
from countermark.schemes.learnt_reader import LOUDNESS, SIBLINGS, THRESHOLD, MlpReader

SHAPES: Mapping[str, tuple[int, ...]] = {"a": (12, 8)}
BITS = 128
MEASURED = {
    SIBLINGS: np.array([0.6, 0.7]),
    THRESHOLD: np.array([0.05]),
    LOUDNESS: np.full(SHAPES["a"][0], 1.2),
}


def network(**fields: Any) -> IndependentNetwork:
    """A small network that reads one tensor, `a`, whose units are its rows."""
    return IndependentNetwork.from_fields(
        {"layer": "a", "bits": BITS, "hidden": 64, "units": (0,), **fields}
    )


def material(number: int) -> KeyMaterial:
    """A secret that is the same in every run, of a key that counts as a real one."""
    return replace(KeyMaterial.from_test_seed(number), test_key=False)


def drawn_reader(number: int, width: int, hidden: int) -> dict[str, NDArray[np.float32]]:
    """A reader that was never trained."""
    random = np.random.default_rng(number)
    tensors = {
        "reader.gate": random.normal(1, 0.3, width),
        "reader.first": random.normal(0, 0.1, (hidden, width)),
        "reader.last": random.normal(0, 0.3, (BITS, hidden)),
    }
    return {name: each.astype(np.float32) for name, each in tensors.items()}


def drawn_key(
    number: int = 1, tensors: Mapping[str, tuple[int, ...]] = SHAPES, **fields: Any
) -> Key:
    """A key whose reader was never trained."""
    key = network(**fields).generate_key(tensors, owner="ACME Inc.", material=material(number))
    width = sum(int(np.prod(shape)) for shape in tensors.values())
    hidden = int(key.fields["hidden"])
    groups = int(network(**key.fields).make_permuter(tensors).group.max()) + 1
    learnt = drawn_reader(number, width, hidden) | MEASURED | {LOUDNESS: np.full(groups, 1.2)}
    return replace(key, learnt=learnt)


def fitted_key(weights: Mapping[str, Array], number: int = 1, **fields: Any) -> Key:
    """A key made after the fact, whose reader finds its message in these weights alone.

    Its last layer follows from the hidden units at the weights, less their mean over permutations.
    """
    shapes = {name: each.shape for name, each in weights.items()}
    key = drawn_key(number, shapes, **fields)
    scheme = network(**fields)
    gate, first, last = (key.learnt[f"reader.{name}"] for name in ("gate", "first", "last"))
    w, permuter = scheme.read_vector(weights, key), scheme.make_permuter(shapes)
    others = permuter.permute_vector(w, permuter.draw_permutations(key.make_stream("fit"), 500))
    units = MlpReader(gate, first, np.eye(len(first), dtype=np.float32))
    here, elsewhere = units(w[None])[0], units(others).mean(axis=0)
    apart = here - elsewhere
    signs = 2.0 * key.message - 1.0
    last = np.outer(signs, 8 * apart / (apart @ here)).astype(np.float32)
    return replace(
        key, learnt={**key.learnt, "reader.last": last, LOUDNESS: permuter.compute_loudness(w)}
    )


def gaussian(number: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Array]:
    """Weights of a model that was never trained."""
    random = np.random.default_rng(1000 + number)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def hosted(weights: Mapping[str, Array], units: int = 12) -> InMemory:
    """Weights of `a` in a model whose shapes show that its rows are hidden units."""
    random = np.random.default_rng(7)
    around = {"bias": random.normal(size=units), "z": random.normal(size=(3, units))}
    return InMemory({**weights, **{name: each.astype(np.float32) for name, each in around.items()}})


def unmarked_hosts(count: int = 3) -> list[InMemory]:
    """Models that no reader of these tests was fitted to, as an examiner supplies them."""
    return [hosted(gaussian(500 + number)) for number in range(count)]


def linear_reader(inputs: int, bits: int) -> nn.Module:
    """A reader of one's own."""
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, bits))


def wrong_shape(inputs: int, bits: int) -> nn.Module:
    """Gives one logit too many."""
    return nn.Linear(inputs, bits + 1)


def wrong_inputs(inputs: int, bits: int) -> nn.Module:
    """Cannot take the vectors."""
    return nn.Linear(inputs + 1, bits)


def no_module(inputs: int, bits: int) -> int:
    """Gives something else than a module."""
    return inputs + bits


def failing(inputs: int, bits: int) -> nn.Module:
    """Says why not, on two lines."""
    raise OSError(f"no reader for\n{inputs} inputs and {bits} bits")
