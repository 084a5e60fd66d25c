"""The record of a verdict: the reading, the null hypothesis, the options and the verdict.

For `fair_coin`, `secret_labels` and `unmarked_models` the record holds everything that p follows
from. Ranks among permutations of the suspect, fresh keys or class maps need suspect and key: for
these nulls the record holds p itself, and a replay says so.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from countermark._internal.files import StoredDocument
from countermark._version import VERSION
from countermark.claims.statement import CLOCK_SKEW, format_time, parse_time, require_past
from countermark.errors import ConfigError
from countermark.results.key_dating import KeyDating
from countermark.results.null_hypotheses import (
    AlignedCoin,
    FairCoin,
    FreshKeys,
    NullHypothesis,
    PermutedUnits,
    SecretClassMap,
    SecretLabels,
    UnmarkedModels,
)
from countermark.results.reading import Alignment, Disclosure, ImageSimilarity, ReaderFacts, Reading
from countermark.results.subject import Subject
from countermark.results.test_result import TestResult, list_corrections
from countermark.results.verdict import KeyIdentity, Verdict, VerificationOptions, judge_result

# p of these null hypotheses follows from the recorded reading alone.
_EXACT = {each.name: each for each in (FairCoin, AlignedCoin, SecretLabels)}
# p of these null hypotheses is a rank among draws that need suspect and key.
_DRAWN = {each.name: each for each in (PermutedUnits, SecretClassMap, FreshKeys)}
_MOST = 1 << 16  # bits, triggers or unmarked models in a record
Numbers = Annotated[tuple[float, ...], Field(max_length=_MOST)]
Classes = Annotated[tuple[int, ...], Field(max_length=_MOST)]


class RecordedReading(StoredDocument):
    """A reading as it is stored: the bits or classes that were read, and the expected ones.

    Attributes:
        read, expected: T values each, as in `Reading`; `expected` is the disclosed message or
            labels.
        scores: T scores of a learnt reader, since its loss is judged; else None.
        committed, payload, choices, unit, reader, disclosure, likeness, alignment: as in
            `Reading`.
    """

    read: Classes
    expected: Annotated[tuple[int, ...], Field(min_length=1, max_length=_MOST)]
    scores: Numbers | None
    committed: bool
    payload: bool | None
    choices: Annotated[int, Field(ge=2, le=1 << 40)]
    unit: Literal["bits", "triggers", "images"]
    reader: ReaderFacts | None
    disclosure: Disclosure | None
    likeness: ImageSimilarity | None
    alignment: Alignment | None

    def rebuild_reading(self) -> Reading:
        """Rebuild the reading as an `Reading`.

        Raises:
            ValueError: its parts do not fit each other.
        """
        # pydantic checks each field alone; here their lengths are compared.
        if len(self.read) != len(self.expected) or len(self.scores or self.read) != len(self.read):
            raise ValueError("as many bits must be read as are expected")
        integers = np.int64 if self.unit == "triggers" else np.int8
        return Reading(
            read=np.array(self.read, dtype=integers),
            expected=np.array(self.expected, dtype=integers),
            committed=self.committed,
            payload=self.payload,
            scores=None if self.scores is None else np.array(self.scores, dtype=np.float64),
            reader=self.reader,
            choices=self.choices,
            unit=self.unit,
            disclosure=self.disclosure,
            likeness=self.likeness,
            alignment=self.alignment,
        )


class RecordedOptions(StoredDocument):
    """The options of the verification as they are stored.

    Attributes:
        alpha, assume_dated, blind_choice, dating: as in `VerificationOptions`.
    """

    alpha: Annotated[float, Field(gt=0, lt=1)]
    assume_dated: bool
    blind_choice: bool
    dating: KeyDating | None


class RecordOrigin(StoredDocument):
    """The origin of a record.

    Attributes:
        date: when the record was made, ISO 8601 in UTC.
        countermark, numpy, python: versions.
    """

    date: str
    countermark: str
    numpy: str
    python: str


class Record(StoredDocument):
    """Everything that a verdict follows from.

    Attributes:
        reading, result, terms, key, subject: the judged facts; the corrections in `result` must
            follow from `subject` and `terms`.
        verdict: the verdict as it was given, as JSON values.
        made: date and versions of the record.
    """

    type: Literal["countermark/record/v2"]
    reading: RecordedReading
    result: TestResult
    terms: RecordedOptions
    key: KeyIdentity
    subject: Subject
    verdict: dict[str, Any]
    made: RecordOrigin

    def judge_again(self) -> Verdict:
        """Judge the recorded reading again.

        Raises:
            ValueError: parts that do not fit each other, or a verdict other than the recorded one.
            ConfigError: a date in the future, or corrections that cannot be made.
        """
        self._require_past_dates()
        terms = VerificationOptions(
            self.terms.alpha,
            self.terms.assume_dated,
            self.terms.blind_choice,
            dating=self.terms.dating,
        )
        try:
            found = self._judge_with_options(terms)
        # A hostile record can hold values that are valid alone and cannot be computed with
        # together.
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"its parts do not fit each other ({error})") from None
        # Every field of the new verdict must equal the recorded one.
        if differs := [name for name, value in _roundtrip_json(found).items()
                       if self.verdict.get(name, "") != value]:  # fmt: skip
            raise ValueError(
                f"the recorded verdict does not follow from the recorded reading: {differs[0]} was "
                "changed"
            )
        return found

    def _judge_with_options(self, terms: VerificationOptions) -> Verdict:
        """Judge the recorded reading under given options.

        Raises:
            ValueError: corrections or distances that do not follow from the other parts.
        """
        evidence = self.reading.rebuild_reading()
        opened = evidence.disclosure is not None
        if (
            list_corrections(self.subject, terms.make_freedoms(opened=opened))
            != self.result.corrections
        ):
            raise ValueError("the recorded corrections do not follow from subject and terms")
        # The distances set the rank and so p: both copies of them in the record must agree.
        supplied = tuple(each.distance for each in self.subject.unmarked)
        ranked = self.result.unmarked_distances if self.result.null == UnmarkedModels.name else None
        if supplied and ranked is not None and ranked != supplied:
            raise ValueError("the recorded distances are not those of the unmarked models")
        result = _recompute_test(self.result, evidence)
        return judge_result(evidence, result, subject=self.subject, key=self.key, terms=terms)

    def _require_past_dates(self) -> None:
        """Raise `ConfigError` if a date of the record is in the future."""
        dating = self.terms.dating
        require_past(parse_time(self.made.date), "the date of the record", tolerance=CLOCK_SKEW)
        if dating is not None:
            require_past(parse_time(dating.suspect_date), "the recorded suspect date")


def make_record(verdict: Verdict) -> Record | None:
    """Make the record of a verdict; None if the key read nothing at all.

    Raises:
        ConfigError: the reading is larger than a record may be.
    """
    evidence, result = verdict.evidence, verdict.result
    if evidence is None or result is None:
        return None
    # The bound of a stored record, said before pydantic would refuse it.
    if evidence.bits > _MOST:
        raise ConfigError(
            f"the key reads {evidence.bits:,} {verdict.unit}: a report records at "
            f"most {_MOST:,}; `verify` has no such limit"
        )
    return Record(
        type="countermark/record/v2",
        reading=_make_recorded_reading(evidence),
        result=result,
        terms=RecordedOptions(
            alpha=verdict.alpha,
            assume_dated=verdict.assume_dated,
            blind_choice=verdict.blind_choice,
            dating=verdict.dating,
        ),
        key=verdict.key,
        subject=verdict.subject,
        verdict=_roundtrip_json(verdict),
        made=RecordOrigin(
            date=format_time(datetime.now(UTC).replace(microsecond=0)), countermark=VERSION,
            numpy=np.__version__, python=platform.python_version(),
        ),
    )  # fmt: skip


def _make_recorded_reading(evidence: Reading) -> RecordedReading:
    """Convert a reading to its stored form."""
    # Only the loss of a learnt reader is judged, so that other scores are not needed.
    scores = evidence.scores if evidence.reader is not None else None
    return RecordedReading(
        read=tuple(map(int, evidence.read)),
        expected=tuple(map(int, evidence.expected)),
        scores=None if scores is None else tuple(map(float, scores)),
        committed=evidence.committed,
        payload=evidence.payload,
        choices=evidence.choices,
        unit=evidence.unit,
        reader=evidence.reader,
        disclosure=evidence.disclosure,
        likeness=evidence.likeness,
        alignment=evidence.alignment,
    )


def is_recomputed(result: TestResult) -> bool:
    """Return true if p follows from the record, without suspect and key."""
    return result.null in {*_EXACT, UnmarkedModels.name}


def _recompute_test(recorded: TestResult, evidence: Reading) -> TestResult:
    """Compute a probability again; keep the recorded one if its null needs suspect and key.

    Raises:
        ValueError: there is no such null, or distances that it needs are missing.
    """
    null: NullHypothesis
    if recorded.null in _EXACT:
        null = _EXACT[recorded.null]()
    elif recorded.null == UnmarkedModels.name and recorded.unmarked_distances is not None:
        null = UnmarkedModels(np.array(recorded.unmarked_distances))
    elif recorded.null in _DRAWN:
        # The text of the null comes from this version, not from a file that anybody may have
        # written.
        return replace(recorded, null_says=_DRAWN[recorded.null].says)
    else:
        raise ValueError(f"there is no null {recorded.null!r}")
    return TestResult(
        recorded.null, null.says, null.compute_log10_p(evidence), null.compute_log10_floor(evidence),
        recorded.corrections, recorded.unmarked_distances,
    )  # fmt: skip


def _roundtrip_json(verdict: Verdict) -> dict[str, Any]:
    """Convert a verdict to the values that come back from a JSON file."""
    found: dict[str, Any] = json.loads(json.dumps(verdict.to_json()))
    return found
