"""The null after alignment, simulated: hosts that bear a mark, suspects that never saw it.

Every pair has a host, a key and a suspect of its own, and is read with the message that is in the
host. k must follow Bin(T, 1/2) and nobody may be claimed. Where the order of neurons may depend on
the message the same test must fail: matched by the marked tensor, and also by what was trained
beside it, unless suspects that are no copies are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from false_claims import Pairs, check
from marked_stack import SHAPES, Weights, hosts, initial, module_of

from countermark.alignment import SuspectWithReference
from countermark.alignment.matching import align_tensors
from countermark.alignment.symmetries import find_chain_groups
from countermark.attacks.invariants import Permute, Rescale
from countermark.keys.key import Key
from countermark.results.verdict import VerificationOptions
from countermark.schemes.uchida.scheme import Uchida
from countermark.training.data import load_data
from countermark.verification.verify import examine

T, LAYER = 256, "2.weight"
UNREAD = {"0.weight", "0.bias"}
UNITS = find_chain_groups(SHAPES)
SCHEME = Uchida(LAYER, T, strength=0.1)
TERMS = VerificationOptions(assume_dated=True, allow_test_key=True)


@dataclass(frozen=True)
class Zoo:
    """Marked hosts with their keys, their initial weights, twins without the mark, strangers."""

    marked: list[Weights]
    keys: list[Key]
    initial: list[Weights]
    twins: list[Weights]
    strangers: list[Weights]


@pytest.fixture(
    scope="module",
    params=[pytest.param(20, id="20"), pytest.param(120, id="120", marks=pytest.mark.slow)],
)
def zoo(request: pytest.FixtureRequest) -> Zoo:
    """Trained shortly: on 1,000 digits, 4 epochs."""
    data, seeds = load_data("digits").subset(train=1000), range(request.param)
    made = hosts(seeds, data=data, epochs=4, scheme=SCHEME)
    others = [seed + 5000 for seed in seeds]
    return Zoo(
        [weights for weights, _ in made],
        [key for _, key in made if key is not None],
        initial(seeds),
        [weights for weights, _ in hosts(seeds, data=data, epochs=4)],
        [weights for weights, _ in hosts(others, data=data, epochs=4)],
    )


def read(
    references: Sequence[Weights], suspects: Sequence[Weights], keys: Sequence[Key], by: set[str]
) -> Pairs:
    """k of each pair, its suspect aligned to its reference by the tensors that are named."""
    found = []
    for reference, suspect, key in zip(references, suspects, keys, strict=True):
        tensors = align_tensors(suspect, reference, UNITS, by=by).tensors
        found.append(SCHEME.extract({LAYER: tensors[LAYER]}, key).match_count)
    return Pairs(np.array(found), T, 0.5)


def fails(pairs: Pairs) -> bool:
    """Whether the test of the null refuses these pairs."""
    try:
        check(pairs)
    except AssertionError:
        return True
    return False


def test_aligned_to_the_initial_weights_k_is_binomial_and_every_bit_is_back(zoo: Zoo) -> None:
    check(read(zoo.initial, zoo.strangers, zoo.keys, UNREAD))
    check(read(zoo.initial, zoo.twins, zoo.keys, UNREAD))
    own = [SCHEME.extract(w, key).match_count for w, key in zip(zoo.marked, zoo.keys, strict=True)]
    back = read(zoo.initial, zoo.marked, zoo.keys, UNREAD).k
    assert np.mean(own) > 0.75 * T  # these hosts are trained for a few hundred steps
    assert np.abs(back - own).max() <= 0.03 * T


def test_aligned_to_the_marked_host_by_what_is_unread_strangers_read_too_well(zoo: Zoo) -> None:
    """Why strangers are refused: what was trained beside a mark knows of it."""
    pairs = read(zoo.marked, zoo.strangers, zoo.keys, UNREAD)
    assert pairs.k.mean() > 0.52 * T
    assert fails(pairs)


def test_aligned_by_the_mark_itself_the_same_test_fails(zoo: Zoo) -> None:
    pairs = read(zoo.marked, zoo.strangers, zoo.keys, {LAYER})
    assert pairs.k.mean() > 0.6 * T
    assert fails(pairs)


def test_against_the_marked_host_nobody_is_claimed_and_strangers_are_refused(zoo: Zoo) -> None:
    for marked, stranger, key in zip(zoo.marked, zoo.strangers, zoo.keys, strict=True):
        verdict = examine(SuspectWithReference(module_of(stranger), module_of(marked)), key, TERMS)
        assert verdict.outcome == "not_proven"
        assert "no copies of its own" in verdict.subject.reference.refused
        assert verdict.null == "fair_coin"


def test_copies_of_the_marked_host_that_lack_the_mark_read_like_a_coin(zoo: Zoo) -> None:
    """Twins from the same initial weights pass as copies; the order is theirs, not the mark's."""
    matched = []
    for marked, twin, key in zip(zoo.marked, zoo.twins, zoo.keys, strict=True):
        model = Rescale().run(Permute().run(module_of(twin)).model).model
        verdict = examine(SuspectWithReference(model, module_of(marked)), key, TERMS)
        assert verdict.outcome == "not_proven"
        assert verdict.subject.reference.refused is None
        tensors = align_tensors(twin, marked, UNITS, by=UNREAD).tensors
        matched.append(SCHEME.extract({LAYER: tensors[LAYER]}, key).match_count)
    check(Pairs(np.array(matched), T, 0.5))
