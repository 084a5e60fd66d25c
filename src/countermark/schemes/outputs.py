"""Marks in the outputs of a network that makes images, read from images that somebody published.

All output schemes share this: the network itself is not changed. A barrier behind the network
marks every image that leaves. Whoever trains a network of their own on these images trains it on
the mark as well. A reading goes once over a whole set of images. The images share one message, so
that they are votes on its bits and not independent trials.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from countermark._internal.plugins import load_object
from countermark.errors import ConfigError
from countermark.images.image_files import Pixels
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.key_place import KeyPlace, make_unfinished_key
from countermark.predictors.base import Images
from countermark.results.null_hypotheses import (
    LEAST_FORGERY_BITS,
    FairCoin,
    NullHypothesis,
    compute_forgery_bits,
)
from countermark.results.reading import Reading
from countermark.results.verdict import ALPHA
from countermark.schemes.base import Scheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from countermark.embedding.base import Embedding

LEAST_SIDE = 16
"""Images with a shorter side say nothing that a reader could be trusted with."""


class ImageNetworks(Protocol):
    """The networks of a key, applied to 8-bit images; `outputs_training.KeyNetworks` in torch."""

    def mark_images(self, outputs: Images) -> Images:
        """Mark images uint8 (n, C, H, W); return images uint8 shaped alike."""

    def read_scores(self, picture: Pixels) -> NDArray[np.float64]:
        """Return scores (T,) or (shifts, T) of an image (C, H, W)."""

    def reveal_image(self, picture: Pixels) -> NDArray[np.float64]:
        """Return the mean hidden image (C, S, S) of an image (C, H, W)."""


class OutputReader(Protocol):
    """A reading of a set of images that proceeds image by image."""

    def add_image(self, picture: Pixels) -> None:
        """Read one more image uint8 (C, H, W) with the key's channels."""

    def make_reading(self) -> Reading:
        """Return the joint result of all images read so far."""

    def state(self) -> dict[str, Any]:
        """Return the progress of the reading as JSON values.

        The values are secret: they are the outputs of the reader on known images.
        """

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the progress that `state` returned.

        Raises:
            ConfigError: the state is not that of a reading with this key.
        """


@dataclass(frozen=True)
class OutputScheme(Scheme):
    """A mark in the images that a network makes, read box-free.

    Attributes:
        bits: T, the message length.
        channels: of the images: 1 for grey, 3 for colour.
    """

    bits: Annotated[int, Field(ge=1, le=1 << 12)] = field(default=144)
    channels: Literal[1, 3] = field(default=1, kw_only=True)

    family: ClassVar[str] = "outputs"
    threat_model: ClassVar[str] = "box-free: images that somebody published"
    null: ClassVar[type[NullHypothesis]] = FairCoin

    @property
    def reading_length(self) -> int:
        """T, the message length."""
        return self.bits

    @property
    def test_count(self) -> int:
        """How many readings are tried, of which the best counts; p is corrected for this number."""
        return 1

    @final
    def generate_key(
        self, frozen: Mapping[str, NDArray[Any]], *, owner: str, material: KeyMaterial
    ) -> Key:
        """Make a key whose networks are fixed before its message is drawn.

        Args:
            frozen: the tensors of the networks, fixed before the commitment.
            owner: the name of the owner.
            material: secret and nonce.
        """
        return Key(
            scheme=self.name,
            fields=self.to_fields(),
            # The key names no tensors: it reads images, and its networks are among the frozen
            # tensors.
            tensors={},
            owner=owner,
            material=material,
            frozen=frozen,
        )

    def check_outputs(self, size: tuple[int, int]) -> None:
        """Raise `ConfigError` for images (H, W) on which the networks cannot be trained."""

    @abstractmethod
    def make_reader(self, key: Key) -> OutputReader:
        """Start to read a set of images.

        Raises:
            ConfigError: the key's networks are damaged.
        """

    @abstractmethod
    def load_networks(self, key: Key) -> ImageNetworks:
        """Return the key's networks, loaded with torch, which marking and reading need.

        Raises:
            ConfigError: the key's networks are damaged.
        """

    @final
    def mark_outputs(self, outputs: Images, key: Key) -> Images:
        """Return outputs uint8 (n, C, H, W) with the mark, as the barrier returns them.

        Raises:
            ConfigError: the key's networks are damaged, or the outputs are of other channels.
        """
        return self.load_networks(key).mark_images(outputs)

    @final
    def wrap(self, model: nn.Module, key: Key) -> nn.Module:
        """Return a network whose every image is marked, as `wrap` of an embedding makes it."""
        barrier: nn.Module = load_object("countermark.embedding:Barrier")(
            model, self.load_networks(key)
        )
        return barrier

    @final
    def extract(self, outputs: Iterable[Pixels], key: Key) -> Reading:
        """Read the message out of a set of images, uint8 (C, H, W) each, of any sizes.

        Raises:
            ConfigError: the key's networks are damaged, there is no image, or one cannot be read.
        """
        reading = self.make_reader(key)
        for picture in outputs:
            reading.add_image(self.fit_channels(picture))
        return reading.make_reading()

    @final
    def fit_channels(self, picture: Pixels) -> Pixels:
        """Convert an image (c, H, W) to the key's channels: to grey, or grey in every channel.

        Raises:
            ConfigError: the array is no image, or the image is too small.
        """
        # Published images are hostile input, and the networks accept only uint8 with known
        # channels.
        if picture.dtype != np.uint8 or picture.ndim != 3 or len(picture) not in (1, 3):
            raise ConfigError(
                f"an output is {picture.dtype} {list(picture.shape)}: expected an image uint8 "
                "[C, H, W] with one channel of grey or three of colour"
            )
        if min(picture.shape[1:]) < LEAST_SIDE:
            raise ConfigError(
                f"an output has {picture.shape[2]}x{picture.shape[1]} pixels: expected "
                f"{LEAST_SIDE} or more on each side"
            )
        if len(picture) == self.channels:
            return picture
        return convert_to_grey(picture) if self.channels == 1 else np.repeat(picture, 3, axis=0)

    def nulls(self, key: Key) -> dict[str, NullHypothesis]:  # noqa: ARG002 - overrides use it
        """Return the null hypotheses that can judge this scheme; the scheme's own is first."""
        return {FairCoin.name: FairCoin()}

    def with_calibration(self, key: Key, siblings: Sequence[Iterable[Pixels]]) -> Key:  # noqa: ARG002
        """Return the key with its readings of images that unmarked networks made."""
        return key

    def embedding_failure(self, evidence: Reading) -> str | None:
        """Return why verify would not find the mark in the owner's images; None if it would."""
        tail = FairCoin().compute_log10_p(evidence)
        # A message shorter than LEAST_FORGERY_BITS must be read completely.
        if 10**tail <= ALPHA and compute_forgery_bits(evidence) >= min(
            LEAST_FORGERY_BITS, evidence.bits
        ):
            return None
        return (
            f"only {evidence.match_count} of {evidence.bits} bits are read from marked images "
            f"(log10 p {tail:.1f}): train longer, or take a lower psnr"
        )

    @final
    def embed(  # noqa: PLR0913 - all but the model are keyword-only
        self, model: nn.Module, *, owner: str, outputs: Images | Tensor,
        inputs: Images | Tensor | None = None, key: str | Path | KeyPlace | None = None,
        resume: bool = False, material: KeyMaterial | None = None,
        siblings: Sequence[Images] = (),
    ) -> Embedding:  # fmt: skip
        """Start to put a barrier behind a network; see `countermark.embedding.OutputEmbedding`.

        Args:
            model: the network, from images to images; the network itself is not changed.
            owner: the name of the owner of the mark.
            outputs: images uint8 (N, C, H, W) like those that the network makes.
            inputs: the inputs of the network for these outputs, in the same order; needed by
                teachers of R.
            key: where the finished key is saved when the block ends; a path, or a `KeyPlace` with a
                passphrase. The place is checked at once: an existing key is never overwritten.
                While training runs, the secret lies in a private folder beside the place.
            resume: continue with the key that an interrupted training left at that place; if there
                is no such key, start with a new one.
            material: secret and nonce, where the caller keeps them; drawn if None.
            siblings: a set of images (n, C, H, W) from each of some unmarked networks, for a form
                that is judged by them.

        Raises:
            KeyFileError: the key exists, an unfinished key exists and `resume` is false, or nothing
                can be written at the place.
            ConfigError: the outputs do not fit the scheme.
        """
        # Imported here because it loads torch. So do the networks of a key, but looking a scheme up
        # does not need them.
        start_embedding = load_object("countermark.embedding:OutputEmbedding")
        started: Embedding = start_embedding(
            self, model, owner=owner, outputs=outputs, inputs=inputs, material=material,
            siblings=siblings, place=make_unfinished_key(key, resume=resume),
        )  # fmt: skip
        return started


def convert_to_grey(picture: Pixels) -> Pixels:
    """Return the Rec. 601 luma (1, H, W) of an image (3, H, W), rounded as pillow rounds it."""
    red, green, blue = picture.astype(np.uint32)
    # Weights 0.299, 0.587, 0.114 as fractions of 2^16, with one half added for rounding.
    luma: Pixels = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
    return luma[None]
