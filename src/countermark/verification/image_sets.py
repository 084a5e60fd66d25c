"""Read or mark a whole set of images with a key: one at a time, with a progress bar, resumable.

The state of an interrupted reading lies in a file of its own (`countermark/reading/v1`) until the
reading is complete. The file holds the reader's outputs so far, which a thief could use: only its
owner can read the file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from countermark._internal import files
from countermark._internal.progress import show_progress
from countermark.errors import ConfigError
from countermark.images.image_files import Pixels, encode_png
from countermark.images.image_folder import ImageFile, ImageFolder, SkipCounter
from countermark.keys.key import Key
from countermark.keys.streams import frame
from countermark.results.reading import Reading
from countermark.schemes.outputs import LEAST_SIDE, OutputReader, OutputScheme

_TYPE = "countermark/reading/v1"
_SECONDS = 20.0  # between two saves
# Bytes of a state file, which holds the outputs of the reader for many images.
_LARGEST = 1 << 28
# The chain begins with a constant of its own, so that its digests mean nothing elsewhere.
_FIRST = hashlib.sha256(b"countermark/outputs/v1").digest()


@dataclass
class ImageSetReading:
    """The result of reading a set of images.

    Attributes:
        images: number of images that were read.
        evidence: the evidence in all images together; None if no image was read.
        skipped: the files that were not read, with reasons.
        digest: digest over names and contents of all files, in order: the chain of SHA-256(digest ‖
            name ‖ SHA-256(content)); empty for images that are no files.
    """

    images: int = 0
    evidence: Reading | None = None
    skipped: SkipCounter = field(default_factory=SkipCounter)
    digest: str = ""


def read_images(pictures: Iterable[Pixels], scheme: OutputScheme, key: Key) -> ImageSetReading:
    """Read images that are in memory already, uint8 (C, H, W) each.

    Args:
        pictures: the images.
        scheme: the key's scheme.
        key: the key to read with.

    Raises:
        ConfigError: the key's networks are damaged, or an array is no such image.
    """
    reading, found = scheme.make_reader(key), ImageSetReading()
    for picture in pictures:
        reading.add_image(scheme.fit_channels(picture))
        found.images += 1
    if found.images:
        found.evidence = reading.make_reading()
    return found


def read_folder(
    folder: Path, scheme: OutputScheme, key: Key, *, resume: Path | None = None
) -> ImageSetReading:
    """Read the image files of a folder, in bounded memory.

    Args:
        folder: path of the folder.
        scheme: the key's scheme.
        key: the key to read with.
        resume: path of the state of an interrupted reading, to go on from and to save to; removed
            when all files are read.

    Raises:
        SuspectError: the folder cannot be read.
        ConfigError: the key's networks are damaged, or `resume` is no reading of this key and
            these files.
    """
    outputs = ImageFolder(folder, LEAST_SIDE)
    course = _FolderReading(scheme, scheme.make_reader(key), key, outputs)
    with show_progress("reading images", len(outputs)) as advance:
        if resume is not None and resume.exists():
            course.restore(resume, advance)
        for output in outputs.read(course.next):
            course.take(output)
            advance(1)
            if resume is not None and course.is_save_due():
                course.save(resume)
    # Removed only now: an error or Ctrl-C above leaves the last saved state behind.
    if resume is not None:
        with suppress(FileNotFoundError):
            resume.unlink()
    return course.make_result()


def mark_folder(folder: Path, scheme: OutputScheme, key: Key, out: Path) -> tuple[int, SkipCounter]:
    """Mark the image files of a folder and write them as PNG; existing results are kept.

    Args:
        folder: path of the images.
        scheme: the key's scheme.
        key: the key to mark with.
        out: folder of the marked images; a file keeps its name, with `.png` behind it.

    Returns: the number of marked images, and the skipped files.

    Raises:
        SuspectError: the folder cannot be read.
        ConfigError: the key's networks are damaged.
    """
    outputs, live, skipped, marked = (
        ImageFolder(folder, LEAST_SIDE),
        scheme.load_networks(key),
        SkipCounter(),
        0,
    )
    with show_progress("marking images", len(outputs)) as advance:
        for number, name in enumerate(outputs.names):
            place = out / f"{name}.png"
            # A second run goes on where an interrupted one stopped.
            if not place.exists():
                output = next(outputs.read(number))
                if output.picture is None:
                    skipped.add(output)
                    advance(1)
                    continue
                picture = live.mark_images(scheme.fit_channels(output.picture)[None])[0]
                files.write_bytes(place, encode_png(picture))
            marked += 1
            advance(1)
    return marked, skipped


def _extend_digest(digest: bytes, name: str, sha256: bytes) -> bytes:
    """Extend the digest over all files so far by one more file."""
    return hashlib.sha256(frame(digest, name.encode(errors="surrogateescape"), sha256)).digest()


class _FolderReading:
    """The state of reading a folder: the next file, the counts and the reader's own state.

    Args:
        scheme: the key's scheme.
        reading: the reader, before its first image.
        key: the key to read with.
        outputs: the files to read.
    """

    def __init__(
        self, scheme: OutputScheme, reading: OutputReader, key: Key, outputs: ImageFolder
    ) -> None:
        self._scheme, self._reading, self._commitment = scheme, reading, key.commitment
        self._outputs = outputs
        # File names on Linux are bytes; surrogateescape returns the bytes that are no UTF-8
        # unchanged.
        names = frame(*(name.encode(errors="surrogateescape") for name in outputs.names))
        self._names = hashlib.sha256(names).hexdigest()
        self._digest = _FIRST
        self._skipped, self._images = SkipCounter(), 0
        self._saved, self.next = time.monotonic(), 0

    def take(self, output: ImageFile) -> None:
        """Read one more file, or count it as skipped."""
        self._digest = _extend_digest(self._digest, output.name, output.sha256)
        if output.picture is None:
            self._skipped.add(output)
        else:
            self._reading.add_image(self._scheme.fit_channels(output.picture))
            self._images += 1
        self.next += 1

    def make_result(self) -> ImageSetReading:
        """Return the result over all files so far."""
        evidence = self._reading.make_reading() if self._images else None
        return ImageSetReading(self._images, evidence, self._skipped, self._digest.hex())

    def is_save_due(self) -> bool:
        """Return true if the last save is too long ago."""
        return time.monotonic() - self._saved > _SECONDS

    def save(self, path: Path) -> None:
        """Write the state to a file that only its owner can read."""
        state = {
            "type": _TYPE, "commitment": self._commitment, "names": self._names,
            "next": self.next, "images": self._images, "digest": self._digest.hex(),
            "skipped": self._skipped.to_json(), "reading": self._reading.state(),
        }  # fmt: skip
        with files.replace_file(path) as temporary:
            # Made before it is written: the content must never be readable by other users.
            temporary.touch(0o600)
            temporary.write_text(json.dumps(state))
        self._saved = time.monotonic()

    def restore(self, path: Path, advance: Callable[[float], None]) -> None:
        """Go on from a saved state, after checking that the files are still the same.

        Args:
            path: the file that holds the state.
            advance: takes the number of files that were passed, for the progress bar.

        Raises:
            ConfigError: the file holds no state, or one of another key or of other files.
        """
        try:
            state: dict[str, Any] = files.parse_json(files.read_regular(path, _LARGEST))
            if state["type"] != _TYPE:
                raise ValueError(f"its type is {state['type']!r}")
            if (state["commitment"], state["names"]) != (self._commitment, self._names):
                raise ValueError("it is of another key, or of other files")
            self.next, self._images = int(state["next"]), int(state["images"])
            # All files that were read before are hashed again: somebody may have exchanged one.
            self._digest = _FIRST
            for each in self._outputs.digest_files(self.next):
                self._digest = _extend_digest(self._digest, *each)
                advance(1)
            if self._digest.hex() != state["digest"]:
                raise ValueError("it is of files with these names and other contents")
            skipped = state["skipped"]
            self._skipped = SkipCounter(Counter(skipped["reasons"]), list(skipped["first"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected an interrupted reading of this key and these files: {error}; "
                "remove it, or name another file"
            ) from None
        # Outside the `try`: the reader raises its own ConfigError.
        self._reading.restore(state["reading"])
