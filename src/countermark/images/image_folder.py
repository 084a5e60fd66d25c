"""A folder of published images as a suspect: hostile files, read one at a time.

Files that are no still 8-bit images are skipped with a reason, and counted. A folder may be large
and was collected by the accuser: one bad file must neither stop nor sway the reading.
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

from countermark._internal.files import read_regular
from countermark.errors import MissingExtraError, SuspectError, make_printable
from countermark.images.image_files import Pixels, decode_image
from countermark.results.subject import SkippedFiles

MOST_BYTES = 1 << 26
"""Largest file of one image, in bytes."""

# Other files, such as a README, are not counted as skipped.
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class ImageFile:
    """One file of the folder: its image (C, H, W), or the reason why it has none.

    Attributes:
        name: path of the file, relative to the folder.
        picture: the image; None if the file was skipped.
        reason: why the file was skipped; empty if it was read.
        sha256: digest of the file's content; empty if the file could not be read.
    """

    name: str
    picture: Pixels | None = field(repr=False)
    reason: str = ""
    sha256: bytes = field(default=b"", repr=False)


class ImageFolder:
    """The image files of a folder and its subfolders, in the order of their names.

    Args:
        folder: path of the folder; links to other folders are not followed.
        least_side: images with a shorter side (in pixels) are skipped.

    Raises:
        SuspectError: the folder cannot be read, or has no files with the suffix of an image.
        MissingExtraError: reading images needs pillow.
    """

    def __init__(self, folder: Path, least_side: int) -> None:
        try:
            import PIL.Image  # noqa: F401 (decoding needs it)
        except ModuleNotFoundError as error:
            raise MissingExtraError("reading pictures", "data") from error
        self.folder, self._least = folder, least_side
        # Sorted, since the digest of the folder and a resumed reading depend on the order.
        self.names = sorted(_find_image_files(folder))
        if not self.names:
            raise SuspectError(
                f"{folder} has no files that are called like pictures (.png, .jpg, …): expected a "
                "folder of images that somebody published"
            )

    def __len__(self) -> int:
        """Return the number of files with the suffix of an image, readable or not."""
        return len(self.names)

    def read(self, first: int = 0) -> Iterator[ImageFile]:
        """Read the files one by one, from number `first` on."""
        for name in self.names[first:]:
            yield self._read_image(name)

    def digest_files(self, count: int) -> Iterator[tuple[str, bytes]]:
        """Compute name and SHA-256 of the first `count` files, without decoding their images.

        Yields: an empty digest for a file that cannot be read.
        """
        for name in self.names[:count]:
            try:
                yield name, self._read_content(name)[1]
            except ValueError:
                # The same digest that a reading records for such a file, so that both chains agree.
                yield name, b""

    def _read_content(self, name: str) -> tuple[bytes, bytes]:
        """Read one file and compute its SHA-256.

        Raises:
            ValueError: the file is missing, not regular or too large.
        """
        content = read_regular(self.folder / name, MOST_BYTES)
        return content, hashlib.sha256(content).digest()

    def _read_image(self, name: str) -> ImageFile:
        """Decode one file, or say why it is skipped; never raises for a bad file."""
        import PIL.Image

        try:
            content, digest = self._read_content(name)
        except ValueError as error:
            return ImageFile(name, None, str(error))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # oversized images are refused by their size anyway
                # Decoded from the bytes that were hashed: the file may change on disk in between.
                picture = decode_image(BytesIO(content), plain=True)
        except PIL.UnidentifiedImageError:  # its message names an object in memory
            return ImageFile(name, None, "no picture that can be read", digest)
        except Exception as error:  # PIL's decoders raise whatever their format trips over
            return ImageFile(name, None, _describe_error(error), digest)
        if min(picture.shape[1:]) < self._least:
            return ImageFile(name, None, f"a side below {self._least} pixels", digest)
        return ImageFile(name, picture, "", digest)


@dataclass
class SkipCounter:
    """A count of skipped files by reason, with the first few names."""

    reasons: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def add(self, output: ImageFile) -> None:
        """Count one skipped file."""
        self.reasons[output.reason] += 1
        if len(self.names) < _NAMED:
            self.names.append(output.name)

    def to_facts(self) -> SkippedFiles:
        """Describe the skipped files as a verdict records them."""
        return SkippedFiles(dict(self.reasons.most_common()), tuple(self.names))

    def to_json(self) -> dict[str, Any]:
        """Return the counts by reason and the first names, as JSON values."""
        return {"reasons": dict(self.reasons.most_common()), "first": list(self.names)}


_NAMED = 20


def _find_image_files(folder: Path) -> Iterator[str]:
    """Find the files with the suffix of an image, as paths relative to the folder.

    Raises:
        SuspectError: the folder, or one below it, cannot be read.
    """
    if not folder.is_dir():
        raise SuspectError(f"{folder} is no folder: expected one of images that somebody published")

    def raise_error(error: OSError) -> None:
        """Raise `SuspectError` for a folder that cannot be listed."""
        raise SuspectError(f"{error.filename} cannot be read ({error.strerror})")

    # By default `os.walk` passes over unreadable folders, and the reading would seem complete.
    for where, _, names in os.walk(folder, onerror=raise_error):
        for name in names:
            if Path(name).suffix.lower() in _SUFFIXES:
                yield os.path.relpath(os.path.join(where, name), folder)  # noqa: PTH118


def _describe_error(error: Exception) -> str:
    """Describe an error in few words, so that files with the same problem are counted together."""
    said = str(error).strip().partition("\n")[0]
    bomb = type(error).__name__ == "DecompressionBombError"
    # PIL and our own limit word this differently, and name the size, which differs by file.
    if bomb or (isinstance(error, ValueError) and "limit" in said):
        return "too many pixels"
    if isinstance(error, ValueError) and said:
        return make_printable(said, 80)
    return f"truncated or damaged ({type(error).__name__})"
