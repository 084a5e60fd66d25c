"""TestResult: how probable a reading is under a null hypothesis, after named corrections.

Whoever may choose among n possibilities finds something in one of them n times as easily. Each such
freedom is a `Correction` with a name and a factor, p is multiplied by all of them (Bonferroni), and
all of them are printed and stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field

from countermark.errors import ConfigError
from countermark.subject import STORED

if TYPE_CHECKING:
    from countermark.subject import Subject

CorrectionName = Literal[
    "readings tried",
    "candidates",
    "orders of class names",
    "keys tried",
    "readings of the dispute",
    "claims counted",
]
CORRECTIONS: tuple[CorrectionName, ...] = get_args(CorrectionName)

# A cheat who searches for a key gains by more readings of each key, and nothing by more claims or
# by the other party's readings.
_OF_ONE_KEY: frozenset[CorrectionName] = frozenset(
    {"readings tried", "candidates", "orders of class names", "keys tried"}
)

MOST_ORDERED = 14
"""Names of classes whose orders p is multiplied by; of more, some order fits any answers."""


@dataclass(frozen=True)
class Correction:
    """A freedom that p is corrected for.

    Attributes:
        name: what could have been chosen.
        factor: among how many.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: CorrectionName
    factor: Annotated[int, Field(ge=1, le=1 << 80)]

    def __str__(self) -> str:
        return f"{self.factor:,} {self.name}"


@dataclass(frozen=True)
class Freedoms:
    """The freedoms that do not lie in the suspect.

    Attributes:
        keys: how many keys were tried on the suspect.
        dispute_readings: how many readings a dispute rests on.
        claims: how many commitments the key was one of.
        class_orders: whether whoever ordered the names of classes may have known the answers.
    """

    keys: int = 1
    dispute_readings: int = 1
    claims: int = 1
    class_orders: bool = True


def total_factor(corrections: Iterable[Correction]) -> int:
    """Multiply the factors of corrections."""
    return math.prod(each.factor for each in corrections)


def in_words(corrections: Sequence[Correction]) -> str:
    """Name every correction with its factor, as the end of "p is …"."""
    if not corrections:
        return "not corrected: one reading of one key was tried"
    return f"multiplied by {total_factor(corrections):,}: {' × '.join(map(str, corrections))}"


def applying(*corrections: Correction) -> tuple[Correction, ...]:
    """Leave out the corrections that change nothing."""
    return tuple(each for each in corrections if each.factor > 1)


def corrections_of(subject: Subject, freedoms: Freedoms) -> tuple[Correction, ...]:
    """List the corrections that apply, in the order of `CORRECTIONS`; factors of 1 are left out.

    Raises:
        ConfigError: more names of classes than there are orders that p could be multiplied by.
    """
    if freedoms.class_orders and subject.class_names > MOST_ORDERED:
        raise ConfigError(
            f"the classes came by {subject.class_names} names: p can be multiplied by the orders "
            f"of at most {MOST_ORDERED}; expected classes by number, or a blind choice"
        )
    orders = math.factorial(subject.class_names) if freedoms.class_orders else 1
    return applying(
        Correction("readings tried", subject.readings),
        Correction("orders of class names", orders),
        Correction("keys tried", freedoms.keys),
        Correction("readings of the dispute", freedoms.dispute_readings),
        Correction("claims counted", freedoms.claims),
    )


@dataclass(frozen=True)
class TestResult:
    """The judged probability of a reading.

    Attributes:
        null, null_says: name of the null hypothesis, and the hypothesis in words.
        uncorrected_log10_p: log10 of the chance of a reading at least as good, for one try.
        floor: log10 of the smallest p that this null hypothesis can give, for one try.
        corrections: the freedoms that p is corrected for.
        unmarked_distances: of the unmarked models that a suspect was ranked among; None for other
            nulls.
    """

    __test__: ClassVar[bool] = False  # pytest takes classes called Test… for tests
    __pydantic_config__: ClassVar[ConfigDict] = STORED

    null: str
    null_says: str
    uncorrected_log10_p: Annotated[float, Field(le=0)]
    floor: Annotated[float, Field(le=0)]
    corrections: tuple[Correction, ...] = ()
    unmarked_distances: Annotated[tuple[float, ...], Field(max_length=1 << 16)] | None = field(
        default=None, repr=False
    )

    @property
    def unmarked_models(self) -> int | None:
        """Among how many unmarked models a suspect was ranked; None for other nulls."""
        return None if self.unmarked_distances is None else len(self.unmarked_distances)

    @property
    def factor(self) -> int:
        """By what p is multiplied."""
        return total_factor(self.corrections)

    @property
    def key_factor(self) -> int:
        """How many chances one key had: the factor without claims and readings of a dispute."""
        return total_factor(each for each in self.corrections if each.name in _OF_ONE_KEY)

    @property
    def log10_p(self) -> float:
        """log10 of p after all corrections; at most 0."""
        return min(0.0, self.uncorrected_log10_p + math.log10(self.factor))

    @property
    def least_log10_p(self) -> float:
        """log10 of the smallest p that could have come out, after all corrections."""
        return self.floor + math.log10(self.factor)
