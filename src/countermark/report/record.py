"""A reading as it was judged: what was read, by which null and terms, and what followed.

Of `fair_coin`, `secret_labels` and `unmarked_models` everything is recorded that p follows from.
Ranks among permutations of the suspect, fresh keys or class maps need suspect and key: of these p
itself is recorded, and a replay says so.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from countermark._version import VERSION
from countermark.age import Dating
from countermark.errors import ConfigError
from countermark.evidence import Alignment, Disclosure, Evidence, Likeness, Reader
from countermark.files import Stored
from countermark.nulls import (
    AlignedCoin,
    FairCoin,
    FreshKeys,
    Null,
    PermutedUnits,
    SecretClassMap,
    SecretLabels,
    UnmarkedModels,
)
from countermark.verdict import Judged, Terms, Verdict, judge

_EXACT = {each.name: each for each in (FairCoin, AlignedCoin, SecretLabels)}
_DRAWN = {each.name: each for each in (PermutedUnits, SecretClassMap, FreshKeys)}
_MOST = 1 << 16  # bits, triggers, unmarked models
Numbers = Annotated[tuple[float, ...], Field(max_length=_MOST)]
Classes = Annotated[tuple[int, ...], Field(max_length=_MOST)]


class RecordedReading(Stored):
    """What a key read: the bits, or the classes that were answered, beside what it expected.

    Attributes:
        read, expected: (T,), as in `Evidence`; `expected` is the disclosed message or labels.
        scores: of a learnt reader (T,), since its loss is judged; else null.
        committed, payload, choices, unit, reader, disclosure, likeness, alignment: as in
            `Evidence`.
    """

    read: Classes
    expected: Annotated[tuple[int, ...], Field(min_length=1, max_length=_MOST)]
    scores: Numbers | None
    committed: bool
    payload: bool | None
    choices: Annotated[int, Field(ge=2, le=1 << 40)]
    unit: Literal["bits", "triggers", "images"]
    reader: dict[str, int | float | None] | None
    disclosure: dict[str, int | bool] | None
    likeness: dict[str, float] | None
    alignment: dict[str, float | bool] | None

    def evidence(self) -> Evidence:
        """The evidence again.

        Raises:
            ValueError: its parts do not fit each other.
        """
        if len(self.read) != len(self.expected) or len(self.scores or self.read) != len(self.read):
            raise ValueError("as many bits must be read as are expected")
        integers = np.int64 if self.unit == "triggers" else np.int8
        return Evidence(
            read=np.array(self.read, dtype=integers),
            expected=np.array(self.expected, dtype=integers),
            committed=self.committed,
            payload=self.payload,
            scores=None if self.scores is None else np.array(self.scores, dtype=np.float64),
            reader=None if self.reader is None else _made(Reader, self.reader),
            choices=self.choices,
            unit=self.unit,
            disclosure=None if self.disclosure is None else _made(Disclosure, self.disclosure),
            likeness=None if self.likeness is None else _made(Likeness, self.likeness),
            alignment=None if self.alignment is None else _made(Alignment, self.alignment),
        )


class RecordedNull(Stored):
    """The null hypothesis that judged.

    Attributes:
        name, says: of the null.
        log10_p, floor: what it gave, before any correction.
        distances: of the unmarked models that the suspect was ranked among; null for other nulls.
    """

    name: str
    says: str
    log10_p: Annotated[float, Field(le=0)]
    floor: Annotated[float, Field(le=0)]
    distances: Numbers | None

    @property
    def recomputed(self) -> bool:
        """Whether p follows from what is recorded."""
        return self.name in {*_EXACT, UnmarkedModels.name}

    def null(self) -> Null:
        """The null again, or one that gives what was recorded.

        Raises:
            ValueError: there is no such null.
        """
        if self.name in _EXACT:
            return _EXACT[self.name]()
        if self.name == UnmarkedModels.name and self.distances is not None:
            return UnmarkedModels(np.array(self.distances))
        if self.name not in _DRAWN:
            raise ValueError(f"there is no null {self.name!r}")
        return _as_recorded(_DRAWN[self.name], self.log10_p, self.floor)


class RecordedTerms(Stored):
    """What was asked and stated."""

    alpha: Annotated[float, Field(gt=0, lt=1)]
    assume_dated: bool
    blind_choice: bool
    dating: dict[str, Any] | None


class Record(Stored):
    """Everything that a verdict follows from.

    Attributes:
        reading, null, tests, terms: what was judged.
        about: scheme, commitment, owner, suspect and test flag of the key.
        verdict: as it was given.
        made: when, and by which versions.
    """

    type: Literal["countermark/record/v1"]
    reading: RecordedReading
    null: RecordedNull
    tests: Annotated[int, Field(ge=1, le=1 << 40)]
    terms: RecordedTerms
    about: dict[str, Any]
    verdict: dict[str, Any]
    made: dict[str, str]

    def judged(self) -> Verdict:
        """The verdict anew, from what was read.

        Raises:
            ValueError: parts that do not fit each other, or another verdict than the recorded one.
        """
        terms = Terms(
            self.terms.alpha,
            self.terms.assume_dated,
            self.terms.blind_choice,
            dating=_dating(self.terms.dating),
        )
        try:
            found = judge(
                self.reading.evidence(), self.null.null(), tests=self.tests, terms=terms,
                about=self.about,
            )  # fmt: skip
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"its parts do not fit each other ({error})") from None
        if differs := [name for name, value in _json(found).items()
                       if self.verdict.get(name, "") != value]:  # fmt: skip
            raise ValueError(
                f"the recorded verdict does not follow from the recorded reading: {differs[0]} was "
                "changed"
            )
        return found


class Recorder:
    """Is told what is judged (`Terms.told`), and makes a record of it.

    Attributes:
        kept: what was judged; None until something was.
    """

    def __init__(self) -> None:
        self.kept: Judged | None = None

    def __call__(self, judged: Judged) -> None:
        """Keep it."""
        self.kept = judged

    def record(self, verdict: Verdict, *, blind_choice: bool, test_key: bool) -> Record | None:
        """The record of a verdict; None of a key that read nothing at all.

        Raises:
            ConfigError: more was read than a record holds.
        """
        if self.kept is None or verdict.floor is None:
            return None
        if self.kept.evidence.bits > _MOST:
            raise ConfigError(
                f"the key reads {self.kept.evidence.bits:,} {verdict.unit}: a report records at "
                f"most {_MOST:,}; `verify` has no such limit"
            )
        told = _json(verdict)
        return Record(
            type="countermark/record/v1",
            reading=_reading(self.kept.evidence),
            null=_null(self.kept, verdict.floor),
            tests=self.kept.tests,
            terms=RecordedTerms(
                alpha=verdict.alpha,
                assume_dated=verdict.assume_dated,
                blind_choice=blind_choice,
                dating=told["dating"],
            ),
            about={
                "scheme": verdict.scheme, "commitment": verdict.commitment,
                "owner": verdict.owner, "suspect": told["suspect"], "test_key": test_key,
            },
            verdict=told,
            made={
                "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "countermark": VERSION, "numpy": np.__version__,
                "python": platform.python_version(),
            },
        )  # fmt: skip


def _reading(evidence: Evidence) -> RecordedReading:
    scores = evidence.scores if evidence.reader is not None else None
    return RecordedReading(
        read=tuple(map(int, evidence.read)),
        expected=tuple(map(int, evidence.expected)),
        scores=None if scores is None else tuple(map(float, scores)),
        committed=evidence.committed,
        payload=evidence.payload,
        choices=evidence.choices,
        unit=evidence.unit,
        reader=None if evidence.reader is None else asdict(evidence.reader),
        disclosure=None if evidence.disclosure is None else asdict(evidence.disclosure),
        likeness=None if evidence.likeness is None else asdict(evidence.likeness),
        alignment=None if evidence.alignment is None else asdict(evidence.alignment),
    )


def _null(judged: Judged, floor: float) -> RecordedNull:
    null = judged.null
    return RecordedNull(
        name=null.name,
        says=null.says,
        log10_p=judged.log10_p,
        floor=floor,
        distances=tuple(map(float, null.distances)) if isinstance(null, UnmarkedModels) else None,
    )


def _as_recorded(kind: type[Any], log10_p: float, floor: float) -> Null:
    """A null of a kind that draws from suspect and key, and gives what it gave then."""
    given = {"log10_p": lambda *_: log10_p, "log10_floor": lambda *_: floor}
    made: Null = object.__new__(type(kind.__name__, (kind,), given))
    return made


def _dating(told: Mapping[str, Any] | None) -> Dating | None:
    if told is None:
        return None
    fields = dict(told) | {"authorities": tuple(told.get("authorities", ()))}
    made: Dating = _made(Dating, fields)
    return made


def _made(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"a {kind.__name__.lower()} has other fields ({error})") from None


def _json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as it comes back out of a JSON file."""
    found: dict[str, Any] = json.loads(json.dumps(verdict.to_json()))
    return found
