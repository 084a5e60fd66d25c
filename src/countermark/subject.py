"""Subject: what was examined, with every fact about it that a correction of p depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

STORED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""How a dataclass is read out of a stored document: no field more, none of another type."""

MOST_READINGS = 1 << 40
Count = Annotated[int, Field(ge=1, le=MOST_READINGS)]
Amount = Annotated[int, Field(ge=0, le=MOST_READINGS)]


@dataclass(frozen=True)
class ReferenceFacts:
    """The reference that a suspect was aligned to.

    Attributes:
        name, sha256: of its file.
        restored: tensors that were read as they were before the mark.
        bears_mark: whether the key finds its mark in the reference.
        similarity: mean cosine of the neurons that were matched.
        folded: whether batch norms were folded into the layers before them.
        committed: whether the key's commitment holds this reference.
        refused: why the suspect could not be aligned; None where it was.
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
        reasons: how many, by reason.
        first: the first few names.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    reasons: Mapping[str, Amount]
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class HiddenUnits:
    """Whether the axis that a key's null permutes holds hidden units of the suspect.

    Attributes:
        axes: the axis, for each tensor of the suspect that is permuted.
        size: how many units there are.
        shown_by: what of the suspect shows that they are hidden units: the traced forward of a live
            module, the configuration beside a transformer's file, or shapes that leave no other
            way to see it; None where nothing does, or where their order means something.
        refused: why they are not taken for hidden units; None where they are.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    axes: Mapping[str, Annotated[int, Field(ge=0, le=64)]]
    size: Amount
    shown_by: Literal["architecture", "configuration", "shapes"] | None
    refused: str | None = None


@dataclass(frozen=True)
class UnmarkedModel:
    """An unmarked model that the examiner supplied, read by the suspect's key.

    Attributes:
        name: of the file, or the kind of live model.
        sha256: digest of what was read of it; None of answers.
        distance: of a learnt reader the smaller of two losses, on the model as it is and with its
            tensors as loud as the suspect's, since logits grow with the weights; else misses, or
            a share of failures.
        log10_p: of a learnt reader, log10 of the rank of its loss among those on permutations of
            this model's units; None of other keys.
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
    """What was examined.

    Attributes:
        name: of the file, folder, service or kind of model.
        readings: in how many ways it was read; the best one is judged.
        class_names: how many names of classes were given by whoever asked; 0 where classes came
            as numbers.
        tensors: for each tensor that the key reads, its name in the suspect.
        missing: tensors that the key reads and the suspect does not have.
        sha256: digest of each tensor that was read, or of a set of images.
        file_sha256: digest of the whole file.
        reference: what a suspect's weights were aligned to.
        images, skipped: how many images were read, and the files that were not.
        transcript_sha256: digest of what was asked and answered.
        recorded: the answers came out of a transcript; nobody was asked.
        model: what a weight file was loaded into.
        why: the most frequent reason why nothing was answered.
        hidden_units: whether what a learnt reader's null permutes are hidden units; None of other
            keys.
        unmarked: the distinct unmarked models that the examiner supplied.
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

    def to_json(self) -> dict[str, Any]:
        """The facts that are known, as JSON values.

        `readings` stands among the corrections, `hidden_units` and `unmarked` beside the subject.
        """
        told = _known(self)
        for name in ("readings", "hidden_units", "unmarked"):
            told.pop(name, None)
        if self.tensors is not None:
            told["file_sha256"] = self.file_sha256
        return told


def _known(facts: Subject | ReferenceFacts | SkippedFiles) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as JSON values."""
    told: dict[str, Any] = {}
    for each in fields(facts):
        value = getattr(facts, each.name)
        if value != each.default:
            told[each.name] = _as_json(value)
    if isinstance(facts, SkippedFiles):
        told.setdefault("first", [])
    return told


def _as_json(value: Any) -> Any:
    if isinstance(value, ReferenceFacts | SkippedFiles):
        return _known(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
