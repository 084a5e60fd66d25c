"""The record of all questions to a remote suspect and its answers, which can be asked again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import (
    Field,
    StringConstraints,
    model_validator,
)

from countermark._internal import files
from countermark._internal.files import Hex32, StoredDocument
from countermark._internal.output_paths import write_new_file
from countermark.errors import SuspectError, make_printable
from countermark.predictors.base import Images, Labels
from countermark.predictors.remote.answers import MOST_LABELS
from countermark.predictors.remote.images import NO_LABEL, check_images, digest_image
from countermark.predictors.remote.options import MOST_IMAGES
from countermark.results.subject import Subject

TYPE: Final = "countermark/transcript/v1"
CLASS_NAMES: Final = "class_names"
_LARGEST = 64 << 20  # bytes

Text = Annotated[str, StringConstraints(max_length=10_000)]
Flat = Text | int | float | bool | None | list[Text] | list[float]


class TranscriptEntry(StoredDocument):
    """The record of one image.

    Attributes:
        image: digest of the image (`images.digest_image`).
        request: SHA-256 of the body of its request; None if the request was never sent.
        answer: SHA-256 of the body of the last answer; None if no answer came whole.
        status: HTTP status of the last answer; None if there was no answer.
        attempts: requests that were sent.
        label: the class in the answer; None if none could be read.
        why: reason for a missing label; None if there is a label.
    """

    image: Hex32
    request: Hex32 | None
    answer: Hex32 | None
    status: Annotated[int, Field(ge=100, le=999)] | None
    attempts: Annotated[int, Field(ge=0, le=1000)]
    label: Annotated[int, Field(ge=0, lt=MOST_LABELS)] | None
    why: Text | None

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        """Refuse entries whose fields contradict each other."""
        if (self.label is None) == (self.why is None):
            raise ValueError("expected a label, or why there is none")
        # Transcripts are evidence, and anybody may have edited one: contradictions are refused.
        if self.label is not None and self.answer is None:
            raise ValueError("a label came without an answer")
        if (self.request is None) != (self.attempts == 0):
            raise ValueError("a request and the number of attempts do not agree")
        return self


class Transcript(StoredDocument):
    """All questions to one suspect in order, and its answers; without headers and query.

    Attributes:
        url: the url of the suspect, without its query.
        protocol, options: how the suspect was asked, as the public options say.
        started: time when the endpoint was made, UTC, ISO 8601.
        entries: one for each image, in the order of the questions.
    """

    type: Literal["countermark/transcript/v1"]
    url: Text
    protocol: Text
    options: dict[Text, Flat]
    started: Text
    entries: Annotated[tuple[TranscriptEntry, ...], Field(max_length=MOST_IMAGES, repr=False)]

    @model_validator(mode="after")
    def _check_class_names(self) -> Self:
        """Refuse options that do not list the class names, of which there may be none."""
        # A verdict corrects p for a choice among orders of the classes, so their number is needed.
        names = self.options.get(CLASS_NAMES)
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise ValueError(f"options.{CLASS_NAMES}: expected the list of names that were given")
        return self

    def to_bytes(self) -> bytes:
        """Return the content of the file: JSON."""
        return json.dumps(self.model_dump(), indent=1, ensure_ascii=False).encode() + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the file that `save` writes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in their order; empty if the user gave none."""
        names = self.options[CLASS_NAMES]
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def subject(self, *, recorded: bool = False) -> Subject:
        """Describe the suspect as a verdict records it.

        Args:
            recorded: true if the answers are read out of this transcript, and nobody was asked.

        Returns: a description that holds the number of class names, and the most frequent reason
            if no image has a label.
        """
        why = None
        # One reason for the verdict, so that a user sees why nothing could be read.
        if self.entries and all(each.label is None for each in self.entries):
            [(why, _)] = Counter(each.why for each in self.entries).most_common(1)
        return Subject(
            name=self.url, transcript_sha256=self.digest, class_names=len(self.class_names),
            recorded=recorded, why=why,
        )  # fmt: skip

    def make_replay(self) -> Replay:
        """Return a function from images to labels that answers out of the record."""
        return Replay(self)

    def save(self, path: str | Path) -> None:
        """Write the transcript to a new file, whole or not at all; refuse a name that is taken.

        Raises:
            ConfigError: the name is taken; the existing file or folder is left untouched.
        """
        write_new_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that anybody may have written.

        Raises:
            SuspectError: the file is missing, too large, no transcript or of another version, or a
                field is unknown, missing or wrong; the message says which.
        """
        try:
            content = files.read_regular(Path(path), _LARGEST)
            files.require_few_parts(content)
            # Checked before the fields: otherwise a newer file would seem to have a wrong field.
            _refuse_other_versions(files.parse_json(content))
            return files.parse_document(cls, content)
        except ValueError as error:
            why = str(error)
        raise SuspectError(
            f"{path}: {make_printable(why, 200)}; expected a transcript of type {TYPE}"
        )


def _refuse_other_versions(document: Any) -> None:
    """Raise `ValueError` for a transcript of a version that this library does not read."""
    kind, _, version = TYPE.rpartition("/")
    came = document.get("type") if isinstance(document, dict) else None
    if isinstance(came, str) and came.startswith(f"{kind}/") and came != TYPE:
        raise ValueError(
            f"it is of version {came[len(kind) + 1 :]!r}, this countermark reads {version}"
        )


class Replay:
    """A suspect that answers out of a transcript, without network.

    If an image was asked about twice, its first entry counts.

    Args:
        transcript: the transcript.
    """

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self._known: dict[str, int] = {}
        for entry in transcript.entries:
            label = NO_LABEL if entry.label is None else entry.label
            # The first answer counts, so that an owner cannot ask until the suspect answers as
            # wished.
            self._known.setdefault(entry.image, label)

    def subject(self) -> Subject:
        """Describe the transcript as a verdict records it: nobody was asked."""
        return self._transcript.subject(recorded=True)

    def __call__(self, images: Images, /) -> Labels:
        """Return the recorded labels int64 (n,) of images uint8 (n, C, H, W).

        Raises:
            SuspectError: the transcript has no answer about an image.
        """
        digests = [digest_image(image) for image in check_images(images)]
        missing = sum(digest not in self._known for digest in digests)
        if missing:
            raise SuspectError(
                f"the transcript of {self._transcript.url} has no answer for {missing} of "
                f"{len(digests)} image(s), so it is of other images: use the key that it was made "
                "with"
            )
        return np.array([self._known[digest] for digest in digests], dtype=np.int64)
