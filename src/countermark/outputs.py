"""A set of images that somebody published, as a suspect: hostile files, read one at a time.

What is no plain still picture of 8 bits is skipped with its reason, and counted: a set may be
large, was collected by whoever accuses, and one bad file must neither stop nor sway the reading.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from countermark.errors import MissingExtraError, SuspectError, printable
from countermark.files import read_regular
from countermark.pictures import Pixels, decoded
from countermark.subject import SkippedFiles

MOST_BYTES = 1 << 26
"""Of one picture's file."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Output:
    """One file of the folder: the picture (C, H, W) in it, or why there is none.

    Attributes:
        name: of the file, from the folder on.
        sha256: of its content; empty where it could not be read.
    """

    name: str
    picture: Pixels | None = field(repr=False)
    reason: str = ""
    sha256: bytes = field(default=b"", repr=False)


class Outputs:
    """The picture files of a folder and its subfolders, in the order of their names.

    Args:
        folder: where they are; links are not followed.
        least_side: pictures with a shorter side are skipped.

    Raises:
        SuspectError: it cannot be read, or has no files that are called like pictures.
        MissingExtraError: reading pictures needs pillow.
    """

    def __init__(self, folder: Path, least_side: int) -> None:
        try:
            import PIL.Image  # noqa: F401 (decoding needs it)
        except ModuleNotFoundError as error:
            raise MissingExtraError("reading pictures", "data") from error
        self.folder, self._least = folder, least_side
        self.names = sorted(_names(folder))
        if not self.names:
            raise SuspectError(
                f"{folder} has no files that are called like pictures (.png, .jpg, …): expected a "
                "folder of images that somebody published"
            )

    def __len__(self) -> int:
        return len(self.names)

    def read(self, first: int = 0) -> Iterator[Output]:
        """The files from number `first` on."""
        for name in self.names[first:]:
            yield self._one(name)

    def digests(self, count: int) -> Iterator[tuple[str, bytes]]:
        """Name and SHA-256 of the first `count` files, without a look at their pictures."""
        for name in self.names[:count]:
            try:
                yield name, self._content(name)[1]
            except ValueError:
                yield name, b""

    def _content(self, name: str) -> tuple[bytes, bytes]:
        content = read_regular(self.folder / name, MOST_BYTES)
        return content, hashlib.sha256(content).digest()

    def _one(self, name: str) -> Output:
        import PIL.Image

        try:
            content, digest = self._content(name)
        except ValueError as error:
            return Output(name, None, str(error))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a bomb is refused by its size, the rest is news
                picture = decoded(BytesIO(content), plain=True)
        except PIL.UnidentifiedImageError:  # its own words name an object in memory
            return Output(name, None, "no picture that can be read", digest)
        except Exception as error:  # PIL's decoders raise whatever their format trips over
            return Output(name, None, _kind(error), digest)
        if min(picture.shape[1:]) < self._least:
            return Output(name, None, f"a side below {self._least} pixels", digest)
        return Output(name, picture, "", digest)


@dataclass
class Skipped:
    """How many files were skipped, by reason, with the first few names."""

    reasons: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def add(self, output: Output) -> None:
        """Count one that was skipped."""
        self.reasons[output.reason] += 1
        if len(self.names) < _NAMED:
            self.names.append(output.name)

    def to_facts(self) -> SkippedFiles:
        """Describe the skipped files as a verdict records them."""
        return SkippedFiles(dict(self.reasons.most_common()), tuple(self.names))

    def to_json(self) -> dict[str, Any]:
        """Counts by reason, and the first names."""
        return {"reasons": dict(self.reasons.most_common()), "first": list(self.names)}


_NAMED = 20


def _names(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        raise SuspectError(f"{folder} is no folder: expected one of images that somebody published")

    def refuse(error: OSError) -> None:
        raise SuspectError(f"{error.filename} cannot be read ({error.strerror})")

    for where, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if Path(name).suffix.lower() in _SUFFIXES:
                yield os.path.relpath(os.path.join(where, name), folder)  # noqa: PTH118


def _kind(error: Exception) -> str:
    """An error as a reason of few words, so that like ones are counted together."""
    said = str(error).strip().partition("\n")[0]
    bomb = type(error).__name__ == "DecompressionBombError"
    if bomb or (isinstance(error, ValueError) and "limit" in said):
        return "too many pixels"
    if isinstance(error, ValueError) and said:
        return printable(said, 80)
    return f"truncated or damaged ({type(error).__name__})"
