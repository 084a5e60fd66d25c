"""Read a message from published images and judge it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from countermark.errors import SuspectError
from countermark.images.image_files import Pixels
from countermark.keys.key import Key
from countermark.results.reading import Reading
from countermark.results.subject import Subject
from countermark.results.verdict import (
    KeyIdentity,
    Verdict,
    VerificationOptions,
    judge,
    make_no_verdict,
)
from countermark.schemes.outputs import OutputScheme
from countermark.verification.family import ExaminerInputs, SchemeFamily, choose_null
from countermark.verification.image_sets import ImageSetReading, read_folder, read_images
from countermark.verification.unmarked_models import add_unmarked_rank, read_unmarked_images


class OutputFamily(SchemeFamily):
    """Keys that read a message from images that a network made."""

    def read(self, suspect: Iterable[Pixels], scheme: OutputScheme, key: Key) -> Reading:
        """Read images uint8 (C, H, W)."""
        return scheme.extract(suspect, key)

    def examine(
        self, suspect: object, scheme: OutputScheme, key: Key, terms: VerificationOptions,
        inputs: ExaminerInputs,
    ) -> Verdict:  # fmt: skip
        """Judge a folder of images, or images uint8 (C, H, W), that somebody published."""
        found = _read_image_set(suspect, scheme, key, inputs.resume)
        subject = Subject(
            name=str(suspect) if isinstance(suspect, str | Path) else "images",
            # All images are one suspect with one message: `Subject.readings` counts tests, not images.
            readings=scheme.test_count,
            images=found.images,
            skipped=found.skipped.to_facts(),
            sha256=found.digest,
            unmarked=read_unmarked_images(inputs.unmarked, scheme, key) if inputs.unmarked else (),
        )
        identity = KeyIdentity.from_key(key)
        if found.evidence is None:
            reason = "the suspect has no image that could be read"
            return make_no_verdict(
                reason, bits=scheme.bits, subject=subject, key=identity, terms=terms
            )
        chosen = choose_null(
            scheme, add_unmarked_rank(scheme.nulls(key), subject.unmarked), inputs.null
        )
        return judge(found.evidence, chosen, subject=subject, key=identity, terms=terms)


def _read_image_set(
    suspect: object, scheme: OutputScheme, key: Key, resume: Path | None
) -> ImageSetReading:
    """Read a folder of images, or images in memory.

    Raises:
        SuspectError: the suspect is neither a path nor an iterable of images.
    """
    if isinstance(suspect, str | Path):
        return read_folder(Path(suspect), scheme, key, resume=resume)
    if isinstance(suspect, Iterable) and not isinstance(suspect, Mapping):
        return read_images(suspect, scheme, key)
    raise SuspectError(
        f"a key of {scheme.name} reads images, and this is a {type(suspect).__name__}: expected a "
        "folder of pictures, or images uint8 [C, H, W]"
    )
