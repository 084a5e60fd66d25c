"""Show a suspect's tensors in the layout that a key reads: split, joined, transposed or cut.

Libraries store the same values in other tensors: q, k and v in one tensor, all experts or all
blocks in one tensor, matrices transposed, vocabularies padded. Names and shapes alone tell which
values of which tensor are wanted, so that nothing here can depend on a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from countermark.checkpoints.base import Array, Weights
from countermark.checkpoints.known_names import (
    ALL,
    PARTS,
    TensorPlace,
    parse_name,
    split_block,
)
from countermark.checkpoints.moved_blocks import SAMPLE, find_moved_blocks
from countermark.checkpoints.name_matching import find_known_names
from countermark.checkpoints.wrapped import ComputedWeights
from countermark.errors import SuspectError

_MOST_PADDING = 2  # largest multiple of a wanted size that counts as padded
_OF_WORDS = frozenset({"embeddings", "head"})  # whose rows are added with words
_MOST_BLOCKS = 1024  # of a suspect, which may number its blocks as it likes
_Shape = tuple[int, ...]
_FUSED = {part: (role, at) for role, parts in PARTS.items() for at, part in enumerate(parts)}


class _Form(Protocol):
    """How the values of a derived tensor are made from stored tensors."""

    @property
    def shape(self) -> _Shape:
        """Shape of the derived tensor."""

    def read_part(self, weights: Weights, start: int, count: int) -> Array:
        """Read `count` values in C order from `start` on."""

    def describe(self, weights: Weights) -> str:
        """Name the stored tensors, as `weights` call them."""


@dataclass(frozen=True)
class _Run:
    """Consecutive values of a stored tensor, from `start` on."""

    source: str
    start: int
    shape: _Shape
    whole: bool

    def read_part(self, weights: Weights, start: int, count: int) -> Array:
        return weights.read_part(self.source, self.start + start, count)

    def describe(self, weights: Weights) -> str:
        source = weights.describe_source(self.source)
        return source if self.whole else f"part of {source}"


@dataclass(frozen=True)
class _Cut:
    """The box of `shape` from `first` on of another form, transposed before if `turned`."""

    whole: _Form
    first: _Shape
    shape: _Shape
    turned: bool = False

    def read_part(self, weights: Weights, start: int, count: int) -> Array:
        values = _load_form(self.whole, weights)
        box = tuple(slice(at, at + n) for at, n in zip(self.first, self.shape, strict=True))
        return (values.T if self.turned else values)[box].reshape(-1)[start : start + count]

    def describe(self, weights: Weights) -> str:
        changed = "transposed" if self.turned else "cut"
        return f"{self.whole.describe(weights)}, {changed}"


@dataclass(frozen=True)
class _Joined:
    """Other forms, one behind the other along the first axis."""

    parts: Sequence[_Form]
    shape: _Shape

    def read_part(self, weights: Weights, start: int, count: int) -> Array:
        found, at = [np.zeros(0, dtype=np.float32)], 0
        for each in self.parts:
            size = prod(each.shape)
            first, last = max(start, at), min(start + count, at + size)
            if first < last:
                found.append(each.read_part(weights, first - at, last - first))
            at += size
        return np.concatenate(found)

    def describe(self, weights: Weights) -> str:
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"{self.parts[0].describe(weights)}{more}"


def _load_form(form: _Form, weights: Weights) -> Array:
    """Load the values of a form in its shape."""
    return form.read_part(weights, 0, prod(form.shape)).reshape(form.shape)


class DerivedWeights(ComputedWeights):
    """Open weights with tensors that are made from the stored ones; closing it closes them.

    Args:
        weights: open weights.
        forms: how each derived tensor is made, by its name.
    """

    def __init__(self, weights: Weights, forms: Mapping[str, _Form]) -> None:
        super().__init__(weights, {name: each.shape for name, each in forms.items()})
        self._forms = forms
        # A stored tensor that only got another name is shown once, under the wanted name.
        renamed = {each.source for each in forms.values() if isinstance(each, _Run) and each.whole}
        self.tensors = {
            n: each for n, each in self.tensors.items() if n in forms or n not in renamed
        }
        self.views &= self.tensors.keys()

    def read_parts(self, name: str, starts: Sequence[int], count: int) -> list[Array]:
        """Read parts of one tensor, as the wrapped weights do where one stored tensor has them."""
        form = self._forms.get(name)
        if isinstance(form, _Run):
            moved = [form.start + start for start in starts]
            return self._weights.read_parts(form.source, moved, count)
        return super().read_parts(name, starts, count)

    def _compute(self, name: str) -> NDArray[Any]:
        """Make one tensor out of the stored tensors."""
        return _load_form(self._forms[name], self._weights)

    def _compute_part(self, name: str, start: int, count: int) -> Array:
        """Make a part of one tensor, and read of the stored tensors what their order allows."""
        return self._forms[name].read_part(self._weights, start, count)

    def describe_source(self, name: str) -> str:
        """Name the stored tensors that a tensor is made from."""
        if (form := self._forms.get(name)) is None:
            return self._weights.describe_source(name)
        return form.describe(self._weights)


def derive_tensors(
    weights: Weights, wanted: Mapping[str, _Shape], *, padded: bool = True
) -> Weights:
    """Show open weights with the tensors of wanted names that other tensors hold the values of.

    Blocks that the suspect has and the key does not read get names by the same pattern, so that
    moved blocks can be found afterwards.

    Args:
        weights: the suspect, open.
        wanted: shapes by name.
        padded: take a larger tensor for a wanted one with zeros, or further words, at the end.

    Returns: `weights` itself if nothing is to be derived; closing either closes the file.
    """
    if len(find_known_names(weights, wanted)) == len(wanted):
        return weights
    forms = dict(_FormFinder(weights, wanted, padded=padded).derive_all(wanted))
    return DerivedWeights(weights, forms) if forms else weights


def renumber_blocks(weights: Weights, reference: Weights) -> Weights:
    """Show open weights with each block under the number of the nearest block of a reference.

    Args:
        weights: the suspect, open.
        reference: weights that cannot depend on a message, open.

    Returns: `weights` itself if no block was moved; closing either closes the file.
    """
    shapes = {name: each.shape for name, each in reference.tensors.items()}
    before = {
        name: (0, reference.read_part(name, 0, min(SAMPLE, prod(shape))))
        for name, shape in shapes.items() if len(shape) > 1 and split_block(name)
    }  # fmt: skip
    known = find_known_names(weights, shapes)
    moved = next(find_moved_blocks(weights, shapes, known, before), {})
    forms = {
        name: _Run(other, 0, shapes[name], whole=True)
        for name, other in moved.items() if name != other
    }  # fmt: skip
    return DerivedWeights(weights, forms) if forms else weights


class _FormFinder:
    """Finds stored tensors by their places in a transformer, and forms that give wanted ones.

    Attributes:
        transposed: the suspect stores matrices transposed, so that square ones are, too.
    """

    def __init__(self, weights: Weights, wanted: Mapping[str, _Shape], *, padded: bool) -> None:
        self._weights, self._padded = weights, padded
        self._shapes = {name: each.shape for name, each in weights.tensors.items()}
        self._names: dict[TensorPlace, list[str]] = {}
        self._blocks: dict[str, set[int]] = {}
        for name, shape in self._shapes.items():
            place = parse_name(name)
            self._names.setdefault(place, []).append(name)
            if place.block is not None:
                stacked = range(min(shape[0], _MOST_BLOCKS)) if shape else ()
                self._blocks.setdefault(place.stack, set()).update(
                    stacked if place.block == ALL else (place.block,)
                )
        self.transposed = False
        pairs = [
            (shape, inner)
            for name, shape in wanted.items() if len(shape) == 2 and shape[0] != shape[1]
            for *_, inner in self._list_sources(parse_name(name), parse_name(name).role)
        ]  # fmt: skip
        if any(shape[::-1] == inner for shape, inner in pairs):
            self.transposed = all(shape != inner for shape, inner in pairs)

    def derive_all(self, wanted: Mapping[str, _Shape]) -> Iterator[tuple[str, _Form]]:
        """Yield the forms of wanted tensors, and of the same tensors of other blocks."""
        patterns: dict[tuple[str, str], dict[int, _Shape]] = {}
        targets = dict(wanted)
        for name, shape in wanted.items():
            if at := split_block(name):
                patterns.setdefault((at.head, at.tail), {})[at.block] = shape
        for (head, tail), shapes in patterns.items():
            first = next(iter(shapes.values()))
            blocks = self._blocks.get(parse_name(f"{head}0{tail}").stack, ())
            # A model counts its blocks from 0: blocks of high numbers may be there to distract.
            for block in sorted(blocks)[:_MOST_BLOCKS]:
                targets.setdefault(f"{head}{block}{tail}", first)
        for name, shape in targets.items():
            square = len(shape) == 2 and shape[0] == shape[1]
            stored = self._shapes.get(name) == shape
            if stored and not (square and self.transposed):
                continue
            if form := self._find_form(parse_name(name), shape):
                yield name, form

    def _find_form(self, place: TensorPlace, shape: _Shape) -> _Form | None:
        """Find the form of a tensor: a stored one, a part of one, or several joined."""
        return (
            self._find_stored(place, shape)
            or self._find_fused(place, shape)
            or self._join_parts(place, shape)
        )

    def _list_sources(self, place: TensorPlace, role: str) -> Iterator[tuple[str, int, _Shape]]:
        """Yield tensors that hold a place: name, first value, and shape of this place's values."""
        blocks = [place.block, ALL] if place.block not in (None, ALL) else [place.block]
        experts = [place.expert, ALL] if place.expert not in (None, ALL) else [place.expert]
        for block, expert in product(blocks, experts):
            names = self._names.get(replace(place, block=block, expert=expert, role=role), ())
            # Two tensors of one place could only be told apart by their values.
            if len(names) != 1:
                continue
            shape, start = self._shapes[names[0]], 0
            leads = [
                number
                for number, stored in ((place.block, block), (place.expert, expert))
                if stored == ALL != number and number is not None
            ]
            for lead in leads:
                if not shape or lead >= shape[0]:
                    break
                shape, start = shape[1:], start + lead * prod(shape[1:])
            else:
                yield names[0], start, shape

    def _find_stored(self, place: TensorPlace, shape: _Shape) -> _Form | None:
        """Find a tensor with this place alone, perhaps transposed or with a padded width."""
        for name, start, inner in self._list_sources(place, place.role):
            run = _Run(name, start, inner, whole=inner == self._shapes[name])
            turned = len(shape) == 2 and inner == shape[::-1]
            if turned and (inner != shape or self.transposed):
                return _Cut(run, (0, 0), shape, turned=True)
            if inner == shape:
                return run
            if self._is_padded(name, start, inner, shape, place.role):
                # Consecutive values are read alone, for example the first rows of a vocabulary.
                if inner[1:] == shape[1:]:
                    return _Run(name, start, shape, whole=False)
                return _Cut(run, (0,) * len(shape), shape)
        return None

    def _is_padded(self, name: str, start: int, inner: _Shape, shape: _Shape, role: str) -> bool:
        """Return true if a tensor is a wanted one with zeros, or further words, added at the end.

        Only the last row, and the end of the first row, are read.
        """
        sizes = list(zip(shape, inner, strict=False))
        if not self._padded or len(shape) != len(inner) or not shape or inner == shape:
            return False
        if not all(0 < n <= size <= _MOST_PADDING * n for n, size in sizes):
            return False
        row, added = prod(inner[1:]), inner[0] > shape[0] and role not in _OF_WORDS
        try:
            first = self._weights.read_part(name, start, row).reshape(inner[1:]).copy()
            last = self._weights.read_part(name, start + prod(inner) - row, row * added)
        except SuspectError:
            return False
        first[tuple(slice(n) for n in shape[1:])] = 0
        return not first.any() and not last.any()

    def _find_fused(self, place: TensorPlace, shape: _Shape) -> _Form | None:
        """Find the rows of this place in a fused tensor."""
        role, at = _FUSED.get(place.role, ("", 0))
        for name, start, inner in self._list_sources(place, role) if role and shape else ():
            if len(inner) != len(shape):
                continue
            for turned in (self.transposed, not self.transposed):
                rows, *rest = inner[::-1] if turned else inner
                first = _find_first_row(rows, shape[0], at, len(PARTS[role]))
                if first is None or tuple(rest) != shape[1:] or (turned and not rest):
                    continue
                if not turned:
                    return _Run(name, start + first * prod(rest), shape, whole=False)
                run = _Run(name, start, inner, whole=inner == self._shapes[name])
                return _Cut(run, (first, *[0] * len(rest)), shape, turned=True)
        return None

    def _join_parts(self, place: TensorPlace, shape: _Shape) -> _Form | None:
        """Join the tensors that a fused or stacked one is made of."""
        if not shape:
            return None
        if ALL in (place.block, place.expert):
            parts = []
            for at in range(shape[0]):
                one = replace(place, block=at) if place.block == ALL else replace(place, expert=at)
                if (form := self._find_form(one, shape[1:])) is None:
                    return None
                parts.append(form)
            return _Joined(parts, shape)
        parts = []
        for part in PARTS.get(place.role, ()):
            source = next(self._list_sources(place, part), None)
            if source is None:
                return None
            parts.append(_Run(*source, whole=False))
        if not parts:
            return None
        return _join_rows(parts, shape) or _turn_form(_join_rows(parts, shape[::-1]))


def _find_first_row(rows: int, wanted: int, at: int, count: int) -> int | None:
    """Return the first row of a part in a fused tensor; None if the sizes do not fit.

    Args:
        rows: rows of the fused tensor.
        wanted: rows of the part.
        at: which part, from 0; k and v have equal sizes, which are not larger than that of q.
        count: how many parts there are.
    """
    if count == 2:
        return at * wanted if rows == 2 * wanted else None
    others = rows - wanted if at == 0 else rows - 2 * wanted
    if at == 0:
        return 0 if others % 2 == 0 and 0 < others <= 2 * wanted else None
    return rows - (count - at) * wanted if others >= wanted else None


def _join_rows(parts: Sequence[_Form], shape: _Shape) -> _Form | None:
    """Join the rows of forms to a tensor of this shape; None if their sizes do not fit."""
    rows = sum(each.shape[0] for each in parts if each.shape[1:] == shape[1:])
    return _Joined(parts, shape) if rows == shape[0] else None


def _turn_form(form: _Form | None) -> _Form | None:
    """Transpose a form; None stays None."""
    if form is None:
        return None
    return _Cut(form, (0,) * len(form.shape), form.shape[::-1], turned=True)
