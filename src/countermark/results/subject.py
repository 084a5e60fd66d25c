"""Subject: description of the suspect, with every fact that a correction of p depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

STORED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Reading a dataclass out of a stored document: unknown fields and other types are refused."""

# Records are hostile input; no real run reads a suspect in more than 2^40 ways.
MOST_READINGS = 1 << 40
Count = Annotated[int, Field(ge=1, le=MOST_READINGS)]
Amount = Annotated[int, Field(ge=0, le=MOST_READINGS)]


@dataclass(frozen=True)
class ReferenceFacts:
    """Facts about the reference that a suspect was aligned to.

    Attributes:
        name, sha256: name and digest of its file.
        restored: tensors that were read with their values from before the mark.
        bears_mark: whether the key finds its mark in the reference.
        similarity: mean cosine of the neurons that were matched.
        folded: whether batch norms were folded into the layers before them.
        committed: whether the key's commitment holds this reference.
        refused: why the suspect could not be aligned; None if it was aligned.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: str
    sha256: str | None
    restored: tuple[str, ...] | None = None
    bears_mark: bool | None = None
    similarity: float | None = None
    folded: bool | None = None
    committed: bool | None = None
    refused: str | None = None


@dataclass(frozen=True)
class SkippedFiles:
    """Files of a folder that were not read.

    Attributes:
        reasons: number of files for each reason.
        first: names of the first few files.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    reasons: Mapping[str, Amount]
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class HiddenUnits:
    """Whether the axis that a key's null hypothesis permutes holds hidden units of the suspect.

    Attributes:
        axes: for each permuted tensor of the suspect the axis.
        size: number of units.
        shown_by: how the suspect shows that they are hidden units: by the traced forward of a live
            module, by the configuration beside a transformer's file, or by shapes that allow no
            other explanation; None if nothing shows it, or if the order of the units has a meaning.
        refused: why they are not accepted as hidden units; None if they are accepted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    # 64 is the largest number of axes of an array in numpy 2.
    axes: Mapping[str, Annotated[int, Field(ge=0, le=64)]]
    size: Amount
    shown_by: Literal["architecture", "configuration", "shapes"] | None
    refused: str | None = None


@dataclass(frozen=True)
class UnmarkedModel:
    """An unmarked model that the examiner supplied, read by the suspect's key.

    Attributes:
        name: name of the file, or type of the live model.
        sha256: digest of the values that were read; None for answers.
        distance: for a learnt reader the smaller of two losses: on the model as it is, and with its
            tensors as loud as the suspect's, since logits grow with the weights. For other keys the
            number of misses, or the share of failures.
        log10_p: for a learnt reader, log10 of the rank of its loss among the losses on permutations
            of this model's units; None for other keys.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: str
    sha256: str | None
    distance: Annotated[float, Field(ge=0)]
    log10_p: Annotated[float, Field(le=0)] | None = None


MOST_UNMARKED = 1000
"""Unmarked models that an examiner may supply for one verdict."""


@dataclass(frozen=True)
class Subject:
    """Description of the suspect and of how it was examined.

    Attributes:
        name: name of the file, folder or service, or type of the live model.
        readings: number of ways in which the suspect was read; the best reading is judged.
        class_names: number of class names given with the query; 0 if classes came as numbers.
        tensors: for each tensor that the key reads, its name in the suspect.
        missing: tensors that the key reads and the suspect does not have.
        sha256: digest of each tensor that was read, or of a set of images.
        file_sha256: digest of the whole file.
        reference: facts about the reference that the suspect's weights were aligned to.
        images, skipped: number of images that were read, and the files that were not.
        transcript_sha256: digest of the queries and answers.
        recorded: true if the answers came from a transcript and no model was queried.
        model: the model that a weight file was loaded into.
        why: the most frequent reason for missing answers.
        hidden_units: whether a learnt reader's null hypothesis permutes hidden units; None for
            other keys.
        unmarked: the distinct unmarked models that the examiner supplied.
        notes: what the reader of a weight file found wrong with it, as sentences.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: str
    readings: Count = 1
    class_names: Amount = 0
    tensors: Mapping[str, str] | None = None
    missing: tuple[str, ...] = ()
    sha256: Mapping[str, str] | str | None = None
    file_sha256: str | None = None
    reference: ReferenceFacts | None = None
    images: Amount | None = None
    skipped: SkippedFiles | None = None
    transcript_sha256: str | None = None
    recorded: bool = False
    model: str | None = None
    why: str | None = None
    hidden_units: HiddenUnits | None = None
    unmarked: Annotated[tuple[UnmarkedModel, ...], Field(max_length=MOST_UNMARKED)] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the known facts as JSON values.

        `readings` is listed among the corrections instead; `hidden_units` and `unmarked` are fields
        of the verdict beside the subject.
        """
        told = _collect_known_fields(self)
        # Each fact appears once in a stored verdict, so that two copies cannot disagree.
        for name in ("readings", "hidden_units", "unmarked"):
            told.pop(name, None)
        # Readings of weights always state the file digest, null too: "not computed" is a fact.
        if self.tensors is not None:
            told["file_sha256"] = self.file_sha256
        return told


def _collect_known_fields(facts: Subject | ReferenceFacts | SkippedFiles) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, as JSON values."""
    told: dict[str, Any] = {}
    for each in fields(facts):
        value = getattr(facts, each.name)
        # Fields without a default never equal MISSING, so they are always written.
        if value != each.default:
            told[each.name] = _convert_to_json(value)
    if isinstance(facts, SkippedFiles):
        # Unlike other fields, the list of first names is written even if it is empty.
        told.setdefault("first", [])
    return told


def _convert_to_json(value: Any) -> Any:
    """Convert a field value to a JSON value; nested facts become objects."""
    if isinstance(value, ReferenceFacts | SkippedFiles):
        return _collect_known_fields(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
