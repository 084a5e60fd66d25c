"""TestResult: the probability of a reading under a null hypothesis, after named corrections.

Somebody who may choose among n possibilities finds a match in one of them n times as easily. Each
choice of this kind is a `Correction` with a name and a factor. p is multiplied by all factors
(Bonferroni), and all corrections are printed and stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field

from countermark.errors import ConfigError
from countermark.results.subject import STORED

if TYPE_CHECKING:
    from countermark.results.subject import Subject

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
    """A choice that p is corrected for.

    Attributes:
        name: what could have been chosen.
        factor: the number of possibilities.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: CorrectionName
    # 14! orders of class names are about 2^36; the bound of 2^80 only refuses hostile records.
    factor: Annotated[int, Field(ge=1, le=1 << 80)]

    def __str__(self) -> str:
        return f"{self.factor:,} {self.name}"


@dataclass(frozen=True)
class Freedoms:
    """The choices, apart from those in the suspect, that p is corrected for.

    Attributes:
        keys: number of keys that were tried on the suspect.
        dispute_readings: number of readings that a dispute rests on.
        claims: number of commitments that the key was one of.
        class_orders: true if whoever ordered the class names may have known the answers.
    """

    keys: int = 1
    dispute_readings: int = 1
    claims: int = 1
    class_orders: bool = True


def multiply_factors(corrections: Iterable[Correction]) -> int:
    """Multiply the factors of corrections."""
    return math.prod(each.factor for each in corrections)


def describe_corrections(corrections: Sequence[Correction]) -> str:
    """Name every correction with its factor, as the end of "p is …"."""
    if not corrections:
        return "not corrected: one reading of one key was tried"
    return f"multiplied by {multiply_factors(corrections):,}: {' × '.join(map(str, corrections))}"


def drop_trivial_corrections(*corrections: Correction) -> tuple[Correction, ...]:
    """Drop the corrections with factor 1, which change nothing."""
    return tuple(each for each in corrections if each.factor > 1)


def list_corrections(subject: Subject, freedoms: Freedoms) -> tuple[Correction, ...]:
    """List the corrections that apply, in the order of `CORRECTIONS`; factors of 1 are left out.

    Args:
        subject: description of the suspect, with the number of readings and class names.
        freedoms: the choices that do not lie in the suspect.

    Raises:
        ConfigError: there are too many class names to multiply p by the number of their orders.
    """
    if freedoms.class_orders and subject.class_names > MOST_ORDERED:
        raise ConfigError(
            f"the classes came by {subject.class_names} names: p can be multiplied by the orders "
            f"of at most {MOST_ORDERED}; expected classes by number, or a blind choice"
        )
    # A blind order of class names was not chosen to fit, so it is no freedom.
    orders = math.factorial(subject.class_names) if freedoms.class_orders else 1
    return drop_trivial_corrections(
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
        corrections: the choices that p is corrected for.
        unmarked_distances: distances of the unmarked models that a suspect was ranked among; None
            for other null hypotheses.
    """

    __test__: ClassVar[bool] = False  # pytest takes classes called Test… for tests
    __pydantic_config__: ClassVar[ConfigDict] = STORED

    null: str
    null_says: str
    # Kept as log10: probabilities that convict are often smaller than the smallest float.
    uncorrected_log10_p: Annotated[float, Field(le=0)]
    floor: Annotated[float, Field(le=0)]
    corrections: tuple[Correction, ...] = ()
    unmarked_distances: Annotated[tuple[float, ...], Field(max_length=1 << 16)] | None = field(
        default=None, repr=False
    )

    @property
    def unmarked_model_count(self) -> int | None:
        """Number of unmarked models that the suspect was ranked among; None for other nulls."""
        return None if self.unmarked_distances is None else len(self.unmarked_distances)

    @property
    def factor(self) -> int:
        """Factor that p is multiplied by."""
        return multiply_factors(self.corrections)

    @property
    def key_factor(self) -> int:
        """Number of chances of one key: the factor without claims and readings of a dispute."""
        return multiply_factors(each for each in self.corrections if each.name in _OF_ONE_KEY)

    @property
    def log10_p(self) -> float:
        """log10 of p after all corrections; at most 0."""
        # The Bonferroni bound may exceed 1, which is no probability: p is capped at 1.
        return min(0.0, self.uncorrected_log10_p + math.log10(self.factor))

    @property
    def least_log10_p(self) -> float:
        """log10 of the smallest p that was possible, after all corrections."""
        return self.floor + math.log10(self.factor)
