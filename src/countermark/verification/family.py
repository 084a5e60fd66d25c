"""The interface of a family of schemes in verification: read a suspect, and judge the reading."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark.alignment import Reference
from countermark.errors import ConfigError
from countermark.results.null_hypotheses import NullHypothesis
from countermark.results.reading import Reading
from countermark.results.verdict import Verdict, VerificationOptions
from countermark.schemes.base import Scheme
from countermark.verification.unmarked_models import Supplied


@dataclass(frozen=True)
class ExaminerInputs:
    """The inputs that an examiner supplies beside suspect and key.

    Attributes:
        null: null hypothesis by name; None for the scheme's own one.
        digest: record the digest of the whole suspect file.
        resume: file from which an interrupted reading of a folder of images continues.
        unmarked: unmarked models, or sets of their images.
        reference: model that the suspect's weights are aligned to for a second reading.
    """

    null: str | None = None
    digest: bool = False
    resume: Path | None = None
    unmarked: Sequence[Supplied] = ()
    reference: Reference | None = None


class SchemeFamily(ABC):
    """The way in which the keys of all schemes of one family are read and judged."""

    @abstractmethod
    def read(self, suspect: Any, scheme: Any, key: Any) -> Reading:
        """Read a suspect with a key and return the reading without judging it.

        Args:
            suspect: in the form that this family reads.
            scheme: the key's scheme, of this family.
            key: the key.
        """

    @abstractmethod
    def examine(
        self, suspect: Any, scheme: Any, key: Any, terms: VerificationOptions,
        inputs: ExaminerInputs,
    ) -> Verdict:  # fmt: skip
        """Read a suspect with a key and judge the reading.

        Args:
            suspect: in the form that this family reads.
            scheme: the key's scheme, of this family.
            key: the key, or a part of it that this family reads.
            terms: thresholds and statements.
            inputs: reference, unmarked models and choices of the examiner.
        """


def choose_null(
    scheme: Scheme, nulls: Mapping[str, NullHypothesis], name: str | None
) -> NullHypothesis:
    """Return the null hypothesis of a given name, or the scheme's own (first) one.

    Raises:
        ConfigError: the scheme does not allow a null hypothesis of this name.
    """
    if name is not None and name not in nulls:
        raise ConfigError(f"{scheme.name} has no null {name!r} here: expected {' or '.join(nulls)}")
    return nulls[name] if name else next(iter(nulls.values()))
