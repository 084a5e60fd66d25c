"""Find a key's blocks in a suspect that has more or fewer blocks, or unknown names.

A block that adds nothing, put before the first one, moves all others one number further. Blocks
are found by the values that a key keeps from before its message was drawn: such a choice cannot
depend on the message, so it is one test. Without these values, one run of blocks put in or taken
out is tried at every place, and each place is one test.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from countermark.checkpoints.base import Array, Weights
from countermark.checkpoints.known_names import split_block
from countermark.errors import SuspectError

OriginalValues = Mapping[str, tuple[int, Array]]
"""Values of tensors from before the message was drawn: place of the first value, and values (n,).
"""

_Shapes = Mapping[str, tuple[int, ...]]
_Names = Mapping[str, str]
_Unit = TypeVar("_Unit", bound=Hashable)
_Choice = TypeVar("_Choice", bound=Hashable)

SAMPLE = 512
"""Values of a tensor that are compared: few, so that the tensors of 48 blocks are not all read."""
_COMPARED = 2  # tensors of a block that are compared
_SURE = 0.5  # mean correlation at which nothing nearer is sought
_LEAST = 6.0  # correlation of tensors that belong together, in standard deviations of chance
_CERTAIN = 0.9  # mean correlation that is enough for any number of values
_MOST_PAIRS = 1 << 17  # tensors that are compared with one another
_MOST_RUNS = 256  # blocks of a key for which runs are tried
_FEWEST = 16  # values of a tensor whose correlation says anything


def find_moved_blocks(
    weights: Weights, wanted: _Shapes, named: _Names, before: OriginalValues
) -> Iterator[dict[str, str]]:
    """Yield ways to read a key's blocks from blocks of other numbers; each way is one test.

    Args:
        weights: the suspect, open.
        wanted: shapes by name.
        named: the suspect's names of wanted tensors as far as they are known; they show the
            suspect's pattern of names.
        before: values from before the message was drawn; empty if the key keeps none.

    Yields:
        Maps from the wanted name to the suspect's name; tensors that are not found are left out.
    """
    stacks = _list_stacks(weights, wanted, named)
    if before:
        yield from _follow_values(weights, before, named, stacks)
    elif len(stacks) == 1:
        yield from _move_runs(named, next(iter(stacks.values())))


def match_by_values(weights: Weights, wanted: _Shapes, before: OriginalValues) -> dict[str, str]:
    """Find each wanted tensor among all tensors of its shape by its values from before the message.

    Returns: a map from the wanted name to the suspect's name, without the tensors that are not
        found; empty if there are too many tensors to compare.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, info in weights.tensors.items():
        alike.setdefault(info.shape, []).append(name)
    if sum(len(alike.get(wanted[name], ())) for name in before) > _MOST_PAIRS:
        return {}
    options = {
        name: {other: {name: other} for other in alike.get(wanted[name], ())} for name in before
    }
    return choose_nearest(weights, before, options)


def choose_nearest(
    weights: Weights,
    before: OriginalValues,
    options: Mapping[_Unit, Mapping[_Choice, _Names]],
    least: float | None = None,
) -> dict[_Unit, _Choice]:
    """Choose for each unit the tensors whose values are most like those from before the message.

    Only a sample of the values is read. Tensors that cannot be read are like none.

    Args:
        weights: the suspect, open.
        before: values from before the message was drawn.
        options: for each unit its choices: maps from the wanted name to the suspect's name.
        least: the least mean correlation; None for one that chance does not reach.

    Returns: the choice of each unit; units that are like nothing are left out.
    """
    pairs: dict[str, list[tuple[str, _Unit, _Choice]]] = {}
    for unit, choices in options.items():
        for choice, names in choices.items():
            for wanted, name in names.items():
                pairs.setdefault(name, []).append((wanted, unit, choice))
    sums: dict[_Unit, dict[_Choice, float]] = {unit: {} for unit in options}
    # One tensor of the suspect after the other, so that none is opened twice.
    for name, each in pairs.items():
        alike = _compare_samples(weights, name, [before[wanted] for wanted, *_ in each])
        for (_, unit, choice), value in zip(each, alike, strict=True):
            sums[unit][choice] = sums[unit].get(choice, 0.0) + value
    found = {}
    for unit, scores in sums.items():
        best = max(scores, key=lambda choice: scores[choice], default=None)
        if best is None:
            continue
        names = options[unit][best]
        size = sum(min(SAMPLE, len(before[wanted][1])) for wanted in names)
        bound = min(_CERTAIN, _LEAST / math.sqrt(max(1, size))) if least is None else least
        if scores[best] / len(names) >= bound:
            found[unit] = best
    return found


def _compare_samples(weights: Weights, name: str, kept: list[tuple[int, Array]]) -> Iterator[float]:
    """Yield the correlation of one tensor with each sample from before the message."""
    size = min(SAMPLE, *(len(values) for _, values in kept))
    try:
        parts: Iterable[Array] = weights.read_parts(name, [start for start, _ in kept], size)
    except SuspectError:
        parts = [np.zeros(0)] * len(kept)
    for part, (_, values) in zip(parts, kept, strict=True):
        yield _correlate(part, values[: len(part)])


def _correlate(one: Array, other: Array) -> float:
    """Return the correlation of two arrays (n,); 0 for a constant one, or for few values."""
    if len(one) < _FEWEST:
        return 0.0
    a, b = one - one.mean(dtype=np.float64), other - other.mean(dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # the suspect's values may be huge
        found = float(a @ b) / (math.sqrt(float(a @ a) * float(b @ b)) or math.inf)
    return found if math.isfinite(found) else 0.0


class _Stack:
    """The blocks of a key in one stack of blocks, and those of the suspect.

    Attributes:
        wanted: for each block of the key the wanted name of each tensor, by the end of its name.
        there: for each block of the suspect the suspect's name of each such tensor.
    """

    def __init__(self) -> None:
        self.wanted: dict[int, dict[str, str]] = {}
        self.there: dict[int, dict[str, str]] = {}
        self.shapes: dict[str, set[tuple[int, ...]]] = {}

    def pair_names(self, block: int, other: int) -> dict[str, str]:
        """Map the wanted names of a block to those of a block of the suspect, as far as there."""
        there = self.there.get(other, {})
        return {name: there[tail] for tail, name in self.wanted[block].items() if tail in there}


def _list_stacks(weights: Weights, wanted: _Shapes, named: _Names) -> dict[str, _Stack]:
    """List the stacks of blocks of a key and the suspect's blocks, by the begin of its names."""
    stacks: dict[str, _Stack] = {}
    heads: dict[str, str] = {}
    for name, other in named.items():
        one = split_block(name)
        if one and other.endswith(end := f"{one.block}{one.tail}"):
            heads[one.head] = other.removesuffix(end)
    for name, shape in wanted.items():
        one = split_block(name)
        if one and one.head in heads:
            stack = stacks.setdefault(heads[one.head], _Stack())
            stack.wanted.setdefault(one.block, {})[one.tail] = name
            stack.shapes.setdefault(one.tail, set()).add(shape)
    for name, info in weights.tensors.items():
        two = split_block(name)
        stack_there = stacks.get(two.head) if two else None
        # Tensors of one name in all blocks have one shape; others cannot change places.
        if two and stack_there and stack_there.shapes.get(two.tail) == {info.shape}:
            stack_there.there.setdefault(two.block, {})[two.tail] = name
    return stacks


def _follow_values(
    weights: Weights, before: OriginalValues, named: _Names, stacks: Mapping[str, _Stack]
) -> Iterator[dict[str, str]]:
    """Yield the way in which each block is read from the block with the nearest values, if any."""
    own = {
        (head, block): {block: _choose_compared(stack.pair_names(block, block), before)}
        for head, stack in stacks.items() for block in stack.wanted
    }  # fmt: skip
    places = choose_nearest(weights, before, own, _SURE)
    lost = [each for each in own if each not in places]
    # A suspect may have any number of blocks, and a thief may add some that no model uses. The
    # blocks with the nearest numbers are compared: a model counts the blocks that it uses from 0.
    most = _MOST_PAIRS // (_COMPARED * max(1, len(lost)))
    moved = choose_nearest(
        weights, before,
        {
            (head, block): {
                other: _choose_compared(stacks[head].pair_names(block, other), before)
                for other in heapq.nsmallest(
                    most, stacks[head].there, key=lambda other: (abs(other - block), other)
                )
            }
            for head, block in lost
        },
    )  # fmt: skip
    # Where every block that is found has its own number, the names say the same.
    if all(block == other for (_, block), other in moved.items()):
        return
    found = _drop_blocks(named, stacks.values())
    for (head, block), other in (places | moved).items():
        found |= stacks[head].pair_names(block, other)
    yield found


def _drop_blocks(named: _Names, stacks: Iterable[_Stack]) -> dict[str, str]:
    """Return the names of the tensors that belong to no block."""
    inside = {name for each in stacks for names in each.wanted.values() for name in names.values()}
    return {name: other for name, other in named.items() if name not in inside}


def _choose_compared(pairs: _Names, before: OriginalValues) -> dict[str, str]:
    """Choose the tensors of a block that are compared: the same ones for all its choices."""
    kept = sorted(name for name in pairs if name in before)
    chosen = kept[:: max(1, -(-len(kept) // _COMPARED))]
    return {name: pairs[name] for name in chosen}


def _move_runs(named: _Names, stack: _Stack) -> Iterator[dict[str, str]]:
    """Yield a way for each place where one run of blocks can have been put in or taken out.

    Only blocks without a gap in their numbers were moved by such a run; a key that reads some
    blocks only does not say how many the model had.
    """
    count, there = len(stack.wanted), len(stack.there)
    if {*stack.wanted} != {*range(count)} or {*stack.there} != {*range(there)}:
        return
    added = there - count
    if not added or not 2 <= count <= _MOST_RUNS:
        return
    for first in range(min(count, there) + 1):
        found = _drop_blocks(named, [stack])
        for block in range(count):
            # Of a run that was taken out, the blocks from `first` on are missing.
            gone = first <= block < first - added
            if not gone:
                found |= stack.pair_names(block, block + (added if block >= first else 0))
        yield found
