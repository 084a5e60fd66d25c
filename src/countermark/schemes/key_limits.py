"""Upper bounds for the numbers in a key: a key is hostile input, and each number costs work.

A scheme declares its fields with the types below. They are checked whenever a scheme is made, and
so also when a key is read. A field that needs other bounds declares its own.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

MOST_BITS = 1 << 20
"""Longest message, in bits: the message is expanded before the suspect is read."""

MOST_VALUES = 1 << 40
"""Most values of all tensors of a key together: a checkpoint of terabytes."""

# Drawing and scoring code words takes time in proportion to recipients and bits. Both the number of
# recipients and the product of both are bounded.
MOST_RECIPIENTS = 100_000
"""Most recipients of one key; each has a code word."""

MOST_CODE_PLACES = 1 << 32
"""Recipients times bits: all code words of a key are expanded when a suspect is traced."""

MOST_FRESH_CLASSES = 1 << 12
"""Maps of so many classes are drawn by the million when fresh triggers are judged."""

# The types for fields follow. No type admits infinity or NaN, see `base._make_adapters`.
Count: TypeAlias = Annotated[int, Field(ge=1, le=1 << 31)]
"""A number of steps, epochs, batches, images or units; at least 1."""

CountOrNone: TypeAlias = Annotated[int, Field(ge=0, le=1 << 31)]
"""The same, or 0 for none."""

Draws: TypeAlias = Annotated[int, Field(ge=1, le=1 << 40)]
"""A number of random draws that a null hypothesis takes."""

Factor: TypeAlias = Annotated[float, Field(gt=0, le=1e9)]
"""A weight in a loss, a rate, a margin, a standard deviation."""

FactorOrNone: TypeAlias = Annotated[float, Field(ge=0, le=1e9)]
"""The same, or 0 to leave it out."""

Levels: TypeAlias = Annotated[
    tuple[Annotated[float, Field(ge=-1e9, le=1e9)], ...], Field(min_length=1, max_length=64)
]
"""Mean grey levels, one or one for each channel."""

Spreads: TypeAlias = Annotated[
    tuple[Annotated[float, Field(ge=1e-9, le=1e9)], ...], Field(min_length=1, max_length=64)
]
"""Standard deviations that are divided by, likewise."""
